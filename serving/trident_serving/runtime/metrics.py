"""What the engine counts, kept in the process until it is published.

Recording is cheap and never waits; `drain` hands over what was recorded since the last time. The names that a server
publishes them under are in `trident_serving.triton.metrics` and docs/reference/metrics.md.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from dataclasses import dataclass, field


@dataclass
class Recorded:
    """Counts to add, values to observe, and the state of now."""

    counters: Counter[str] = field(default_factory=Counter)
    histograms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    gauges: dict[str, float] = field(default_factory=dict)


class Recorder:
    """Collects from any thread.

    Attributes:
        changed: set once there is something new; who drains clears it first.
    """

    def __init__(self) -> None:
        self.changed = threading.Event()
        self._lock = threading.Lock()
        self._recorded = Recorded()

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self._recorded.counters[name] += amount
        self._note()

    def observe(self, name: str, *values: float) -> None:
        """Add values to a histogram."""
        with self._lock:
            self._recorded.histograms[name].extend(values)
        self._note()

    def set(self, **gauges: float) -> None:
        """Set gauges."""
        with self._lock:
            self._recorded.gauges.update(gauges)
        self._note()

    def _note(self) -> None:
        if not self.changed.is_set():  # to set it takes a lock
            self.changed.set()

    def drain(self) -> Recorded:
        """What was recorded since the last call; gauges as they are now."""
        with self._lock:
            recorded, self._recorded = self._recorded, Recorded(gauges=dict(self._recorded.gauges))
        return recorded
