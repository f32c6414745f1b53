"""Which slot of the KV cache a sequence gets, and what it finds there: admission by memory, reuse of prefixes.

A slot keeps its content when its sequence ends. A prompt that begins like the content of any slot, running or
not, with the same images and the same adapter, starts behind the beginning that they share: in that slot, if it
continues the whole content, or in another one that gets a copy. Content that no sequence uses is evicted, the least
recently used slot first, when a sequence needs the slot or the memory. Where layers keep states, which can't be cut
back, only the whole content of a slot is the beginning of a prompt. Pure bookkeeping: no tensors, no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

MIN_REUSED = 8  # tokens; a shorter common beginning is not worth a copy


class Content(Protocol):
    """What a slot holds: the keys and values of the first `cached` of these tokens."""

    @property
    def tokens(self) -> Sequence[int]:
        """Prompt and answer so far."""
        ...

    @property
    def cached(self) -> int:
        """How many of them the cache holds."""
        ...

    @property
    def rotation(self) -> int:
        """Which of the model's rotations its keys have; another can't use them."""
        ...

    @property
    def adapter(self) -> int:
        """Which adapter made its keys and values; another can't use them."""
        ...

    @property
    def images(self) -> tuple[tuple[int, bytes], ...]:
        """Its images in order: the first token that stands for each, and the digest of its file."""
        ...


@dataclass(frozen=True)
class Placement:
    """Where a sequence runs.

    Attributes:
        slot: its slot; the rest of its content is void.
        reused: tokens of its prompt whose keys and values are there already, or are once they are copied.
        source: the slot to copy them from; None where they are in place.
        evicted: slots whose content is dropped, after the copy.
    """

    slot: int
    reused: int = 0
    source: int | None = None
    evicted: tuple[int, ...] = ()


@dataclass
class _Slot:
    content: Content | None = None
    reserved: int = 0  # tokens it may grow to; 0: no sequence runs in it
    last_used: int = 0

    @property
    def tokens(self) -> int:
        """Tokens whose memory the slot takes."""
        return self.reserved or (self.content.cached if self.content else 0)


class SlotPool:
    """The slots of one cache.

    Args:
        slots: how many there are.
        budget: tokens that all slots together may hold.
        reuse: whether contents are kept for later prompts.
        can_copy: whether the cache can copy between slots; if not, contents are reused in place only.
        whole: contents are reused as a whole or not at all.
    """

    def __init__(
        self, slots: int, budget: int, *, reuse: bool = True, can_copy: bool = True, whole: bool = False
    ) -> None:
        self.budget = budget
        self._slots = [_Slot() for _ in range(slots)]
        self._reuse = reuse
        self._can_copy = can_copy
        self._whole = whole
        self._clock = 0

    @property
    def running(self) -> int:
        """Slots with a sequence that runs."""
        return sum(slot.reserved > 0 for slot in self._slots)

    @property
    def reserved(self) -> int:
        """Tokens that running sequences may grow to; beyond the budget none is admitted."""
        return sum(slot.reserved for slot in self._slots)

    @property
    def held(self) -> int:
        """Tokens whose memory is taken: what running sequences may grow to, and what is kept."""
        return sum(slot.tokens for slot in self._slots)

    def place(self, content: Content, reserve: int, *, reuse: bool = True) -> Placement | None:
        """A slot for a sequence with nothing cached yet; None while there is no room.

        Args:
            content: the sequence; its tokens are the prompt.
            reserve: tokens that it may grow to, at most the budget.
            reuse: whether it may start behind what a slot holds.
        """
        source, reused = self._best_match(content) if reuse else (None, 0)
        target = self._choose(source, reused)
        if target is None or not self._can_fit(reserve):
            return None
        if target != source and (not self._can_copy or source is None):
            source, reused = None, 0
        self._clock += 1
        if source is not None:
            self._slots[source].last_used = self._clock
        slot = self._slots[target]
        slot.content, slot.reserved, slot.last_used = content, reserve, self._clock
        evicted = []
        for index in sorted(range(len(self._slots)), key=lambda index: self._slots[index].last_used):
            if self.held <= self.budget:
                break
            if self._slots[index].content is not None and not self._slots[index].reserved:
                self._slots[index] = _Slot()
                evicted.append(index)
        return Placement(target, reused, source if source != target else None, tuple(evicted))

    def release(self, slot: int) -> None:
        """The slot's sequence has ended; its content is kept for others."""
        self._clock += 1
        entry = self._slots[slot]
        entry.reserved, entry.last_used = 0, self._clock
        if not self._reuse:
            entry.content = None

    def evict(self, slot: int) -> None:
        """The slot's sequence has ended, and its content can't be trusted."""
        self._slots[slot] = _Slot()

    def _best_match(self, new: Content) -> tuple[int | None, int]:
        """The slot that shares the longest beginning with a prompt, and its length, less than the whole prompt."""
        best, length, prompt = None, MIN_REUSED - 1, new.tokens
        for index, slot in enumerate(self._slots):
            if slot.content is None or not self._reuse:
                continue
            if (slot.content.rotation, slot.content.adapter) != (new.rotation, new.adapter):
                continue
            shared = common_prefix(prompt, slot.content.tokens, min(slot.content.cached, len(prompt) - 1))
            if new.images or slot.content.images:
                shared = min(shared, _first_other_image(new.images, slot.content.images, shared))
            if self._whole and shared < slot.content.cached:
                continue
            if shared > length or (shared == length and best is not None and slot.reserved == 0):
                best, length = index, shared
        return best, length if best is not None else 0

    def _choose(self, source: int | None, reused: int) -> int | None:
        """The slot to run in: the matching one if all of its content is used, else an empty or the oldest one."""
        idle = [index for index, slot in enumerate(self._slots) if slot.reserved == 0]
        if not idle:
            return None
        if source is not None and source in idle:
            content = self._slots[source].content
            if content is None or content.cached == reused or not self._can_copy:
                return source
        others = [index for index in idle if index != source] or idle
        empty = [index for index in others if self._slots[index].content is None]
        return empty[0] if empty else min(others, key=lambda index: self._slots[index].last_used)

    def _can_fit(self, reserve: int) -> bool:
        return self.reserved + reserve <= self.budget


def _first_other_image(a: Sequence[tuple[int, bytes]], b: Sequence[tuple[int, bytes]], none: int) -> int:
    """The first token of an image that only one of two sequences has there; `none` where there is no such image.

    Tokens of all images are the same, so what they stand for is told by the files' digests.
    """
    for pair in zip_longest(a, b):
        if pair[0] != pair[1]:
            return min(image[0] for image in pair if image is not None)
    return none


def common_prefix(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """How many tokens two sequences share at the beginning, at most `limit`; slices compare at C's speed."""
    low, high = 0, min(len(a), len(b), limit)
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
