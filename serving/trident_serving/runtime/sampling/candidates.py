"""The tokens that may come next, with their scores, as processors leave them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trident_serving.errors import InvalidRequest

NO_TOKEN = "the grammar and the request's other fields leave no token"
Scores = NDArray[np.float32]
Ids = NDArray[np.int64]


class Candidates:
    """At first the whole vocabulary with the model's scores.

    The scores are copied when a processor first writes to them, and not at all where it only forbids tokens that would
    not be chosen anyway.

    Args:
        scores: float32 [vocabulary].
        likeliest: the index of the largest, where it is known.
        in_place: whether `scores` itself is written to.

    Attributes:
        ids: of the tokens that are left, in ascending order; None: the whole vocabulary.
    """

    def __init__(self, scores: Scores, likeliest: int | None = None, *, in_place: bool = False) -> None:
        self.ids: Ids | None = None
        self._scores = scores
        self._likeliest = likeliest
        self._writable = in_place
        self._forbidden: list[int] = []
        self._weights: Scores | None = None

    @property
    def scores(self) -> Scores:
        """Of each token that is left, float32; to read."""
        return self.writable() if self._forbidden else self._scores

    def writable(self) -> Scores:
        """The same, to write to."""
        if not self._writable:
            self.replace(self._scores.copy())
        self._likeliest = self._weights = None
        return self._scores

    def replace(self, scores: Scores) -> None:
        """Give each token that is left another score; the array is taken over."""
        forbidden, self._forbidden = self._forbidden, []
        self._scores, self._writable, self._likeliest = scores, True, None
        self._scores[forbidden] = -np.inf

    def forbid(self, tokens: Sequence[int]) -> None:
        """Give tokens the score minus infinity, while the whole vocabulary is left."""
        if self._writable:
            self.writable()[list(tokens)] = -np.inf
        else:
            self._forbidden += tokens

    @property
    def weights(self) -> Scores:
        """Of each token that is left, float32: its probability in proportion to the likeliest, which had 1.

        Raises:
            InvalidRequest: every token is forbidden.
        """
        if self._weights is None:
            highest = self.scores.max()
            if highest == -np.inf:
                raise InvalidRequest(NO_TOKEN)
            self._weights = np.exp(self.scores - highest)
        return self._weights

    def keep(self, indices: Ids) -> None:
        """Leave out all tokens but those at these indices."""
        self.ids = indices if self.ids is None else self.ids[indices]
        if self._weights is not None:
            self._weights = self._weights[indices]
        self.replace(self.scores[indices])

    def likeliest(self) -> int:
        """The token with the largest score, the first of equal ones."""
        if self._likeliest is not None and self._likeliest not in self._forbidden:
            return self._likeliest
        return self._token(int(self.scores.argmax()))

    def draw(self, random: np.random.Generator) -> int:
        """A token, each with the chance that its weight gives; takes one random number, whatever is left."""
        cumulative = np.cumsum(self.weights, dtype=np.float64)
        # Scaled by the sum that was reached, so that rounding never points beyond the last token.
        return self._token(int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right")))

    def _token(self, index: int) -> int:
        return index if self.ids is None else int(self.ids[index])
