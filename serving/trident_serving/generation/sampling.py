"""From logits to the next token.

The processors follow the `transformers` logits processors of the same names, in this order: repetition
penalty, presence and frequency penalty, minimum length, temperature, top-k, top-p, min-p. Presence and frequency
penalties, which transformers lacks, are those of the OpenAI API: counted over generated tokens only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trident_serving.errors import InvalidRequest
from trident_serving.runtime.log_probabilities import Logits


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
    min_p: float = 0.0
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
        _check(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "between 0 and 1")
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


class BrokenModel(RuntimeError):
    """The model gave logits that are no numbers."""


class Sampler:
    """Chooses the tokens of one request, one call a token."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], eos_token_ids: frozenset[int]) -> None:
        self._params = params
        self._eos_token_ids = sorted(eos_token_ids)
        self._penalizes = bool(params.presence_penalty or params.frequency_penalty)
        self._repetition = params.repetition_penalty != 1.0
        self._seen = set(prompt_ids) if self._repetition else set()
        self._counts: dict[int, int] = {}
        self._generated = 0
        self._random = None if params.greedy else np.random.Generator(np.random.PCG64(params.seed))

    def choose(self, logits: Logits) -> int:
        """The next token for `logits` (float32, [vocabulary]), which are left as they are.

        Raises:
            BrokenModel: the logits are no numbers.
        """
        likeliest = int(logits.argmax())
        if not math.isfinite(logits[likeliest]):  # argmax finds a NaN where there is one
            raise BrokenModel("the model gave logits that are not numbers")
        scores = self._penalized(logits)
        if self._random is None:
            token = likeliest if scores is logits else int(scores.argmax())
            if token in self._eos_token_ids and self._goes_on:
                token = int(self._without_ends(scores).argmax())
        else:
            token = draw(self._without_ends(scores) if self._goes_on else scores, self._params, self._random)
        if self._repetition:
            self._seen.add(token)
        if self._penalizes:
            self._counts[token] = self._counts.get(token, 0) + 1
        self._generated += 1
        return token

    def _penalized(self, logits: Logits) -> Logits:
        params = self._params
        scores = logits
        if self._repetition:
            scores = scores.copy()
            seen = np.fromiter(self._seen, np.int64)
            values = scores[seen]
            scores[seen] = np.where(values < 0, values * params.repetition_penalty, values / params.repetition_penalty)
        if self._counts:
            scores = scores.copy()
            tokens = np.fromiter(self._counts.keys(), np.int64)
            counts = np.fromiter(self._counts.values(), np.float32)
            scores[tokens] -= params.presence_penalty + params.frequency_penalty * counts
        return scores

    @property
    def _goes_on(self) -> bool:
        """Whether the answer may not end yet."""
        return self._generated < self._params.min_tokens

    def _without_ends(self, scores: Logits) -> Logits:
        scores = scores.copy()
        scores[self._eos_token_ids] = -np.inf
        return scores


def draw(scores: Logits, params: SamplingParams, random: np.random.Generator) -> int:
    """A token of the distribution that `candidates` gives; one random number is taken, whatever it is."""
    tokens, probabilities = candidates(scores, params)
    cumulative = np.cumsum(probabilities, dtype=np.float64)
    # Scaled by the sum that was reached, so that rounding never points beyond the last token.
    index = int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))
    return index if tokens is None else int(tokens[index])


def candidates(scores: Logits, params: SamplingParams) -> tuple[NDArray[np.int64] | None, NDArray[np.float32]]:
    """The tokens that may be drawn after temperature, top-k, top-p and min-p, and their probabilities.

    Returns:
        Token ids (None: all of them, in order) and probabilities, float32, whose sum need not be 1.
    """
    scaled = (scores / np.float32(params.temperature)).astype(np.float32, copy=False)
    tokens: NDArray[np.int64] | None = None
    if 0 < params.top_k < scaled.size:
        threshold = np.partition(scaled, -params.top_k)[-params.top_k]
        tokens = np.flatnonzero(scaled >= threshold)
        scaled = scaled[tokens]
    probabilities = np.exp(scaled - scaled.max())
    if params.top_p < 1.0:
        kept = _nucleus(probabilities, params.top_p)
        tokens = kept if tokens is None else tokens[kept]
        probabilities = probabilities[kept]
    if params.min_p > 0.0:
        likely = np.flatnonzero(probabilities >= params.min_p * probabilities.max())
        tokens = likely if tokens is None else tokens[likely]
        probabilities = probabilities[likely]
    return tokens, probabilities


def _nucleus(probabilities: NDArray[np.float32], top_p: float) -> NDArray[np.int64]:
    """Indices of the likeliest tokens that reach `top_p` of the sum together."""
    total = float(probabilities.sum(dtype=np.float64))
    # Those that are less likely than this could not make up the rest together, so they need not be sorted.
    index = np.flatnonzero(probabilities > (1.0 - top_p) * total / probabilities.size)
    order = index[np.argsort(-probabilities[index], kind="stable")]
    cumulative = np.cumsum(probabilities[order], dtype=np.float64)
    before = np.concatenate([[0.0], cumulative[:-1]])
    kept: NDArray[np.int64] = np.sort(order[before < top_p * total])
    return kept
