"""Labels and scores from a classifier's logits, as the transformers pipeline gives them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trident_serving.schema import reading

Floats = NDArray[np.float32]

_LABELS = "labels.json"


class Activation(StrEnum):
    """What makes scores of logits."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    NONE = "none"


@dataclass(frozen=True)
class LabelSettings:
    """A classifier's labels, in the order of its logits, and what makes scores; `labels.json`."""

    labels: tuple[str, ...]
    activation: Activation

    @classmethod
    def load(cls, folder: Path) -> LabelSettings:
        """Read `folder/labels.json`."""
        return reading.load(cls, folder / _LABELS)

    def save(self, folder: Path) -> None:
        """Write `folder/labels.json`."""
        reading.save(self, folder / _LABELS)


def softmax(logits: Floats) -> Floats:
    """Probabilities over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Floats = powers / powers.sum(axis=-1, keepdims=True)
    return result


def activate(logits: Floats, activation: Activation) -> Floats:
    """Scores of the same shape as the logits."""
    if activation is Activation.SOFTMAX:
        return softmax(logits)
    if activation is Activation.SIGMOID:
        result: Floats = 1.0 / (1.0 + np.exp(-logits))
        return result
    return logits


def best(scores: Floats, top_k: int) -> tuple[NDArray[Any], Floats]:
    """Indices and values of the largest scores over the last axis, the largest first, [..., top_k]."""
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :top_k]
    return order, np.take_along_axis(scores, order, axis=-1)
