"""From logits to the next token.

The processors follow the `transformers` logits processors of the same names, in this order: repetition
penalty, presence and frequency penalty, minimum length, temperature, top-k, top-p. Presence and frequency
penalties, which transformers lacks, are those of the OpenAI API: counted over generated tokens alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trident_serving.errors import InvalidRequest

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen; greedy where `temperature` is 0.

    Raises:
        InvalidRequest: a value is out of its range; the message names field, value and range.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _check(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            self.min_tokens,
            f"between 0 and max_tokens ({self.max_tokens})",
        )
        _check(0.0 <= self.temperature <= 100.0, "temperature", self.temperature, "between 0 and 100")
        _check(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        _check(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "above 0 and at most 1")
        _check(
            0.0 < self.repetition_penalty <= 100.0,
            "repetition_penalty",
            self.repetition_penalty,
            "above 0 and at most 100",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            _check(-2.0 <= getattr(self, name) <= 2.0, name, getattr(self, name), "between -2 and 2")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0


def _check(holds: bool, field: str, value: float, expected: str) -> None:
    if not holds:
        raise InvalidRequest(f"{field} must be {expected}, found {value}")


class Sampler:
    """Chooses the tokens of one request, one call a token."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], eos_token_ids: frozenset[int]) -> None:
        self._params = params
        self._eos_token_ids = sorted(eos_token_ids)
        self._seen = set(prompt_ids)
        self._counts: dict[int, int] = {}
        self._generated = 0
        self._random = np.random.Generator(np.random.PCG64(params.seed))

    def choose(self, logits: Logits) -> int:
        """The next token for `logits` (float32, [vocabulary]), which are left as they are."""
        scores = self._penalized(logits)
        token = int(scores.argmax()) if self._params.greedy else self._draw(scores)
        self._seen.add(token)
        self._counts[token] = self._counts.get(token, 0) + 1
        self._generated += 1
        return token

    def _penalized(self, logits: Logits) -> Logits:
        params = self._params
        scores = logits
        if params.repetition_penalty != 1.0:
            scores = scores.copy()
            seen = np.fromiter(self._seen, np.int64)
            values = scores[seen]
            scores[seen] = np.where(values < 0, values * params.repetition_penalty, values / params.repetition_penalty)
        if self._counts and (params.presence_penalty or params.frequency_penalty):
            scores = scores.copy()
            tokens = np.fromiter(self._counts.keys(), np.int64)
            counts = np.fromiter(self._counts.values(), np.float32)
            scores[tokens] -= params.presence_penalty + params.frequency_penalty * counts
        if self._generated < params.min_tokens and self._eos_token_ids:
            scores = scores.copy()
            scores[self._eos_token_ids] = -np.inf
        return scores

    def _draw(self, scores: Logits) -> int:
        probabilities = next_token_distribution(scores, self._params)
        cumulative = np.cumsum(probabilities)
        # Scaled by the sum that was reached, so that rounding never points beyond the last token.
        return int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))


def next_token_distribution(scores: Logits, params: SamplingParams) -> NDArray[np.float64]:
    """The distribution that a token is drawn from, after temperature, top-k and top-p; [vocabulary]."""
    scaled = scores.astype(np.float64) / params.temperature
    if 0 < params.top_k < scaled.size:
        threshold = np.partition(scaled, -params.top_k)[-params.top_k]
        scaled[scaled < threshold] = -np.inf
    probabilities: NDArray[np.float64] = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    if params.top_p < 1.0:
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= params.top_p]] = 0.0
        probabilities /= probabilities.sum()
    return probabilities


def log_probability(logits: Logits, token: int) -> float:
    """The model's own log-probability of `token`, before penalties and temperature."""
    largest = float(logits.max())
    total = float(np.exp(logits - largest, dtype=np.float64).sum())
    return float(logits[token]) - largest - math.log(total)
