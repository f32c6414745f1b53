"""The rates that the benchmark computes from the times at which tokens arrive."""

from __future__ import annotations

import pytest

from benchmarks.generation import summarize


def test_tokens_one_by_one() -> None:
    measured = summarize([[0.5, 1.0, 1.5, 2.0], [1.0, 1.5, 2.0, 2.5]])
    assert measured.decode == pytest.approx(4.0)  # two streams of two a second
    assert measured.first_token == pytest.approx(750.0)
    assert (measured.gap_p50, measured.gap_p99) == (pytest.approx(500.0), pytest.approx(500.0))


def test_tokens_that_wait_for_their_burst_cost_nothing() -> None:
    """Two streams of ten tokens a second, sent once a second; the second ends while the first has nine waiting."""
    first = [0.0] + [1.0] * 10 + [2.0] * 10 + [3.0] * 10 + [4.0] * 10
    second = [1.5] + [2.5] * 10 + [3.5] * 10 + [3.9] * 4
    assert summarize([first, second]).decode == pytest.approx(20.0)


def test_streams_that_never_ran_together() -> None:
    assert summarize([[0.0, 1.0], [2.0, 3.0]]).decode == 0.0
