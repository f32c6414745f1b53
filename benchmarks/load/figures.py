"""What the times of requests say: throughput, percentiles, goodput.

Time to first token and inter-token latency are those of aiperf and genai-perf: from the request to the first part of
its answer, and what is left, divided by the number of tokens but the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.load.arrivals import Timed

PERCENTILES = (50, 90, 99)
Percentiles = dict[str, float]


@dataclass(frozen=True)
class Limits:
    """Within what a request must be answered to count for goodput, in milliseconds.

    Attributes:
        first_token: of a streamed answer.
        inter_token: of a streamed answer.
        latency: of any other.
    """

    first_token: float = 1000.0
    inter_token: float = 250.0
    latency: float = 500.0

    def told(self) -> str:
        """The limits in words."""
        return (
            f"a first token within {self.first_token:g} ms and {self.inter_token:g} ms between tokens, "
            f"or another answer within {self.latency:g} ms"
        )


@dataclass(frozen=True)
class Figures:
    """One measurement; latencies in milliseconds, by percentile ("p50").

    Attributes:
        driver: "trident", "perf_analyzer" or "aiperf".
        door: "grpc", "http" or "gateway".
        streams: requests at a time; None: they came at random moments.
        rate: of these, a second.
        requests: that were answered.
        wrong: of these, with another answer than a lone request has; None: the driver does not compare.
        full: requests for which there was no room.
        failed: others without an answer.
        requests_per_second: answered, from the first request's beginning to the last one's end; with random arrivals in
            the time of the measurement at least.
        tokens_per_second: the same; None where nothing is generated, or it is not told.
        goodput: the share of all requests that were answered right and within the limits; None: not told.
    """

    model: str
    task: str
    driver: str
    door: str
    streams: int | None
    rate: float | None
    requests: int
    wrong: int | None
    full: int
    failed: int
    requests_per_second: float
    tokens_per_second: float | None
    latency: Percentiles
    first_token: Percentiles | None
    inter_token: Percentiles | None
    goodput: float | None


@dataclass(frozen=True)
class Run:
    """What was measured: the beginning of `Figures`."""

    model: str
    task: str
    driver: str
    door: str
    streams: int | None = None
    rate: float | None = None

    def told(self) -> str:
        """In words."""
        how = f"{self.rate:g} requests/s at random" if self.streams is None else f"{self.streams} at a time"
        return f"{self.model} over {self.door}, {how}, by {self.driver}"


def summarize(
    run: Run, found: Sequence[Timed], right: Sequence[object] | None, limits: Limits, least: float = 0.0
) -> Figures:
    """The figures of the requests of one measurement.

    Args:
        right: the answer to each item; None: answers are not compared.
        least: seconds in which the requests came, where they came at random: a few may be close together.
    """
    answered = [each for each in found if not each.full and not each.error]
    wrong = 0
    good = 0
    for each in answered:
        same = right is None or each.answer == right[each.item]
        wrong += not same
        good += same and is_good(each, limits)
    seconds = max((each.end for each in found), default=0.0) - min((each.due for each in found), default=0.0)
    seconds = max(seconds, least)
    tokens = sum(each.tokens for each in answered)
    streamed = [each for each in answered if each.moments]
    return Figures(
        **vars(run),
        requests=len(answered),
        wrong=None if right is None else wrong,
        full=sum(each.full for each in found),
        failed=sum(bool(each.error) for each in found),
        requests_per_second=len(answered) / seconds if seconds else 0.0,
        tokens_per_second=tokens / seconds if tokens and seconds else None,
        latency=percentiles([1e3 * (each.end - each.due) for each in answered]),
        first_token=percentiles([first_token(each) for each in streamed]) if streamed else None,
        inter_token=percentiles([inter_token(each) for each in streamed]) if streamed else None,
        goodput=good / len(found) if found else None,
    )


def first_token(timed: Timed) -> float:
    """Milliseconds."""
    return 1e3 * (timed.moments[0] - timed.due)


def inter_token(timed: Timed) -> float:
    """Milliseconds; 0 for an answer of one token."""
    return 1e3 * (timed.moments[-1] - timed.moments[0]) / max(timed.tokens - 1, 1)


def is_good(timed: Timed, limits: Limits) -> bool:
    """Whether an answer came within the limits."""
    if not timed.moments:
        return 1e3 * (timed.end - timed.due) <= limits.latency
    return first_token(timed) <= limits.first_token and inter_token(timed) <= limits.inter_token


def percentiles(values: Sequence[float]) -> Percentiles:
    """The 50th, 90th and 99th; none of no values."""
    if not values:
        return {}
    return {
        f"p{each}": float(found) for each, found in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)
    }
