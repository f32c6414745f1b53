"""Who does what in the next step of the engine: iteration-level batching over the slots of the KV cache.

Pure bookkeeping: no tensors, no I/O. First come, first served: the sequence that waits longest gets the next slot,
and none overtakes it while the memory that it needs is taken.
Iteration-level scheduling: Orca (Yu et al., OSDI 2022). Chunked prefill: Sarathi (Agrawal et al., 2023).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from trident_serving.errors import Overloaded
from trident_serving.generation.slots import Placement, SlotPool

SCORED_CHUNK = 32  # tokens whose logits are all kept: each takes as much memory as a running sequence's


class Sequence:
    """One request in the scheduler.

    Attributes:
        tokens: the prompt and what was generated.
        prefill_length: how many of them run before the next one is chosen: the prompt, or, behind a `restart`, all.
        cached: how many of them the cache holds.
        slot: of the KV cache, once it has one.
        scored: whether each token of the prompt needs its logits, so that none is reused.
        leader: a sequence with the same prompt; this one is placed once that has run its own.
        rotation: of the keys in the cache: 1 where the text goes beyond the model's original context.
        adapter: that runs with it; 0: none.
        images: see `slots.Content`.
    """

    def __init__(
        self, prompt: list[int], max_tokens: int, adapter: int = 0, images: tuple[tuple[int, bytes], ...] = ()
    ) -> None:
        self.tokens = prompt
        self.prompt_length = self.prefill_length = len(prompt)
        self.max_tokens = max_tokens
        self.cached = 0
        self.slot: int | None = None
        self.rotation = 0
        self.adapter = adapter
        self.images = images
        self.scored = False
        self.leader: Sequence | None = None

    @property
    def follows(self) -> bool:
        """Whether it waits for its leader."""
        return self.leader is not None and self.leader.slot is not None and not self.leader.prefilled

    @property
    def prefilled(self) -> bool:
        """Whether the whole prompt has run."""
        return self.cached >= self.prefill_length

    def restart(self, rotation: int) -> None:
        """All tokens are to run again, with another rotation."""
        self.cached, self.prefill_length, self.rotation = 0, len(self.tokens), rotation


S = TypeVar("S", bound=Sequence)


@dataclass(frozen=True)
class PrefillChunk(Generic[S]):
    """Run positions start..end-1 of the sequence's prompt."""

    sequence: S
    start: int
    end: int

    @property
    def is_last(self) -> bool:
        """Whether this chunk ends the prompt, so that its last logits give the next token."""
        return self.end == self.sequence.prefill_length


@dataclass(frozen=True)
class Step(Generic[S]):
    """One iteration: new sequences, chunks of prompts, and a token for every decoding sequence.

    Attributes:
        restarted: sequences whose slots hold nothing of use any more.
    """

    placed: tuple[tuple[S, Placement], ...]
    prefill: tuple[PrefillChunk[S], ...]
    decode: tuple[S, ...]
    restarted: tuple[S, ...] = ()


class Scheduler(Generic[S]):
    """First come, first served, over the slots of a cache.

    Args:
        pool: the slots.
        prefill_chunk: prompt tokens in one step at most, which bounds how long running streams wait.
        max_waiting: sequences that may wait for a slot.
        original_context: tokens up to which a text has the first of the model's two rotations; 0: there is one. A
            sequence that grows beyond it starts again.
    """

    def __init__(self, pool: SlotPool, prefill_chunk: int, max_waiting: int, original_context: int = 0) -> None:
        self._pool = pool
        self._prefill_chunk = prefill_chunk
        self._max_waiting = max_waiting
        self._original_context = original_context
        self._waiting: deque[S] = deque()
        self._running: list[S] = []

    @property
    def waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences with a slot."""
        return len(self._running)

    @property
    def sequences(self) -> list[S]:
        """Every sequence, running ones first."""
        return [*self._running, *self._waiting]

    def add(self, *sequences: S) -> None:
        """Queue sequences, all or none.

        Raises:
            Overloaded: the queue is full.
        """
        if len(self._waiting) + len(sequences) > max(self._max_waiting, len(sequences)):
            raise Overloaded(
                f"the queue is full: {len(self._waiting)} of {self._max_waiting} requests wait while "
                f"{len(self._running)} run; try again later"
            )
        for sequence in sequences:
            sequence.rotation = self._rotation(sequence)
        self._waiting.extend(sequences)

    def schedule(self) -> Step[S]:
        """The next step; the caller runs it, raises `cached` as it does, and reports ends with `remove`."""
        decode = tuple(sequence for sequence in self._running if sequence.prefilled)
        restarted = tuple(sequence for sequence in decode if self._rotation(sequence) != sequence.rotation)
        if restarted:
            for sequence in restarted:
                sequence.restart(self._rotation(sequence))
            decode = tuple(sequence for sequence in decode if sequence.prefilled)
        room = self._prefill_chunk
        placed, chunks = [], []
        for sequence in self._running:
            if not sequence.prefilled and room:
                chunks.append(self._chunk(sequence, room))
                room -= chunks[-1].end - chunks[-1].start
        while self._waiting and room and not self._waiting[0].follows:
            placement = self._place(self._waiting[0])
            if placement is None:
                break
            sequence = self._waiting.popleft()
            self._running.append(sequence)
            placed.append((sequence, placement))
            chunks.append(self._chunk(sequence, room))
            room -= chunks[-1].end - chunks[-1].start
        return Step(tuple(placed), tuple(chunks), decode, restarted)

    def remove(self, sequence: S, *, trusted: bool = True) -> None:
        """Take a sequence out.

        Args:
            trusted: whether what the cache holds of it may serve others.
        """
        if sequence.slot is None:
            self._waiting.remove(sequence)
            return
        self._running.remove(sequence)
        if trusted:
            self._pool.release(sequence.slot)
        else:
            self._pool.evict(sequence.slot)
        sequence.slot = None

    def _rotation(self, sequence: S) -> int:
        return int(0 < self._original_context < len(sequence.tokens))

    def _place(self, sequence: S) -> Placement | None:
        size = sequence.prompt_length + sequence.max_tokens
        placement = self._pool.place(sequence, size, reuse=not sequence.scored)
        if placement is not None:
            sequence.slot, sequence.cached = placement.slot, placement.reused
        return placement

    @staticmethod
    def _chunk(sequence: S, room: int) -> PrefillChunk[S]:
        room = min(room, SCORED_CHUNK) if sequence.scored else room
        return PrefillChunk(sequence, sequence.cached, min(sequence.cached + room, sequence.prefill_length))
