"""What greedy answers of one model said, for the drafts of later ones: a ring of tokens with an index of n-grams.

A proposal is what followed the sequence's latest `SIZE` tokens in the latest answer that has them. It is verified as
every draft is: the pool changes when an answer is there, never what it says. An answer is kept when it ends, with the
last tokens of its prompt, from which its beginning is found. The rest of the prompt is not kept: a document that comes
again is drafted from the sequence itself.

Memory is fixed: 20 bytes for each token of the ring, index included. The oldest tokens are overwritten, and of two
n-grams with the same entry of the index the later one stays. Used by the engine's thread only.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

SIZE = 8  # tokens that must be equal: own text needs fewer, since it is about the same thing
TOKENS = 2**17  # of the ring: 2.5 MiB with the index
END = -1  # stands in the ring behind each answer


class NgramPool:
    """Tokens of answers, and where each n-gram was seen last.

    Args:
        tokens: that the ring holds.
    """

    def __init__(self, tokens: int = TOKENS) -> None:
        self._ring = array("i", [END]) * tokens
        # By hash: the position behind the n-gram, counted over all that was ever added.
        self._ends = array("q", [0]) * (2 * tokens)
        self._written = 0

    def add(self, tokens: Sequence[int], prompt_length: int) -> None:
        """Keep the answer of a sequence.

        Args:
            tokens: of the prompt and the answer.
            prompt_length: how many of them are the prompt.
        """
        capacity = len(self._ring)
        if len(tokens) == prompt_length:
            return
        first = max(0, prompt_length - SIZE, len(tokens) - capacity + 1)
        kept = [*tokens[first:], END]
        for offset, token in enumerate(kept):
            position = self._written + offset
            if offset >= SIZE and token != END:
                self._ends[hash(tuple(kept[offset - SIZE : offset])) % len(self._ends)] = position
            self._ring[position % capacity] = token
        self._written += len(kept)

    def draft(self, tokens: Sequence[int], length: int) -> list[int]:
        """Up to `length` tokens that followed the latest tokens in another answer."""
        if len(tokens) < SIZE:
            return []
        capacity = len(self._ring)
        latest = tuple(tokens[-SIZE:])
        end = self._ends[hash(latest) % len(self._ends)]
        start = end - SIZE
        if start < max(0, self._written - capacity):  # nothing was found, or it is overwritten
            return []
        if any(self._ring[(start + index) % capacity] != token for index, token in enumerate(latest)):
            return []
        found: list[int] = []
        for position in range(end, min(end + length, self._written)):
            token = self._ring[position % capacity]
            if token == END:
                break
            found.append(token)
        return found
