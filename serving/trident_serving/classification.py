"""Labels and scores from a classifier's logits, as the transformers pipeline gives them."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class Activation(StrEnum):
    """What makes scores of logits."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    NONE = "none"


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
    """Places and values of the largest scores over the last axis, the largest first, [..., top_k]."""
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :top_k]
    return order, np.take_along_axis(scores, order, axis=-1)
