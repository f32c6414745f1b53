"""From the logits of a sequence to its next token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from trident_serving.errors import BrokenModel
from trident_serving.runtime.sampling.candidates import Candidates, Scores
from trident_serving.runtime.sampling.params import SamplingParams
from trident_serving.runtime.sampling.processors import LogitsProcessor, filters, penalties


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
        self._processors = [*processors, *filters(params)]
        self._tokens = np.array(tokens if self._processors else (), np.int64)
        self._random = None if params.greedy else np.random.Generator(np.random.PCG64(params.seed))

    @classmethod
    def causal(cls, params: SamplingParams, prompt_ids: Sequence[int], eos_token_ids: frozenset[int]) -> Sampler:
        """The sampler of a request of a causal model."""
        return cls(params, prompt_ids, penalties(params, len(prompt_ids), eos_token_ids))

    def choose(self, logits: Scores) -> int:
        """The next token for `logits` (float32, [vocabulary]), which are left as they are.

        Raises:
            BrokenModel: the logits are no numbers.
        """
        likeliest = int(logits.argmax())
        if not math.isfinite(logits[likeliest]):  # argmax finds a NaN where there is one
            raise BrokenModel
        if not self._processors:
            return likeliest
        candidates = Candidates(logits, likeliest)
        for process in self._processors:
            process(self._tokens, candidates)
        token = candidates.likeliest() if self._random is None else candidates.draw(self._random)
        self._tokens = np.append(self._tokens, token)
        return token
