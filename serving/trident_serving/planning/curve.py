"""What one replica of a generator does, as `python -m benchmarks.curve` measures it."""

from __future__ import annotations

import json
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
        if min(self.prefill_seconds, *(seconds for _, seconds in self.steps)) <= 0 or self.prefill_chunk < 1:
            raise InvalidRequest("times and prefill_chunk must be more than 0")
        if self.slots < 1:
            raise InvalidRequest(f"slots must be 1 or more, found {self.slots}")

    def step(self, running: float) -> float:
        """Seconds of a step with so many answers: between two that were measured, in proportion."""
        numbers = [number for number, _ in self.steps]
        above = min(max(bisect_left(numbers, running), 1), len(numbers) - 1)
        if running <= 1 or len(numbers) == 1:
            return self.steps[0][1]
        (low, first), (high, last) = self.steps[above - 1], self.steps[above]
        return first + (last - first) * (running - low) / (high - low)

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
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidRequest(f"{path} is no curve of `python -m benchmarks.curve`: {error}") from None

    def write(self, path: Path) -> None:
        """Into a file."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
