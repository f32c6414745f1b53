"""The search of a window's answer, with what the model says behind the start token alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from trident_serving.runtime.log_probabilities import log_softmax
from trident_serving.runtime.sampling.candidates import Scores
from trident_serving.seq2seq.search import Found, Search
from trident_serving.speech.settings import DETECTED


class SpokenSearch:
    """A search that hears the language before it begins; see `trident_serving.seq2seq.search.Search`.

    Args:
        prompt: tokens before the answer; `DETECTED` in it becomes the likeliest language.
        languages: their tokens.
        no_speech: the token of silence.
        begin: the search behind the whole prompt.
        told: called after a step with the tokens of the answer so far; only where it has one beam, and not with an
            answer that is complete.

    Attributes:
        done: see `Search`.
        prompt: as it was read.
        no_speech_probability: that nobody speaks.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        languages: Sequence[int],
        no_speech: int,
        begin: Callable[[Sequence[int]], Search],
        told: Callable[[Sequence[int]], None] | None = None,
    ) -> None:
        self.prompt = list(prompt)
        self.no_speech_probability = 0.0
        self._languages = list(languages)
        self._no_speech = no_speech
        self._begin = begin
        # Its prompt may still change, its number of rows does not.
        self._search = begin(self.prompt)
        self._heard = False
        self._told = told if self._search.rows == 1 else None
        self.done = False

    @property
    def rows(self) -> int:
        """See `Search.rows`."""
        return self._search.rows

    @property
    def next_tokens(self) -> list[int]:
        """See `Search.next_tokens`."""
        return self._search.next_tokens

    @property
    def position(self) -> int:
        """See `Search.position`."""
        return self._search.position

    @property
    def tokens(self) -> Sequence[Sequence[int]]:
        """See `Search.tokens`."""
        return self._search.tokens

    def advance(self, logits: Scores) -> list[int]:
        """See `Search.advance`."""
        if not self._heard:
            self._heard = True
            self.no_speech_probability = float(np.exp(log_softmax(logits[:1])[0, self._no_speech]))
            if DETECTED in self.prompt:
                language = self._languages[int(logits[0, self._languages].argmax())]
                self.prompt = [language if token == DETECTED else token for token in self.prompt]
                self._search = self._begin(self.prompt)
        parents = self._search.advance(logits)
        self.done = self._search.done
        if self._told is not None and not self.done:
            self._told(self._search.tokens[0])
        return parents

    def found(self) -> Found:
        """See `Search.found`."""
        return self._search.found()
