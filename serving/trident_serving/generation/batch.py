"""Different numbers of tokens for several slots as one packed run of the decoder graph.

The graph's inputs are described in `trident_export.graphs.causal`. Tokens stand one after another, so the
matmuls are computed for real tokens only; around the attention operator they are spread over a window of the cache's
slots, from the first slot of the run to the last, each padded to the longest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# A slot takes part in the attention with two positions at least, where the cache holds floating-point numbers. ONNX
# Runtime's matmul of a single row sums in another order than that of several, so a token's numbers would depend on how
# many run with it; the second position holds anything, and what it writes behind the token is overwritten by the next
# run. Matmuls with a cache of 8 bits take one row after the other: there one position is enough.
MIN_POSITIONS = 2

# Its attention takes the positions of a slot in parts of twice a head's numbers. One that is left over is a part of its
# own, again a matmul of a single row: so a slot has no number of positions that is one more than a multiple of 16,
# which is the part of the smallest heads, but for one position alone where that is enough.
_PART = 16

# Keys of a slot at least, where heads have more numbers than `LARGEST_PART` and the cache holds floating-point ones: a
# slot with fewer takes part with more positions, which hold anything, as above.
MIN_KEYS = 65

# Tokens of a run at least, and those with logits, where the processor's kernels sum a single row in another order: ONNX
# Runtime's for 4-bit weights do without AVX-512. The last token is there twice, and nothing reads its second row.
PADDED_ROWS = 2

# Positions of a window at most, if several slots share a run: spreading the tokens costs a copy of each position.
MAX_POSITIONS = 512

# Positions without a token at most, where layers keep states: a recurrence steps over each.
MAX_PADDING = 64


_NO_EMBEDS = np.zeros((0, 0), np.float32), np.zeros((0, 2), np.int64)


class Rows(NamedTuple):
    """How many rows the matmuls of a run have at least: of its tokens, and of its logits, if there are any."""

    tokens: int
    wanted: int


ONE_ROW = Rows(1, 1)


@dataclass(frozen=True)
class Embeds:
    """Vectors that a model reads in place of the embeddings of some tokens: those of images.

    Attributes:
        positions: which tokens, rising, [n].
        vectors: float32 [n, numbers of a token].
    """

    positions: NDArray[np.int64]
    vectors: NDArray[np.float32]

    def part(self, start: int, end: int) -> Embeds | None:
        """Those of the tokens from `start` to `end`, counted from there; None where there are none."""
        first, last = np.searchsorted(self.positions, (start, end))
        return Embeds(self.positions[first:last] - start, self.vectors[first:last]) if first < last else None


@dataclass(frozen=True)
class RopePositions:
    """Positions in time, height and width of the tokens of a prompt with images, by which a model rotates.

    Attributes:
        known: of the first tokens up to the last image's, int64 [3, n].
        offset: from a later token's place in the text to its position, which is the same in all three.
    """

    known: NDArray[np.int64]
    offset: int

    def part(self, start: int, end: int) -> NDArray[np.int64]:
        """Those of the tokens from `start` to `end`, int64 [3, tokens]."""
        count = self.known.shape[1]
        later = np.arange(max(start, count), end) + self.offset
        return np.concatenate([self.known[:, start:end], np.broadcast_to(later, (3, len(later)))], axis=1)


@dataclass(frozen=True)
class SlotTokens:
    """Tokens to append to one slot of the cache.

    Attributes:
        slot: the slot.
        start: positions that the slot holds before.
        tokens: ids, at least one.
        wanted: how many of the last tokens get logits.
        rotation: 1 where the text goes beyond the original context of a model with two rotations.
        adapter: 0 for the base, otherwise the number of one of its adapters, from 1.
        embeds: of the tokens that stand for images; None: there are none.
        rope: positions in time, height and width, int64 [3, tokens]; None: all are their places in the text.
    """

    slot: int
    start: int
    tokens: Sequence[int]
    wanted: int = 1
    rotation: int = 0
    adapter: int = 0
    embeds: Embeds | None = None
    rope: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Layout:
    """The inputs that runs of the same slots and numbers of tokens have in common.

    Attributes:
        first_slot: of the window of the cache.
        slots: of that window.
        attention_places: for each token, its slot in the window and its position in the slot's chunk.
        state_tokens, state_mask, state_slots, state_starts: see `trident_export.graphs.states`.
    """

    first_slot: int
    slots: int
    attention_tokens: NDArray[np.int64]
    attention_places: NDArray[np.int64]
    state_tokens: NDArray[np.int64]
    state_mask: NDArray[np.float32]
    state_slots: NDArray[np.int64]
    state_starts: NDArray[np.int32]
    query_seqlens: NDArray[np.int32]
    logits_tokens: NDArray[np.int64]


@dataclass(frozen=True)
class PackedBatch(Layout):
    """The inputs of one run.

    Attributes:
        image_embeds: float32 [n, numbers of a token]; without images [0, 0].
        image_positions: the token of each, as (0, token), int64 [n, 2].
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    rotations: NDArray[np.int64]
    adapters: NDArray[np.int64]
    seqlens_k: NDArray[np.int32]
    image_embeds: NDArray[np.float32]
    image_positions: NDArray[np.int64]


