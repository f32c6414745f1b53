"""Rows with different numbers of tokens as one packed run of the decoder graph.

The graph's inputs are described in `trident_export.causal_graph`. Tokens stand one after another, so products are
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
class PackedBatch:
    """The inputs of one run; `first_row` and `rows` say which rows of the cache it takes."""

    first_row: int
    rows: int
    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    attention_tokens: NDArray[np.int64]
    attention_places: NDArray[np.int64]
    query_seqlens: NDArray[np.int32]
    seqlens_k: NDArray[np.int32]
    logits_tokens: NDArray[np.int64]


@dataclass(frozen=True)
class _Layout:
    """What a run has in common with others of the same rows and numbers of tokens.

    Attributes:
        place: of each token in its row's piece.
        owner: of each token, the piece's number.
        rows: of the window, for each piece.
    """

    first_row: int
    window: int
    place: NDArray[np.int64]
    owner: NDArray[np.int64]
    rows: NDArray[np.int64]
    attention_tokens: NDArray[np.int64]
    attention_places: NDArray[np.int64]
    query_seqlens: NDArray[np.int32]
    logits_tokens: NDArray[np.int64]


@lru_cache(maxsize=64)  # a step has the rows of the one before, mostly
def _layout(shape: tuple[tuple[int, int, int], ...], min_places: int) -> _Layout:
    """Of pieces (row, number of tokens, wanted ones)."""
    first = min(row for row, *_ in shape)
    window = max(row for row, *_ in shape) - first + 1
    places = max(min_places, *(length for _, length, _ in shape))
    count = sum(length for _, length, _ in shape)
    tokens = np.zeros((window, places, 2), np.int64)
    where = np.empty((1, count, 2), np.int64)
    lengths = np.zeros(window, np.int32)
    owner = np.empty(count, np.int64)
    wanted: list[int] = []
    begin = 0
    for number, (row, length, last) in enumerate(shape):
        end = begin + length
        tokens[row - first, :, 1] = np.minimum(np.arange(begin, begin + places), end - 1)
        where[0, begin:end, 0] = row - first
        where[0, begin:end, 1] = np.arange(length)
        lengths[row - first] = max(min_places, length)
        owner[begin:end] = number
        wanted += range(end - last, end)
        begin = end
    rows = np.array([row - first for row, *_ in shape])
    return _Layout(first, window, where[0, :, 1], owner, rows, tokens, where, lengths, np.array(wanted, np.int64))


def pack(items: Sequence[RowTokens], min_places: int = MIN_PLACES) -> PackedBatch:
    """One run of these rows, which are all different, each with so many places at least."""
    layout = _layout(tuple((item.row, len(item.tokens), item.wanted) for item in items), min_places)
    starts = np.array([item.start for item in items])
    ends = np.zeros(layout.window, np.int32)  # of an idle row: any that it can have
    ends[layout.rows] = starts + layout.query_seqlens[layout.rows] - 1
    return PackedBatch(
        layout.first_row,
        layout.window,
        input_ids=np.array([[token for item in items for token in item.tokens]], np.int64),
        position_ids=(starts[layout.owner] + layout.place)[None],
        attention_tokens=layout.attention_tokens,
        attention_places=layout.attention_places,
        query_seqlens=layout.query_seqlens,
        seqlens_k=ends,
        logits_tokens=layout.logits_tokens,
    )


def split(items: Iterable[RowTokens], min_places: int = MIN_PLACES) -> list[list[RowTokens]]:
    """Runs that together do all items, in order of rows, with windows that are not larger than MAX_PLACES."""
    runs: list[list[RowTokens]] = []
    for item in sorted(items, key=lambda item: item.row):
        if runs:
            run = runs[-1]
            places = max(min_places, len(item.tokens), *(len(other.tokens) for other in run))
            if (item.row - run[0].row + 1) * places <= MAX_PLACES:
                run.append(item)
                continue
        runs.append([item])
    return runs
