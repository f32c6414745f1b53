"""What the benchmark makes of the moments at which tokens arrive."""

from __future__ import annotations

import pytest

from benchmarks.generation import summarize


def test_tokens_one_by_one() -> None:
    measured = summarize([[0.5, 1.0, 1.5, 2.0], [1.0, 1.5, 2.0, 2.5]])
    assert measured.decode == pytest.approx(4.0)  # two streams of two a second
    assert measured.first_token == pytest.approx(750.0)
    assert (measured.gap_p50, measured.gap_p99) == (pytest.approx(500.0), pytest.approx(500.0))


@pytest.mark.parametrize("phase", [0.0, 0.01, 0.05, 0.09])
def test_tokens_in_bursts_count_as_one_by_one(phase: float) -> None:
    """A hundred tokens a second in each of two streams, sent ten at a time; the first and the last at once."""

    def moments(start: float) -> list[float]:
        bursts = [start + 0.1 * (number // 10 + 1) + phase for number in range(98)]
        return [start, *(min(moment, start + 0.99) for moment in bursts), start + 0.99]

    assert summarize([moments(1.0), moments(1.03)]).decode == pytest.approx(200.0, rel=0.12)


def test_streams_that_never_ran_together() -> None:
    assert summarize([[0.0, 1.0], [2.0, 3.0]]).decode == 0.0