@lru_cache(maxsize=64)  # a step has the slots of the one before, mostly
def _layout(shape: tuple[tuple[int, int, int, int], ...], rows: Rows) -> Layout:
    """Of chunks (slot, number of tokens, number of wanted tokens, positions that the slot takes part with)."""
    first = min(slot for slot, *_ in shape)
    slots = max(slot for slot, *_ in shape) - first + 1
    width = max(positions for *_, positions in shape)
    count = sum(length for _, length, *_ in shape)
    tokens = np.zeros((slots, width, 2), np.int64)
    where = np.zeros((1, max(count, rows.tokens), 2), np.int64)
    lengths = np.zeros(slots, np.int32)
    longest = max(length for _, length, *_ in shape)
    mask = np.zeros((slots, longest, 1), np.float32)
    starts = np.cumsum([0, *(length for _, length, *_ in shape)], dtype=np.int32)
    used = np.array([slot - first for slot, *_ in shape], np.int64)
    wanted: list[int] = []
    begin = 0
    for slot, length, last, positions in shape:
        end = begin + length
        tokens[slot - first, :, 1] = np.minimum(np.arange(begin, begin + width), end - 1)
        where[0, begin:end, 0] = slot - first
        where[0, begin:end, 1] = np.arange(length)
        lengths[slot - first] = positions
        mask[slot - first, :length] = 1
        wanted += range(end - last, end)
        begin = end
    where[:, count:] = where[:, count - 1 : count]
    wanted += wanted[-1:] * (rows.wanted - len(wanted))
    states = tokens[:, :longest, 1], mask, used, starts
    return Layout(first, slots, tokens, where, *states, lengths, np.array(wanted, np.int64))


def _positions(item: SlotTokens, min_positions: int, min_keys: int) -> int:
    """That a slot takes part with."""
    least = max(len(item.tokens), min_positions)
    if least > 1 and least % _PART == 1:
        least += 1
    return max(least, min_keys - item.start)


