"""What may come next where an answer has timestamps; transformers' `WhisperTimeStampLogitsProcessor`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trident_serving.runtime.sampling.candidates import Candidates, Ids


@dataclass(frozen=True)
class Timestamps:
    """Timestamps come in pairs and never go back; one comes where all of them together are likelier than any text.

    Attributes:
        first: the token of second 0, the last of the vocabulary's kinds.
        eos: the first token that is no text.
        prompt_length: tokens before the answer.
        max_initial: how many steps the first timestamp may be from the beginning; None: any.
    """

    first: int
    eos: int
    prompt_length: int
    max_initial: int | None = None

    def __call__(self, tokens: Ids, candidates: Candidates) -> None:
        """See `trident_serving.runtime.sampling.processors.LogitsProcessor`."""
        scores = candidates.writable()
        scores[self.first - 1] = -np.inf  # <|notimestamps|>
        answer = tokens[self.prompt_length :]
        timed = answer >= self.first
        last = bool(timed[-1:].any())
        pair = len(answer) < 2 or bool(timed[-2])
        if last and pair:
            scores[self.first :] = -np.inf
        elif last:
            scores[: self.eos] = -np.inf
        if timed.any():
            least = int(answer[timed][-1]) + (0 if last and not pair else 1)
            scores[self.first : least] = -np.inf
        if not len(answer):
            scores[: self.first] = -np.inf
            if self.max_initial is not None:
                scores[self.first + self.max_initial + 1 :] = -np.inf
        highest = scores[self.first :].max()
        if highest > -np.inf:
            together = highest + np.log(np.exp(scores[self.first :] - highest).sum())
            if together > scores[: self.first].max():
                scores[: self.first] = -np.inf
