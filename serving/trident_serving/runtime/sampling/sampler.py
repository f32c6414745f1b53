"""From the logits of a sequence to its next token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from trident_serving.errors import BrokenModel, InvalidRequest
from trident_serving.runtime.sampling.candidates import NO_TOKEN, Candidates, Scores
from trident_serving.runtime.sampling.grammars import Mask
from trident_serving.runtime.sampling.params import SamplingParams
from trident_serving.runtime.sampling.processors import LogitsProcessor, filters, penalties, watermarks


class Sampler:
    """Chooses the tokens of one sequence, one call a token.

    Args:
        params: temperature and what filters the draw.
        tokens: the sequence so far.
        processors: what comes before the temperature.
    """

    def __init__(
        self, params: SamplingParams, tokens: Sequence[int], processors: Sequence[LogitsProcessor] = ()
    ) -> None:
        self._processors = [*processors, *filters(params), *watermarks(params)]
        self._tokens = np.array(tokens if self._processors else (), np.int64)
        self._random = None if params.greedy else np.random.Generator(np.random.PCG64(params.seed))

    @classmethod
    def causal(cls, params: SamplingParams, prompt_ids: Sequence[int], eos_token_ids: frozenset[int]) -> Sampler:
        """The sampler of a request of a causal model."""
        return cls(params, prompt_ids, penalties(params, len(prompt_ids), eos_token_ids))

    def choose(self, logits: Scores, mask: Mask | None = None) -> int:
        """The next token for `logits` (float32, [vocabulary]), which are left as they are.

        Args:
            mask: which tokens a grammar allows, bool [vocabulary].

        Raises:
            BrokenModel: the logits are no numbers.
            InvalidRequest: the grammar and the request's other fields leave no token.
        """
        likeliest = int(logits.argmax())
        if not math.isfinite(logits[likeliest]):  # argmax finds a NaN where there is one
            raise BrokenModel
        if mask is not None and (self._processors or not mask[likeliest]):
            logits = np.where(mask, logits, np.float32(-np.inf))
            likeliest = int(logits.argmax())
        token = self._choose(logits, likeliest) if self._processors else likeliest
        if mask is not None and not (token < len(mask) and mask[token]):
            raise InvalidRequest(NO_TOKEN)
        return token

    def guess(self, logits: Scores, ahead: Sequence[int]) -> int:
        """The likeliest token behind the sequence and some more tokens; none of them is taken.

        Args:
            logits: of another model that guesses, float32 [vocabulary].
        """
        candidates = Candidates(logits, int(logits.argmax()))
        tokens = np.append(self._tokens, np.array(ahead, np.int64)) if self._processors else self._tokens
        for process in self._processors:
            process(tokens, candidates)
        return candidates.likeliest()

    def _choose(self, logits: Scores, likeliest: int) -> int:
        candidates = Candidates(logits, likeliest)
        for process in self._processors:
            process(self._tokens, candidates)
        token = candidates.likeliest() if self._random is None else candidates.draw(self._random)
        self._tokens = np.append(self._tokens, token)
        return token
