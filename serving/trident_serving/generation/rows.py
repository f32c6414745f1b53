"""Which row of the KV cache a sequence gets, and what it finds there: admission by memory, reuse of prefixes.

A row keeps what it held when its sequence ends. A prompt that begins like the content of any row, running or
not, starts behind the part that they share: in that row, if it continues the whole content, or in another one
that gets a copy. What no sequence uses is forgotten, the least recently used row first, when a sequence needs the
row or the memory. Pure bookkeeping: no tensors, no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

MIN_REUSED = 8  # tokens; a shorter common beginning is not worth a copy


class Content(Protocol):
    """What a row holds: the keys and values of the first `cached` of these tokens."""

    @property
    def tokens(self) -> Sequence[int]:
        """Prompt and answer so far."""
        ...

    @property
    def cached(self) -> int:
        """How many of them the cache holds."""
        ...


@dataclass(frozen=True)
class Placement:
    """Where a sequence runs.

    Attributes:
        row: its row; what else is in it counts no more.
        reused: tokens of its prompt whose keys and values are there already, or are once they are copied.
        source: the row to copy them from; None where they are in place.
        evicted: rows whose contents are forgotten, after the copy.
    """

    row: int
    reused: int = 0
    source: int | None = None
    evicted: tuple[int, ...] = ()


@dataclass
class _Row:
    content: Content | None = None
    reserved: int = 0  # tokens it may grow to; 0: no sequence runs in it
    last_used: int = 0

    @property
    def tokens(self) -> int:
        """Tokens whose memory the row takes."""
        return self.reserved or (self.content.cached if self.content else 0)


class RowPool:
    """The rows of one cache.

    Args:
        rows: how many there are.
        budget: tokens that all rows together may hold.
        reuse: whether contents are kept for later prompts.
        can_copy: whether the cache can copy between rows; if not, contents are reused in place alone.
    """

    def __init__(self, rows: int, budget: int, *, reuse: bool = True, can_copy: bool = True) -> None:
        self.budget = budget
        self._rows = [_Row() for _ in range(rows)]
        self._reuse = reuse
        self._can_copy = can_copy
        self._clock = 0

    @property
    def running(self) -> int:
        """Rows with a sequence that runs."""
        return sum(row.reserved > 0 for row in self._rows)

    @property
    def held(self) -> int:
        """Tokens whose memory is taken: what running sequences may grow to, and what is kept."""
        return sum(row.tokens for row in self._rows)

    def place(self, content: Content, reserve: int) -> Placement | None:
        """A row for a sequence with nothing cached yet; None while there is no room.

        Args:
            content: the sequence; its tokens are the prompt.
            reserve: tokens that it may grow to, at most the budget.
        """
        source, reused = self._best_match(content.tokens)
        target = self._choose(source, reused)
        if target is None or not self._can_fit(reserve):
            return None
        if target != source and (not self._can_copy or source is None):
            source, reused = None, 0
        self._clock += 1
        if source is not None:
            self._rows[source].last_used = self._clock
        row = self._rows[target]
        row.content, row.reserved, row.last_used = content, reserve, self._clock
        evicted = []
        for index in sorted(range(len(self._rows)), key=lambda index: self._rows[index].last_used):
            if self.held <= self.budget:
                break
            if self._rows[index].content is not None and not self._rows[index].reserved:
                self._rows[index] = _Row()
                evicted.append(index)
        return Placement(target, reused, source if source != target else None, tuple(evicted))

    def leave(self, row: int) -> None:
        """The row's sequence has ended; what the cache holds of it is kept for others."""
        self._clock += 1
        entry = self._rows[row]
        entry.reserved, entry.last_used = 0, self._clock
        if not self._reuse:
            entry.content = None

    def forget(self, row: int) -> None:
        """The row's sequence has ended, and what the cache holds of it can't be trusted."""
        self._rows[row] = _Row()

    def _best_match(self, prompt: Sequence[int]) -> tuple[int | None, int]:
        """The row that shares the longest beginning with a prompt, and its length, less than the whole prompt."""
        best, length = None, MIN_REUSED - 1
        for index, row in enumerate(self._rows):
            if row.content is None or not self._reuse:
                continue
            shared = common_prefix(prompt, row.content.tokens, min(row.content.cached, len(prompt) - 1))
            if shared > length or (shared == length and best is not None and row.reserved == 0):
                best, length = index, shared
        return best, length if best is not None else 0

    def _choose(self, source: int | None, reused: int) -> int | None:
        """The row to run in: the matching one if all of its content is used, else an empty or the oldest one."""
        idle = [index for index, row in enumerate(self._rows) if row.reserved == 0]
        if not idle:
            return None
        if source is not None and source in idle:
            content = self._rows[source].content
            if content is None or content.cached == reused or not self._can_copy:
                return source
        others = [index for index in idle if index != source] or idle
        empty = [index for index in others if self._rows[index].content is None]
        return empty[0] if empty else min(others, key=lambda index: self._rows[index].last_used)

    def _can_fit(self, reserve: int) -> bool:
        return sum(row.reserved for row in self._rows) + reserve <= self.budget


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
