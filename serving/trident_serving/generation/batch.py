"""Rows with different numbers of tokens as one packed run of the decoder graph.

The graph's inputs are described in `trident_export.graphs.causal`. Tokens stand one after another, so products are
computed for them alone; around the attention operator they are spread over a window of the cache's rows, from the
first row of the run to the last, each padded to the longest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# A row takes part in the attention with two places at least, where the cache holds floating-point numbers. ONNX
# Runtime's product of a single row with the values sums in another order than that of several, so a token's numbers
# would depend on how many run with it; the second place holds anything, and what it writes behind the token is
# overwritten by the next run. Products with a cache of 8 bits take one row after the other: there one place is enough.
MIN_PLACES = 2

# Places of a window at most, if several rows share a run: spreading the tokens costs a copy of each place.
MAX_PLACES = 512


@dataclass(frozen=True)
class RowTokens:
    """Tokens to append to one row of the cache.

    Attributes:
        row: the row.
        start: positions that the row holds before.
        tokens: ids, at least one.
        wanted: how many of the last tokens get logits.
    """

    row: int
    start: int
    tokens: Sequence[int]
    wanted: int = 1


@dataclass(frozen=True)
class Layout:
    """The inputs that runs of the same rows and numbers of tokens have in common.

    Attributes:
        first_row: of the window of the cache.
        rows: of that window.
        attention_places: of each token, its row in the window and its place in the row's piece.
    """

    first_row: int
    rows: int
    attention_tokens: NDArray[np.int64]
    attention_places: NDArray[np.int64]
    query_seqlens: NDArray[np.int32]
    logits_tokens: NDArray[np.int64]


@dataclass(frozen=True)
class PackedBatch(Layout):
    """The inputs of one run."""

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    seqlens_k: NDArray[np.int32]


@lru_cache(maxsize=64)  # a step has the rows of the one before, mostly
def _layout(shape: tuple[tuple[int, int, int], ...], min_places: int) -> Layout:
    """Of pieces (row, number of tokens, wanted ones)."""
    first = min(row for row, *_ in shape)
    rows = max(row for row, *_ in shape) - first + 1
    places = max(min_places, *(length for _, length, _ in shape))
    count = sum(length for _, length, _ in shape)
    tokens = np.zeros((rows, places, 2), np.int64)
    where = np.empty((1, count, 2), np.int64)
    lengths = np.zeros(rows, np.int32)
    wanted: list[int] = []
    begin = 0
    for row, length, last in shape:
        end = begin + length
        tokens[row - first, :, 1] = np.minimum(np.arange(begin, begin + places), end - 1)
        where[0, begin:end, 0] = row - first
        where[0, begin:end, 1] = np.arange(length)
        lengths[row - first] = max(min_places, length)
        wanted += range(end - last, end)
        begin = end
    return Layout(first, rows, tokens, where, lengths, np.array(wanted, np.int64))


def pack(
    items: Sequence[RowTokens], min_places: int = MIN_PLACES, held: NDArray[np.int64] | None = None
) -> PackedBatch:
    """One run of these rows, which are all different, each with so many places at least.

    Args:
        held: positions that each row of the cache holds, for a graph without `query_seqlens`: there an idle row of the
            window takes part too, and what it writes must lie behind its content.
    """
    layout = _layout(tuple((item.row, len(item.tokens), item.wanted) for item in items), min_places)
    window = slice(layout.first_row, layout.first_row + layout.rows)
    starts = np.zeros(layout.rows, np.int64) if held is None else held[window].copy()
    starts[[item.row - layout.first_row for item in items]] = [item.start for item in items]
    ends = starts + (layout.query_seqlens if held is None else layout.attention_tokens.shape[1]) - 1
    return PackedBatch(
        **vars(layout),
        input_ids=np.array([[token for item in items for token in item.tokens]], np.int64),
        position_ids=starts[layout.attention_places[..., 0]] + layout.attention_places[..., 1],
        seqlens_k=np.maximum(ends, 0).astype(np.int32),  # of an idle row: any that it can have
    )


def split(items: Iterable[RowTokens], min_places: int = MIN_PLACES, *, ragged: bool = True) -> list[list[RowTokens]]:
    """Runs that together do all items, in order of rows, with windows that are not larger than MAX_PLACES.

    Args:
        ragged: whether rows of one run may have different numbers of tokens. If not, a run is one row, or, where one
            place is enough, rows of one token each: the operator takes no others without `query_seqlens`.
    """
    ordered = sorted(items, key=lambda item: item.row)
    single: list[list[RowTokens]] = []
    if not ragged:
        single = [[item] for item in ordered if max(len(item.tokens), min_places) > 1]
        ordered = [item for item in ordered if max(len(item.tokens), min_places) == 1]
    runs: list[list[RowTokens]] = []
    longest = 0
    for item in ordered:
        longest = max(longest, min_places, len(item.tokens))
        if runs and (item.row - runs[-1][0].row + 1) * longest <= MAX_PLACES:
            runs[-1].append(item)
        else:
            runs.append([item])
            longest = max(min_places, len(item.tokens))
    return single + runs
