"""What the fields of a request and of a generation config do to the candidates: one class each.

Meaning and order are those of the `transformers` processors of the same names. Presence and frequency penalties, which
transformers lacks, are those of the OpenAI API: counted over generated tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from trident_serving.runtime.sampling.candidates import Candidates, Ids
from trident_serving.runtime.sampling.params import SamplingParams
from trident_serving.runtime.sampling.watermark import Watermark

SMALLEST = 1e-9  # smaller divisors and shares choose the same tokens, but scores would overflow


class LogitsProcessor(Protocol):
    """One field's effect; it keeps nothing of a sequence, so one object serves every beam of a search."""

    def __call__(self, tokens: Ids, candidates: Candidates) -> None:
        """Change what may come after a sequence.

        Args:
            tokens: the sequence, int64 [length]: the prompt, or a decoder's start tokens, and what was generated.
            candidates: changed.
        """
        ...


@dataclass(frozen=True)
class RepetitionPenalty:
    """Divides the scores of tokens that the sequence has, or multiplies negative ones."""

    penalty: float

    def __call__(self, tokens: Ids, candidates: Candidates) -> None:
        """See `LogitsProcessor`."""
        scores = candidates.writable()
        values = scores[tokens]
        penalty = max(self.penalty, SMALLEST)
        scores[tokens] = np.where(values < 0, values * penalty, values / penalty)


@dataclass(frozen=True)
class LogitBias:
    """Adds numbers to the scores of tokens."""

    bias: tuple[tuple[int, float], ...]

    def __call__(self, tokens: Ids, candidates: Candidates) -> None:
        """See `LogitsProcessor`."""
        ids, values = zip(*self.bias, strict=True)
        candidates.writable()[list(ids)] += np.array(values, np.float32)


@dataclass(frozen=True)
class PresenceFrequencyPenalty:
    """Lowers the scores of generated tokens: once, and by how often they were generated."""

    presence: float
    frequency: float
    prompt_length: int

    def __call__(self, tokens: Ids, candidates: Candidates) -> None:
        """See `LogitsProcessor`."""
        if len(tokens) > self.prompt_length:
            generated, counts = np.unique(tokens[self.prompt_length :], return_counts=True)
            candidates.writable()[generated] -= self.presence + self.frequency * counts.astype(np.float32)


@dataclass(frozen=True)
class NoRepeatNGram:
    """No sequence of `size` tokens comes twice."""

    size: int

    def __call__(self, tokens: Ids, candidates: Candidates) -> None:
        """See `LogitsProcessor`."""
        if self.size <= len(tokens):
            grams = np.lib.stride_tricks.sliding_window_view(tokens, self.size)
            same = (grams[:, :-1] == tokens[len(tokens) - self.size + 1 :]).all(axis=1)
            candidates.forbid(grams[same, -1].tolist())


@dataclass(frozen=True)
class BadWords:
    """Sequences of tokens that never appear."""

    words: tuple[tuple[int, ...], ...]

    def __call__(self, tokens: Ids, candidates: Candidates) -> None:
        """See `LogitsProcessor`."""
        for *before, last in self.words:
            if not before or (len(before) <= len(tokens) and tokens[-len(before) :].tolist() == before):
                candidates.forbid([last])


@dataclass(frozen=True)
class MinLength:
    """The sequence does not end before it has `length` tokens."""

    length: int
    eos_token_ids: tuple[int, ...]

    def __call__(self, tokens: Ids, candidates: Candidates) -> None:
        """See `LogitsProcessor`."""
        if len(tokens) < self.length:
            candidates.forbid(self.eos_token_ids)


@dataclass(frozen=True)
class ForcedTokens:
    """Behind `length` tokens comes one of these: the first token of an answer, or the last of the longest."""

    length: int
    forced: tuple[int, ...]

    def __call__(self, tokens: Ids, candidates: Candidates) -> None:
        """See `LogitsProcessor`."""
        if len(tokens) == self.length:
            scores = candidates.writable()
            scores[:] = -np.inf
            scores[list(self.forced)] = 0.0


@dataclass(frozen=True)
class SuppressTokens:
    """Tokens that never appear; where `length` is given, not behind that many tokens."""

    suppressed: tuple[int, ...]
    length: int | None = None

    def __call__(self, tokens: Ids, candidates: Candidates) -> None:
        """See `LogitsProcessor`."""
        if self.length is None or len(tokens) == self.length:
            candidates.forbid(self.suppressed)


@dataclass(frozen=True)
class Temperature:
    """Divides the scores: above 1 spreads the choice."""

    temperature: float

    def __call__(self, tokens: Ids, candidates: Candidates) -> None:
        """See `LogitsProcessor`."""
        temperature = np.float32(max(self.temperature, SMALLEST))
        candidates.replace((candidates.scores / temperature).astype(np.float32, copy=False))


@dataclass(frozen=True)
class TopK:
    """The `k` likeliest tokens, and those as likely as the last of them."""

    k: int

    def __call__(self, tokens: Ids, candidates: Candidates) -> None:
        """See `LogitsProcessor`."""
        scores = candidates.scores
        if self.k < scores.size:
            candidates.keep(np.flatnonzero(scores >= np.partition(scores, -self.k)[-self.k]))


