"""Sentence embeddings from token embeddings, as sentence-transformers computes them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trident_serving.schema import reading

Floats = NDArray[np.float32]


class Pooling(StrEnum):
    """How the vectors of a text's tokens become one."""

    MEAN = "mean"
    CLS = "cls"
    LAST_TOKEN = "lasttoken"
    MAX = "max"
    MEAN_BY_ROOT = "mean_sqrt_len_tokens"
    WEIGHTED_MEAN = "weightedmean"


@dataclass(frozen=True)
class PoolingSettings:
    """How a model's embeddings are made; `pooling.json` in the version folder, which the export writes.

    Attributes:
        pooling: what the graph does, before any further layers.
        normalize: whether the vectors that the graph gives are made to length 1.
        more: further poolings, whose vectors follow the first one's.
        normalized: whether the graph's vectors, or what they are the beginnings of, have length 1 already.
    """

    pooling: Pooling
    normalize: bool
    more: tuple[Pooling, ...] = ()
    normalized: bool = False

    @classmethod
    def load(cls, folder: Path) -> PoolingSettings:
        """Read `folder/pooling.json`."""
        return reading.load(cls, folder / "pooling.json")

    def save(self, folder: Path) -> None:
        """Write `folder/pooling.json`."""
        reading.save(self, folder / "pooling.json")


def pool(hidden: Floats, attention_mask: NDArray[np.int64], pooling: Pooling) -> Floats:
    """One vector a text.

    Args:
        hidden: token embeddings, float32 [texts, tokens, dimensions].
        attention_mask: 1 for tokens, 2 for those of a prompt that is left out, and 0 for padding, [texts, tokens];
            each row holds a 1.

    Returns:
        float32 [texts, dimensions].
    """
    counted = attention_mask == 1
    rows = np.arange(len(hidden))
    if pooling is Pooling.CLS:
        first: Floats = hidden[rows, counted.argmax(axis=1)]
        return first
    if pooling is Pooling.LAST_TOKEN:
        ends = attention_mask.shape[1] - 1 - counted[:, ::-1].argmax(axis=1)
        last: Floats = hidden[rows, ends]
        return last
    if pooling is Pooling.MAX:
        largest: Floats = np.where(counted[:, :, None], hidden, -np.inf).max(axis=1)
        return largest
    weights = counted.astype(np.float32)
    if pooling is Pooling.WEIGHTED_MEAN:
        weights *= np.cumsum(attention_mask > 0, axis=1, dtype=np.float32)
    count = weights.sum(axis=1, keepdims=True)
    total: Floats = np.matmul(weights[:, None], hidden)[:, 0]
    mean: Floats = total / (np.sqrt(count) if pooling is Pooling.MEAN_BY_ROOT else count)
    return mean


def normalize(vectors: Floats) -> Floats:
    """Vectors of length 1, float32 [texts, dimensions]; a zero vector stays as it is (torch's eps, 1e-12)."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: Floats = vectors / np.maximum(norms, 1e-12)
    return scaled
