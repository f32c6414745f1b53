"""How sure a figure is: a bootstrap over the examples, and a paired one of the difference between two models.

Efron and Tibshirani 1993 (percentile intervals); Koehn 2004 (the paired bootstrap for measures of a corpus).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trident_export.evaluation.measures import Measure

RESAMPLES = 2000
LEVEL = 0.95
_AT_ONCE = 100  # resamples that are made, or multiplied, together


@dataclass(frozen=True)
class Interval:
    """A figure, and where 95 % of the resamples lie."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """What a model has more than the baseline, with its interval.

    Attributes:
        p: how probable a difference as large is where there is none (two-sided).
    """

    interval: Interval
    p: float


def resamples(examples: int, count: int = RESAMPLES, seed: int = 0) -> NDArray[np.uint16]:
    """How often each example is in each resample, [count, examples]; the same for every model that is compared."""
    random = np.random.default_rng(seed)
    shares = np.full(examples, 1 / examples)
    found = np.empty((count, examples), np.uint16)  # a quarter of what numpy draws, which many examples need
    for start in range(0, count, _AT_ONCE):
        part = found[start : start + _AT_ONCE]
        part[:] = random.multinomial(examples, shares, size=len(part))
    return found


def interval(measure: Measure, weights: NDArray[np.uint16]) -> Interval:
    """Of one measure."""
    return _around(measure.value, _figures(measure, weights))


def difference(measure: Measure, baseline: Measure, weights: NDArray[np.uint16]) -> Difference:
    """Of the same measure of two models, on the same resamples."""
    apart = _figures(measure, weights) - _figures(baseline, weights)
    found = measure.value - baseline.value
    # Of the resamples, moved so that their mean is no difference, those that are as far from it as what was found.
    beyond = int((np.abs(apart - apart.mean()) >= abs(found) - 1e-12).sum())
    # With few examples that differ, resamples show too little. Exchanging the two models' answers to n examples gives
    # 2**n outcomes, and as large a difference in two of them at least.
    differ = len(measure.rows)
    if measure.rows.shape == baseline.rows.shape:  # of classes, each model has columns for those that it names
        differ = int((measure.rows != baseline.rows).any(axis=1).sum())
    least = 2.0 ** (1 - differ)
    return Difference(_around(found, apart), min(1.0, max((beyond + 1) / (len(apart) + 1), least)))


def _figures(measure: Measure, weights: NDArray[np.uint16]) -> NDArray[np.float64]:
    parts = (weights[start : start + _AT_ONCE] @ measure.rows for start in range(0, len(weights), _AT_ONCE))
    return np.array([measure.figure(row) for sums in parts for row in sums])


def _around(value: float, figures: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(figures, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def holm(values: Sequence[float]) -> list[float]:
    """P-values of several comparisons, adjusted so that all hold together (Holm 1979)."""
    order = np.argsort(values)
    adjusted = [0.0] * len(values)
    least = 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = least
    return adjusted
