"""Rows with different numbers of tokens as one packed run of the decoder graph.

The graph's inputs are described in `trident_export.causal_graph`. Tokens stand one after another, so products are
computed for them alone; around the attention operator they are spread over a window of the cache's rows, from the
first row of the run to the last, each padded to the longest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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


def pack(items: Sequence[RowTokens], min_places: int = MIN_PLACES) -> PackedBatch:
    """One run of these rows, which are all different, each with so many places at least."""
    first = min(item.row for item in items)
    rows = max(item.row for item in items) - first + 1
    places = max(min_places, *(len(item.tokens) for item in items))
    count = sum(len(item.tokens) for item in items)
    input_ids = np.empty((1, count), np.int64)
    position_ids = np.empty((1, count), np.int64)
    tokens = np.zeros((rows, places, 2), np.int64)
    where = np.empty((1, count, 2), np.int64)
    lengths = np.zeros(rows, np.int32)
    ends = np.zeros(rows, np.int32)  # of an idle row: any that it can have
    wanted: list[int] = []
    begin = 0
    for item in items:
        row, end = item.row - first, begin + len(item.tokens)
        input_ids[0, begin:end] = item.tokens
        position_ids[0, begin:end] = np.arange(item.start, item.start + len(item.tokens))
        tokens[row, :, 1] = np.minimum(np.arange(begin, begin + places), end - 1)
        where[0, begin:end, 0] = row
        where[0, begin:end, 1] = np.arange(end - begin)
        lengths[row] = max(min_places, len(item.tokens))
        ends[row] = item.start + lengths[row] - 1
        wanted += range(end - item.wanted, end)
        begin = end
    return PackedBatch(first, rows, input_ids, position_ids, tokens, where, lengths, ends, np.array(wanted, np.int64))


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