@dataclass(frozen=True)
class TopP:
    """The likeliest tokens that reach `mass` of the probability together (Holtzman et al., 2020)."""

    mass: float

    def __call__(self, tokens: Ids, candidates: Candidates) -> None:
        """See `LogitsProcessor`."""
        weights = candidates.weights
        total = float(weights.sum(dtype=np.float64))
        # Those that are less likely than this could not make up the rest together, so they need not be sorted.
        index = np.flatnonzero(weights >= (1.0 - self.mass) * total / weights.size)
        order = index[np.argsort(-weights[index], kind="stable")]
        cumulative = np.cumsum(weights[order], dtype=np.float64)
        before = np.concatenate([[0.0], cumulative[:-1]])
        candidates.keep(np.sort(order[before < self.mass * total]))


@dataclass(frozen=True)
class MinP:
    """Tokens with at least this share of the likeliest one's probability."""

    share: float

    def __call__(self, tokens: Ids, candidates: Candidates) -> None:
        """See `LogitsProcessor`."""
        weights = candidates.weights
        candidates.keep(np.flatnonzero(weights >= self.share * weights.max()))


@dataclass(frozen=True)
class TypicalP:
    """Tokens whose surprisal is nearest to the entropy, until they reach `mass` together (Meister et al., 2022)."""

    mass: float

    def __call__(self, tokens: Ids, candidates: Candidates) -> None:
        """See `LogitsProcessor`."""
        weights, scores = candidates.weights, candidates.scores
        total = float(weights.sum(dtype=np.float64))
        surprisal = np.float32(np.log(total)) + (scores.max() - scores)
        possible = weights > 0
        entropy = (weights[possible] * surprisal[possible]).sum(dtype=np.float64) / total
        distance = np.abs(surprisal - np.float32(entropy))
        # The tokens above this weight reach the mass, so none that is farther than the farthest of them is needed.
        enough = distance[weights >= (1.0 - self.mass) * total / weights.size].max()
        near = np.flatnonzero(distance <= enough)
        near = near[np.argsort(distance[near], kind="stable")]
        cumulative = np.cumsum(weights[near], dtype=np.float64)
        last = near[min(int(np.searchsorted(cumulative, self.mass * total)), near.size - 1)]
        candidates.keep(np.flatnonzero(distance <= distance[last]))


def penalties(params: SamplingParams, prompt_length: int, eos_token_ids: frozenset[int]) -> list[LogitsProcessor]:
    """What a request of a causal model and the model's defaults do to the scores; nothing for a field that is off.

    In the order of transformers' `_get_logits_processor`.
    """
    found: list[LogitsProcessor] = []
    defaults, ends = params.defaults, tuple(sorted(eos_token_ids))
    if params.logit_bias:
        found.append(LogitBias(params.logit_bias))
    if params.repetition_penalty != 1.0:
        found.append(RepetitionPenalty(params.repetition_penalty))
    if params.presence_penalty or params.frequency_penalty:
        found.append(PresenceFrequencyPenalty(params.presence_penalty, params.frequency_penalty, prompt_length))
    if defaults.no_repeat_ngram_size:
        found.append(NoRepeatNGram(defaults.no_repeat_ngram_size))
    if words := (*defaults.bad_words, *params.bad_words):
        found.append(BadWords(words))
    min_length = max(defaults.min_length, prompt_length + params.min_tokens)
    if min_length > prompt_length:
        found.append(MinLength(min_length, ends))
    if defaults.forced_bos_token_id is not None:
        found.append(ForcedTokens(1, (defaults.forced_bos_token_id,)))
    if defaults.forced_eos_token_ids:
        found.append(ForcedTokens(prompt_length + params.max_tokens - 1, defaults.forced_eos_token_ids))
    if defaults.suppress_tokens:
        found.append(SuppressTokens(defaults.suppress_tokens))
    if defaults.begin_suppress_tokens:
        first = prompt_length + (prompt_length == 1 and defaults.forced_bos_token_id is not None)
        found.append(SuppressTokens(defaults.begin_suppress_tokens, first))
    return found


@dataclass(frozen=True)
class WatermarkBias:
    """Raises the scores of the tokens that the watermark has behind the last one."""

    watermark: Watermark

    def __call__(self, tokens: Ids, candidates: Candidates) -> None:
        """See `LogitsProcessor`."""
        if len(tokens) == 0:
            return
        green = self.watermark.green(int(tokens[-1]))
        scores = candidates.writable()
        if candidates.ids is not None:
            green = np.flatnonzero(np.isin(candidates.ids, green))
        scores[green] += np.float32(self.watermark.bias)


def watermarks(params: SamplingParams) -> list[LogitsProcessor]:
    """What comes behind all filters, so that they choose as without it."""
    return [] if params.watermark is None else [WatermarkBias(params.watermark)]


def filters(params: SamplingParams) -> list[LogitsProcessor]:
    """Which tokens may be drawn, and how likely; nothing for a greedy request."""
    if params.greedy:
        return []
    found: list[LogitsProcessor] = [Temperature(params.temperature)]
    if params.top_k:
        found.append(TopK(params.top_k))
    if params.top_p < 1.0:
        found.append(TopP(max(params.top_p, SMALLEST)))  # 0: the likeliest token
    if params.min_p > 0.0:
        found.append(MinP(params.min_p))
    if params.typical_p < 1.0:
        found.append(TypicalP(params.typical_p))
    return found
