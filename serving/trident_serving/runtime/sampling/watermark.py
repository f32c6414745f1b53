"""Watermarks by green lists (Kirchenbauer et al., 2023): behind each token a part of the vocabulary is made likelier.

Which part follows from a key and the token before it, so whoever has the key can count how many tokens of a text are
on their list. The lists are those of transformers' `WatermarkLogitsProcessor` with the seeding scheme `lefthash`: the
first tokens of a permutation that torch draws on a CPU. Here the same Mersenne Twister draws, without torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trident_serving.errors import InvalidRequest

HASHING_KEY = 15485863  # transformers' default, the millionth prime
KEPT_LISTS = 256
_SEEDS = 2**64 - 1
_KNOWN = ("greenlist_ratio", "bias", "hashing_key", "seeding_scheme", "context_width")


@dataclass(frozen=True)
class Watermark:
    """How an answer is marked.

    Attributes:
        vocabulary_size: tokens of the model.
        greenlist_ratio: share of the vocabulary that is made likelier.
        bias: what is added to its logits.
        hashing_key: whoever has it can detect the mark, and make it.
    """

    vocabulary_size: int
    greenlist_ratio: float = 0.25
    bias: float = 2.0
    hashing_key: int = HASHING_KEY

    @classmethod
    def from_config(cls, config: Mapping[str, Any], vocabulary_size: int) -> Watermark:
        """From the keys of transformers' `WatermarkingConfig`.

        Raises:
            InvalidRequest: a key is unknown, or its value is impossible.
        """
        if unknown := sorted(set(config) - set(_KNOWN)):
            raise InvalidRequest(f"watermarking_config has no {unknown[0][:80]!r}; known are {', '.join(_KNOWN)}")
        scheme, width = config.get("seeding_scheme", "lefthash"), config.get("context_width", 1)
        if scheme != "lefthash":
            raise InvalidRequest(
                f"watermarking_config.seeding_scheme can only be 'lefthash', found {str(scheme)[:80]!r}"
            )
        if type(width) is not int or width != 1:
            raise InvalidRequest(f"watermarking_config.context_width can only be 1, found {str(width)[:80]}")
        ratio, bias = (_number(config, name, default) for name, default in (("greenlist_ratio", 0.25), ("bias", 2.0)))
        if not 0 < ratio < 1:
            raise InvalidRequest(f"watermarking_config.greenlist_ratio must be above 0 and below 1, found {ratio:g}")
        if not 0 <= bias <= 100:
            raise InvalidRequest(f"watermarking_config.bias must be between 0 and 100, found {bias:g}")
        key = config.get("hashing_key", HASHING_KEY)
        if type(key) is not int or not 0 < key < 2**63:
            raise InvalidRequest(
                f"watermarking_config.hashing_key must be between 1 and 2**63 - 1, found {str(key)[:80]}"
            )
        return cls(vocabulary_size, ratio, bias, key)

    def green(self, token: int) -> NDArray[np.int64]:
        """The tokens that are made likelier behind a token; to read."""
        size = int(self.vocabulary_size * self.greenlist_ratio)
        return _first_of_permutation(self.hashing_key * token % _SEEDS % 2**32, self.vocabulary_size, size)


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRequest(f"watermarking_config.{name} must be a number, found {str(value)[:80]}")
    return float(value)


@lru_cache(KEPT_LISTS)
def _first_of_permutation(seed: int, size: int, count: int) -> NDArray[np.int64]:
    """The first elements of `torch.randperm(size)` with a seed.

    torch swaps each place with a later one that it draws. Here all draws come first, and what a place holds is found
    by the last swap before that had it as its target. So a few sorts take the place of a loop.
    """
    count = min(count, size - 1)
    places = np.arange(count)
    draws = np.random.RandomState(seed).randint(0, 2**32, size=count, dtype=np.uint32)
    targets = places + draws.astype(np.int64) % (size - places)
    order = np.argsort(targets, kind="stable")
    ordered = targets[order]
    before = np.full(count, -1)  # for each swap, the last one before it with the same target
    same = ordered[1:] == ordered[:-1]
    before[order[1:][same]] = order[:-1][same]
    last = np.searchsorted(ordered, places, side="right") - 1
    aimed = (last >= 0) & (ordered[last] == places)
    # For each place, the last swap before its own that had it as its target.
    source = np.where(aimed, order[last], -1)
    source = np.where(source == places, before, source)
    roots = np.where(source >= 0, source, places)
    while not np.array_equal(further := roots[roots], roots):
        roots = further
    found: NDArray[np.int64] = np.where(before >= 0, roots[before], targets)
    found.flags.writeable = False
    return found


@dataclass(frozen=True)
class Detection:
    """How many tokens of a text are on their green lists.

    Attributes:
        scored: tokens that have one before them.
        green: those of them on its list.
        z_score: how far that is from what texts without the mark have, in standard deviations.
        p_value: how probable a z-score as high is for such a text.
    """

    scored: int
    green: int
    z_score: float
    p_value: float


def detect(tokens: Sequence[int], watermark: Watermark, *, unique: bool = False) -> Detection:
    """Look for a watermark; the z-score is that of transformers' `WatermarkDetector`.

    Args:
        tokens: of the text, without those of the prompt.
        unique: count each pair of neighbours once, so that repetition counts for nothing.

    Raises:
        InvalidRequest: there are fewer than two tokens, or one is not the model's.
    """
    if len(tokens) < 2:
        raise InvalidRequest(f"a watermark needs two tokens at least, found {len(tokens)}")
    for token in (min(tokens), max(tokens)):
        if not 0 <= token < watermark.vocabulary_size:
            raise InvalidRequest(f"the text has the token {token}, the model has {watermark.vocabulary_size}")
    pairs = Counter(pairwise(tokens))
    lists: dict[int, frozenset[int]] = {}
    for token, _ in pairs:
        if token not in lists:
            lists[token] = frozenset(watermark.green(token).tolist())
    counts = {pair: 1 if unique else count for pair, count in pairs.items()}
    scored = sum(counts.values())
    green = sum(count for (before, token), count in counts.items() if token in lists[before])
    ratio = watermark.greenlist_ratio
    z_score = (green - ratio * scored) / math.sqrt(scored * ratio * (1 - ratio))
    return Detection(scored, green, z_score, 0.5 * math.erfc(z_score / math.sqrt(2)))
