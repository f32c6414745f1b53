"""The rates that the benchmark computes from the times at which tokens arrive."""

from __future__ import annotations

import pytest

from benchmarks.generation import CONCURRENCY, as_table, summarize


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


def test_a_rate_that_nobody_had_is_no_zero_in_the_table() -> None:
    runs = {str(number): {"decode": 50.0, "first_token": 1, "gap_p50": 1, "gap_p99": 1} for number in CONCURRENCY}
    peer = {"kl": 0.0, "weights_bytes": 2**20, "bandwidth_share": 0.5, "prefill": 100.0}
    peers = {
        "llama.cpp": peer | {"streams": runs},
        "other": peer | {"streams": runs | {"32": runs["32"] | {"decode": 0.0}, "1": runs["1"] | {"decode": 75.0}}},
    }
    table = as_table({"processor": "", "peers": peers, "failed": {}, "first_token": {}, "features": {}})
    (row,) = [line for line in table.splitlines() if line.startswith("| other | 0.0000")]
    cells = [cell.strip() for cell in row.split("|")][6:-1]
    assert (cells[0], cells[-1]) == ("75 (1.50)", "never all at once")
