"""Weights of eight bits whose products add up in sixteen.

The AVX2 kernels of machines without VNNI add the products of two neighbouring channels in sixteen bits, where 2 x 255 x
64 fits: so two neighbouring weights of one sign are together 128 at most, and one of them may still be 127.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

WEIGHT_LARGEST, PAIR_LARGEST = 127, 128


def steps(weight: Floats) -> Floats:
    """The smallest step of each output with which its weights, [channels, outputs], fit; float32 [outputs]."""
    padded = np.pad(weight, ((0, len(weight) % 2), (0, 0)))
    one, other = padded[0::2], padded[1::2]
    pair = np.where(one * other > 0, np.abs(one + other), 0).max(axis=0)
    found: Floats = np.maximum(pair / PAIR_LARGEST, np.abs(weight).max(axis=0) / WEIGHT_LARGEST)
    return np.maximum(found, 1e-12).astype(np.float32)


def rounded(weight: Floats, step: Floats) -> NDArray[np.int8]:
    """Weights as whole numbers of steps, the nearest; where a pair is too large then, one of it is one less.

    It is the one that was rounded up further.
    """
    scaled = np.pad(weight / step, ((0, len(weight) % 2), (0, 0)))
    found = np.clip(np.rint(scaled), -WEIGHT_LARGEST, WEIGHT_LARGEST)
    up = np.abs(found) - np.abs(scaled)
    large = (found[0::2] * found[1::2] > 0) & (np.abs(found[0::2] + found[1::2]) > PAIR_LARGEST)
    first = large & (up[0::2] >= up[1::2])
    found[0::2] -= first * np.sign(found[0::2])
    found[1::2] -= (large & ~first) * np.sign(found[1::2])
    return found[: len(weight)].astype(np.int8)
