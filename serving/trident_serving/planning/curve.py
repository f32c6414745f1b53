"""What one replica of a generator does, as `python -m benchmarks.curve` measures it."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from dataclasses import asdict, dataclass
from pathlib import Path

from trident_serving.errors import InvalidRequest


@dataclass(frozen=True)
class Curve:
    """One replica.

    Attributes:
        model: its public name.
        processor: that it was measured on, in words.
        slots: answers that it generates at once.
        steps: by number of answers that run, rising from 1: seconds from one token of each to the next.
        prefill_seconds: of a token of a prompt.
        prefill_chunk: tokens of prompts in one step at most.
        memory_bytes: that the server with this model takes, its cache in use.
        weights_bytes: of the files that a replica reads when it starts.
        start_seconds: from its start until it is ready.
    """

    model: str
    processor: str
    slots: int
    steps: tuple[tuple[int, float], ...]
    prefill_seconds: float
    prefill_chunk: int
    memory_bytes: int
    weights_bytes: int
    start_seconds: float

    def __post_init__(self) -> None:
        numbers = [number for number, _ in self.steps]
        if not numbers or numbers[0] != 1 or numbers != sorted(set(numbers)):
            raise InvalidRequest(f"steps must begin with 1 answer and rise, found {numbers}")
        for name in ("slots", "prefill_chunk", "memory_bytes", "weights_bytes"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise InvalidRequest(f"{name} must be a whole number of 1 or more, found {value!r}")
        if not all(
            math.isfinite(seconds) and seconds > 0
            for seconds in (self.prefill_seconds, self.start_seconds, *(seconds for _, seconds in self.steps))
        ):
            raise InvalidRequest("times must be more than 0, and numbers")

    def step(self, running: float) -> float:
        """Seconds of a step with so many answers: between two that were measured, and beyond, in proportion."""
        numbers = [number for number, _ in self.steps]
        above = min(max(bisect_left(numbers, running), 1), len(numbers) - 1)
        if running <= 1 or len(numbers) == 1:
            return self.steps[0][1]
        (low, first), (high, last) = self.steps[above - 1], self.steps[above]
        found = first + (last - first) * (running - low) / (high - low)
        # Beyond what was measured a step takes no less than the last one, whatever noise there was in both.
        return found if running <= high else max(found, last)

    @classmethod
    def read(cls, path: Path) -> Curve:
        """From a file.

        Raises:
            InvalidRequest: it is no curve; the message names the file.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            steps = tuple((int(number), float(seconds)) for number, seconds in values.pop("steps"))
            return cls(steps=steps, **values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise InvalidRequest(f"{path} is no curve of `python -m benchmarks.curve`: {error}") from None

    def write(self, path: Path) -> None:
        """Into a file."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
