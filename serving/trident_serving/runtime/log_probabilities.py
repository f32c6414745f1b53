"""Log-probabilities of the model's own distribution, before anything that sampling does to it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class TokenLogProbs:
    """The model's own log-probabilities at one position, before penalties and temperature.

    Attributes:
        chosen: of the chosen token.
        top: token and log-probability of the likeliest tokens, the likeliest first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


def log_probabilities(logits: Logits, token: int, top: int) -> TokenLogProbs:
    """The model's log-probabilities of `token` and of the `top` likeliest tokens, for logits [vocabulary]."""
    largest = float(logits.max())
    normalizer = largest + math.log(float(np.exp(logits - np.float32(largest)).sum(dtype=np.float64)))
    likeliest: list[int] = []
    if top:
        some = np.argpartition(logits, -top)[-top:]
        likeliest = [int(index) for index in some[np.argsort(-logits[some], kind="stable")]]
    return TokenLogProbs(
        float(logits[token]) - normalizer, tuple((index, float(logits[index]) - normalizer) for index in likeliest)
    )


def log_softmax(logits: Logits) -> Logits:
    """Log-probabilities over the last axis, float32."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Logits = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
