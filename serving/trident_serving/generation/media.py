"""Tokens that stand for images, videos and sound, or around them, which a text must not hold.

Where such a token has no vectors of its own, a model computes a word that it has never read, or takes one image's
tokens for another's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from trident_serving.errors import InvalidRequest
from trident_serving.runtime.tokenizer import TextTokenizer

_CONFIGS = re.compile(r"(vision|visual|image|video|audio|speech)_config")
# `image_token_id`, `video_token_id`, `vision_start_token_id`, `boi_token_index` ("begin of image") and others.
_KEYS = re.compile(r"(\w*(?:image|img|video|vision|audio|speech|boi|eoi|boa|eoa)\w*)_token_(?:id|index)")
_AROUND = re.compile(r"start|begin|end|boi|eoi|boa|eoa")
# What no config names: rows and columns of tiles, `<global-img>`, `[IMG_BREAK]`, `<|vision_pad|>`.
_TEXTS = re.compile(r"image|img|video|vision|audio|<row_\d+_col_\d+>|tile_[xy]_|<\|patch\|>", re.IGNORECASE)


@dataclass(frozen=True)
class MediaTokens:
    """Those of one model.

    Attributes:
        texts: of each, by its id.
        around: ids of those that begin or end an image.
    """

    texts: Mapping[int, str] = field(default_factory=dict)
    around: frozenset[int] = frozenset()

    @classmethod
    def load(cls, folder: Path, tokenizer: TextTokenizer) -> MediaTokens:
        """Of a version folder; none where the model is one of texts only, whatever its tokenizer has.

        A model that is served by its text part has its whole config there.
        """
        file = folder / "config.json"
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if not any(_CONFIGS.fullmatch(key) and isinstance(value, dict) for key, value in config.items()):
            return cls()
        added = {token: each.content for token, each in tokenizer.backend.get_added_tokens_decoder().items()}
        keys = {key[1]: value for name, value in config.items() if (key := _KEYS.fullmatch(name))}
        named = {stem: value for stem, value in keys.items() if isinstance(value, int) and value in added}
        ids = {*named.values(), *(token for token, text in added.items() if _TEXTS.search(text))}
        around = frozenset(token for stem, token in named.items() if _AROUND.search(stem))
        return cls({token: added[token] for token in sorted(ids)}, around)

    @property
    def literals(self) -> str:
        """Their texts, for `ControlTokens`: in a message they are text."""
        return "\0".join(self.texts.values())

    def check_none(self, ids: Sequence[int]) -> None:
        """Refuse a prompt of a model that reads texts only.

        Raises:
            InvalidRequest: it has one of the tokens.
        """
        for token in ids if self.texts else ():
            if token in self.texts:
                raise InvalidRequest(
                    f"the prompt has the token {self.texts[token]}, a mark of images, videos or sound, and this model "
                    "is served by its text part: a text must not hold it"
                )

    def check_beside(self, ids: Sequence[int], token: int) -> None:
        """Refuse marks that are not at an image, where a chat template writes those around it.

        Args:
            token: the id of what stands for an image.

        Raises:
            InvalidRequest: there is one.
        """
        for place, found in enumerate(ids):
            if found == token or found not in self.texts:
                continue
            text, image = self.texts[found], self.texts[token]
            if found not in self.around:
                raise InvalidRequest(
                    f"the prompt has the token {text}, and only {image} stands for an image: a text must not hold it"
                )
            if token not in (*ids[max(place - 1, 0) : place], *ids[place + 1 : place + 2]):
                raise InvalidRequest(
                    f"the prompt has the token {text} away from {image}: a text must not hold it there"
                )

    def check_order(self, ids: Sequence[int], written: str) -> None:
        """Refuse marks that are not those of the images, where the server writes all of them.

        Args:
            written: what stands in the prompt for its images, one after the other.

        Raises:
            InvalidRequest: the prompt has others, or has them in another order.
        """
        longest_first = sorted(self.texts.values(), key=len, reverse=True)
        expected = re.findall("|".join(map(re.escape, longest_first)) or "(?!)", written)
        found = [self.texts[token] for token in ids if token in self.texts]
        if found == expected:
            return
        pairs = zip_longest(found, expected, fillvalue="")
        had, wanted = next(pair for pair in pairs if pair[0] != pair[1])
        said = f"has the token {had}" if had else "has no more tokens of images"
        raise InvalidRequest(
            f"the prompt {said} where its images have {wanted or 'none'}: a text must not hold tokens around images "
            "and their tiles, and input_ids must hold all of them"
        )


NO_MEDIA = MediaTokens()
