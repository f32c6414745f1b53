"""What may come next: the logits processors of transformers that encoder-decoder models use.

Order and meaning are those of transformers' `_get_logits_processor`; sequences include the decoder's start token.
Beam search applies them to log-probabilities, greedy search and sampling to logits, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Rules:
    """The rules of one request.

    Attributes:
        max_length: of a sequence, start tokens included.
        min_length: before it, no sequence ends.
        prompt_length: start tokens; `min_new_tokens` counts from behind them.
        repetition_penalty: divides the score of tokens that are there already, or multiplies a negative one.
        no_repeat_ngram_size: no n-gram of this size comes twice; 0: off.
        bad_words: sequences of tokens that never appear.
        forced_bos_token_id: the first token behind a single start token.
        forced_eos_token_id: the last token of a sequence of `max_length`.
        suppress_tokens: never appear; `begin_suppress_tokens` not as the first.
    """

    max_length: int
    min_length: int = 0
    min_new_tokens: int = 0
    prompt_length: int = 1
    eos_token_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_ids: tuple[int, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()

    def apply(self, sequences: Ids, scores: Scores) -> Scores:
        """Scores [rows, vocabulary] of what follows sequences [rows, length]; those given are left as they are."""
        scores = scores.copy()
        length = sequences.shape[1]
        for row, sequence in zip(scores, sequences, strict=True):
            self._repeated(row, sequence)
        ends = list(self.eos_token_ids)
        if length < self.min_length or length - self.prompt_length < self.min_new_tokens:
            scores[:, ends] = -np.inf
        if self.forced_bos_token_id is not None and length == 1:
            _force(scores, [self.forced_bos_token_id])
        if self.forced_eos_token_ids and length == self.max_length - 1:
            _force(scores, self.forced_eos_token_ids)
        if self.suppress_tokens:
            scores[:, list(self.suppress_tokens)] = -np.inf
        if self.begin_suppress_tokens:
            first = 1 if self.forced_bos_token_id is None else 2
            if length == max(self.prompt_length, first):
                scores[:, list(self.begin_suppress_tokens)] = -np.inf
        return scores

    def _repeated(self, row: Scores, sequence: Ids) -> None:
        if self.repetition_penalty != 1.0:
            seen = np.unique(sequence)
            values = row[seen]
            row[seen] = np.where(values < 0, values * self.repetition_penalty, values / self.repetition_penalty)
        size = self.no_repeat_ngram_size
        if 0 < size <= len(sequence):
            grams = np.lib.stride_tricks.sliding_window_view(sequence, size)
            same = (grams[:, :-1] == sequence[len(sequence) - size + 1 :]).all(axis=1)
            row[grams[same, -1]] = -np.inf
        for word in self.bad_words:
            *before, last = word
            if not before or (len(before) <= len(sequence) and list(sequence[-len(before) :]) == before):
                row[last] = -np.inf


def _force(scores: Scores, tokens: Sequence[int]) -> None:
    scores[:] = -np.inf
    scores[:, list(tokens)] = 0.0