def pack(
    items: Sequence[SlotTokens],
    min_positions: int = MIN_POSITIONS,
    held: NDArray[np.int64] | None = None,
    rows: Rows = ONE_ROW,
    min_keys: int = 0,
) -> PackedBatch:
    """One run of these slots, which are all different and in order.

    Args:
        min_positions: that each slot takes part with.
        held: positions that each slot of the cache holds, for a graph without `query_seqlens`: there an idle slot of
            the window takes part too, and what it writes must lie behind its content.
        rows: of the run's matmuls at least.
        min_keys: that each slot has behind the run.
    """
    shape = [(item.slot, len(item.tokens), item.wanted, _positions(item, min_positions, min_keys)) for item in items]
    layout = _layout(tuple(shape), rows)
    window = slice(layout.first_slot, layout.first_slot + layout.slots)
    starts = np.zeros(layout.slots, np.int64) if held is None else held[window].copy()
    starts[[item.slot - layout.first_slot for item in items]] = [item.start for item in items]
    ends = starts + (layout.query_seqlens if held is None else layout.attention_tokens.shape[1]) - 1
    ids = [token for item in items for token in item.tokens]
    adapters = [item.adapter for item in items for _ in item.tokens]
    padding = rows.tokens - len(ids)
    ids += ids[-1:] * padding
    adapters += adapters[-1:] * padding
    image_embeds, image_positions = _images(items)
    return PackedBatch(
        **vars(layout),
        input_ids=np.array([ids], np.int64),
        position_ids=starts[layout.attention_places[..., 0]] + layout.attention_places[..., 1],
        rotations=np.array([[item.rotation for item in items for _ in item.tokens]], np.int64),
        adapters=np.array([adapters], np.int64),
        seqlens_k=np.maximum(ends, 0).astype(np.int32),  # of an idle slot: any that it can have
        image_embeds=image_embeds,
        image_positions=image_positions,
    )


def _images(items: Sequence[SlotTokens]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The vectors of all items, and their tokens in the run. A single one is there twice, as `PADDED_ROWS` says why."""
    if all(item.embeds is None for item in items):
        return _NO_EMBEDS
    begins = np.cumsum([0, *(len(item.tokens) for item in items)])
    given = [(item.embeds, begin) for item, begin in zip(items, begins[:-1], strict=True) if item.embeds is not None]
    vectors = np.concatenate([embeds.vectors for embeds, _ in given])
    tokens = np.concatenate([embeds.positions + begin for embeds, begin in given])
    if len(tokens) < PADDED_ROWS:
        vectors, tokens = np.repeat(vectors, PADDED_ROWS, axis=0), np.repeat(tokens, PADDED_ROWS)
    return vectors, np.stack([np.zeros_like(tokens), tokens], axis=1)


def rope_positions(items: Sequence[SlotTokens], batch: PackedBatch) -> NDArray[np.int64]:
    """Positions in time, height and width of a run's tokens, int64 [3, tokens].

    Args:
        items: that were packed.
    """
    found = np.repeat(batch.position_ids, 3, axis=0)
    begin = 0
    for item in items:
        end = begin + len(item.tokens)
        if item.rope is not None:
            found[:, begin:end] = item.rope
        begin = end
    found[:, begin:] = found[:, begin - 1 : begin]  # the last token again, see `PADDED_ROWS`
    return found


def split(
    items: Iterable[SlotTokens],
    min_positions: int = MIN_POSITIONS,
    *,
    ragged: bool = True,
    max_padding: int = MAX_POSITIONS,
    min_keys: int = 0,
) -> list[list[SlotTokens]]:
    """Runs that together do all items, in order of slots, with windows that are not larger than MAX_POSITIONS.

    Args:
        ragged: whether slots of one run may have different numbers of tokens. If not, a run is one slot, or, where one
            position is enough, slots of one token each: the operator takes no others without `query_seqlens`.
        max_padding: positions without a token in a run at most, but for those that a slot has in any run.
        min_keys: that each slot has behind the run.
    """
    by_slot = sorted(items, key=lambda item: item.slot)
    ordered = [(item, _positions(item, min_positions, min_keys)) for item in by_slot]
    single: list[list[SlotTokens]] = []
    if not ragged:
        single = [[item] for item, positions in ordered if positions > 1]
        ordered = [(item, positions) for item, positions in ordered if positions == 1]
    runs: list[list[SlotTokens]] = []
    width = longest = tokens = 0
    for item, positions in ordered:
        length = len(item.tokens)
        width, longest, tokens = max(width, positions), max(longest, length), tokens + length
        slots = item.slot - runs[-1][0].slot + 1 if runs else 0
        fits = slots * width <= MAX_POSITIONS and slots * longest - tokens <= max_padding
        if runs and fits:
            runs[-1].append(item)
        else:
            runs.append([item])
            width, longest, tokens = positions, length, length
    return single + runs
