"""Decides whether a series of a process is flat after its warm-up.

The first third is warm-up: caches fill, threads start. The rest is cut into 20 stretches, and only the least value of
each counts: work comes and goes, a leak stays. A line is fitted to those values that a few outliers do not tilt (its
slope is the median of the slopes between all pairs: Theil 1950, Sen 1968). The series is flat if the line rises by no
more than `ALLOWED` over the time that it was fitted to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WARM_UP = 1 / 3
# By how much a series may rise while it is watched, in its own unit, and as a share of its level.
ALLOWED = {"memory": 8 * 2**20, "threads": 2.0, "files": 8.0, "shared memory": 4 * 2**20}
ALLOWED_SHARE = 0.005
STRETCHES = 20
MIN_SAMPLES = 8


@dataclass(frozen=True)
class Fit:
    """A line through a series after its warm-up.

    Attributes:
        level: the median of the stretches' least values.
        rise: of the line, over the time that it was fitted to.
        slope_per_hour: the same in an hour.
        limit: the rise that is allowed.
    """

    level: float
    rise: float
    slope_per_hour: float
    limit: float

    @property
    def flat(self) -> bool:
        """Whether the series does not grow."""
        return self.rise <= self.limit


def fit(times: Sequence[float], values: Sequence[float], unit: str) -> Fit | None:
    """The line through a series; None if there are too few samples.

    Args:
        times: of the samples, in seconds, rising.
        values: of the samples, one for each time.
        unit: a key of `ALLOWED`.
    """
    moments, amounts = np.asarray(times, float), np.asarray(values, float)
    if not len(moments):
        return None
    warm = moments >= moments[0] + WARM_UP * (moments[-1] - moments[0])
    moments, amounts = moments[warm], amounts[warm]
    if len(moments) < MIN_SAMPLES:
        return None
    stretches = np.array_split(np.arange(len(moments)), min(STRETCHES, len(moments)))
    least = [stretch[np.argmin(amounts[stretch])] for stretch in stretches]
    seconds = float(moments[-1] - moments[0])
    moments, amounts = moments[least], amounts[least]
    first, second = np.triu_indices(len(moments), 1)
    slope = float(np.median((amounts[second] - amounts[first]) / (moments[second] - moments[first])))
    level = float(np.median(amounts))
    return Fit(level, slope * seconds, slope * 3600, max(ALLOWED[unit], ALLOWED_SHARE * level))
