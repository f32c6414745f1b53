"""Batches of padded texts, cut where a long text would make every other one as expensive as itself.

An encoder's graph computes only real tokens. Where its attention could not be fused, that is the exception: its scores
are [texts, heads, length, length] of the padded length. One text of 2,000 tokens beside 64 short ones is 65 such
squares, and one of 577 tokens in a bucket of 864 is a square of 864. Small batches run as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = Mapping[str, NDArray[Any]]
MASK = "attention_mask"
_IDS = "input_ids"
# Scores of one head: a batch of so many runs as it is, and none of more is made of several texts.
_SMALL, _MOST = 2**20, 2**24
# Lengths that runs are padded to are multiples of this; a bucket up to the second is run as it is.
_STEP, _SHORT = 64, 512


def is_padded(inputs: Tensors) -> bool:
    """Whether these are the inputs of an encoder's graph: texts by tokens, and where they end."""
    return {_IDS, MASK} <= set(inputs) and all(
        tensor.ndim == 2 and tensor.shape == inputs[_IDS].shape for tensor in inputs.values()
    )


def groups(lengths: NDArray[np.int64], width: int) -> list[NDArray[np.intp]]:
    """Rows that run together, for texts of these lengths that are padded to `width`; every row is in one of them.

    Texts of one group are less than twice as long as each other, or few enough to be small together.
    """
    if len(lengths) * width**2 <= _SMALL:
        return [np.arange(len(lengths))]
    found: list[list[int]] = []
    longest = 0
    for row in np.argsort(-lengths, kind="stable"):
        length = int(lengths[row])
        work = (len(found[-1]) + 1) * longest**2 if found else 0
        if not found or not (work <= _SMALL or (work <= _MOST and 2 * length > longest)):
            found.append([])
            longest = length
        found[-1].append(int(row))
    return [np.sort(rows) for rows in found]


def run(
    inputs: Tensors, session: Callable[[Tensors], list[NDArray[Any]]], of_tokens: Sequence[bool]
) -> list[NDArray[Any]]:
    """The outputs of a batch, from as many runs as it has groups.

    What a graph says of a text's padding is what it says of its last token, and so it is here.

    Args:
        session: runs the graph; its outputs are [texts, ...].
        of_tokens: which of them are [texts, width, ...].
    """
    rows, width = inputs[_IDS].shape
    lengths = width - (inputs[MASK] > 0)[:, ::-1].argmax(axis=1)
    parts = groups(lengths, width)
    if len(parts) == 1 and (width <= _SHORT or _rounded(lengths) >= width):
        return session(inputs)
    found: list[NDArray[Any]] = []
    for part in parts:
        longest = min(width, _rounded(lengths[part]))
        given = session({name: np.ascontiguousarray(tensor[part, :longest]) for name, tensor in inputs.items()})
        for index, value in enumerate(given):
            if of_tokens[index]:
                value = np.pad(value, [(0, 0), (0, width - longest), *[(0, 0)] * (value.ndim - 2)], mode="edge")
            if index == len(found):
                found.append(np.empty((rows, *value.shape[1:]), value.dtype))
            found[index][part] = value
    return found


def _rounded(lengths: NDArray[np.int64]) -> int:
    return -(-int(lengths.max()) // _STEP) * _STEP
