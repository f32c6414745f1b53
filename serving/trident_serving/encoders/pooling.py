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


@dataclass(frozen=True)
class PoolingSettings:
    """How a model's embeddings are made; `pooling.json` in the version folder, which the export writes."""

    pooling: Pooling
    normalize: bool

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
        attention_mask: 1 for tokens and 0 for padding, [texts, tokens]; each row holds a 1.

    Returns:
        float32 [texts, dimensions].
    """
    mask = attention_mask.astype(np.float32)[:, :, None]
    if pooling is Pooling.MEAN:
        total: Floats = np.matmul(mask.transpose(0, 2, 1), hidden)[:, 0] / mask.sum(axis=1)
        return total
    if pooling is Pooling.CLS:
        first: Floats = hidden[np.arange(len(hidden)), attention_mask.argmax(axis=1)]
        return first
    if pooling is Pooling.LAST_TOKEN:
        ends = attention_mask.shape[1] - 1 - attention_mask[:, ::-1].argmax(axis=1)
        last: Floats = hidden[np.arange(len(hidden)), ends]
        return last
    largest: Floats = np.where(mask > 0, hidden, -np.inf).max(axis=1)
    return largest


def normalize(vectors: Floats) -> Floats:
    """Vectors of length 1, float32 [texts, dimensions]; a zero vector stays as it is (torch's eps, 1e-12)."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: Floats = vectors / np.maximum(norms, 1e-12)
    return scaled
