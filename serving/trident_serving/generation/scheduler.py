"""Who does what in the next step of the engine: iteration-level batching over the rows of the KV cache.

Pure bookkeeping: no tensors, no tokens, no I/O. The rows of the cache are kept dense, because the decoder
runs on rows 0..n-1 without copying: decoding sequences hold the first rows, the one that is being
prefilled holds the row after them, and when a sequence leaves, the last row moves into its place.
Iteration-level scheduling: Orca (Yu et al., OSDI 2022).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from trident_serving.errors import Overloaded

T = TypeVar("T")


@dataclass(frozen=True)
class RowMove:
    """Row `source` of the cache becomes row `target`; its first `length` positions matter."""

    source: int
    target: int
    length: int


class Sequence(Generic[T]):
    """One request in the scheduler: how long it is, how much of it the cache holds, and where."""

    def __init__(self, payload: T, prompt_length: int) -> None:
        self.payload = payload
        self.prompt_length = prompt_length
        self.cached = 0
        self.row: int | None = None


@dataclass(frozen=True)
class PrefillChunk(Generic[T]):
    """Run positions start..end-1 of the sequence's prompt."""

    sequence: Sequence[T]
    start: int
    end: int

    @property
    def is_last(self) -> bool:
        """Whether this chunk ends the prompt, so that its last logits give the first token."""
        return self.end == self.sequence.prompt_length


@dataclass(frozen=True)
class Step(Generic[T]):
    """One iteration: at most one prefill chunk, and one token for every decoding sequence."""

    prefill: PrefillChunk[T] | None
    decode: tuple[Sequence[T], ...]


class Scheduler(Generic[T]):
    """First come, first served, over a fixed number of rows.

    Args:
        slots: rows of the cache, so sequences at once.
        prefill_chunk: prompt tokens in one step at most, which bounds how long running streams wait.
        max_waiting: sequences that may wait for a row.
    """

    def __init__(self, slots: int, prefill_chunk: int, max_waiting: int) -> None:
        self._slots = slots
        self._prefill_chunk = prefill_chunk
        self._max_waiting = max_waiting
        self._waiting: deque[Sequence[T]] = deque()
        self._prefilling: Sequence[T] | None = None
        self._decoding: list[Sequence[T]] = []

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._prefilling or self._decoding)

    @property
    def sequences(self) -> list[Sequence[T]]:
        """Every sequence, running ones first."""
        running = [*self._decoding, *([self._prefilling] if self._prefilling else [])]
        return [*running, *self._waiting]

    def add(self, sequence: Sequence[T]) -> None:
        """Queue a sequence.

        Raises:
            Overloaded: the queue is full.
        """
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(
                f"{len(self._waiting)} requests wait for {self._slots} slots and the queue holds no more: "
                "try again later"
            )
        self._waiting.append(sequence)

    def schedule(self) -> Step[T]:
        """The next step; the caller runs it and reports with `advance` and `remove`."""
        if self._prefilling is None and self._waiting and len(self._decoding) < self._slots:
            self._prefilling = self._waiting.popleft()
            self._prefilling.row = len(self._decoding)
        chunk = None
        if self._prefilling is not None:
            start = self._prefilling.cached
            end = min(start + self._prefill_chunk, self._prefilling.prompt_length)
            chunk = PrefillChunk(self._prefilling, start, end)
        return Step(chunk, tuple(self._decoding))

    def advance(self, sequence: Sequence[T], tokens: int) -> None:
        """The cache holds `tokens` more positions of the sequence."""
        sequence.cached += tokens
        if sequence is self._prefilling and sequence.cached >= sequence.prompt_length:
            self._decoding.append(sequence)
            self._prefilling = None

    def remove(self, sequence: Sequence[T]) -> list[RowMove]:
        """Forget a sequence; the caller makes the moves in the cache, in order."""
        if sequence is self._prefilling:
            self._prefilling = None
            sequence.row = None
            return []
        if sequence not in self._decoding:
            self._waiting.remove(sequence)
            return []
        moves = []
        last = self._decoding.pop()
        if last is not sequence:
            hole = self._decoding.index(sequence)
            self._decoding[hole] = last
            moves.append(self._move(last, hole))
        sequence.row = None
        if self._prefilling is not None:
            moves.append(self._move(self._prefilling, len(self._decoding)))
        return moves

    @staticmethod
    def _move(sequence: Sequence[T], target: int) -> RowMove:
        assert sequence.row is not None
        move = RowMove(sequence.row, target, sequence.cached)
        sequence.row = target
        return move
