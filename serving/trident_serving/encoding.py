"""Texts to padded batches for an encoder: the tokenizer stage of an ensemble.

Batches are padded to one of a few lengths, the buckets, so that requests of similar length have the same
shape and Triton's dynamic batcher can join them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from trident_serving.errors import InvalidRequest


@dataclass(frozen=True)
class EncodingSettings:
    """The `parameters` of the tokenizer stage's config.pbtxt, which come from models.toml.

    Attributes:
        max_tokens: the longest input of the model, special tokens included.
        max_bytes: the longest text that is tokenized at all.
        buckets: lengths that batches are padded to, rising; the last is `max_tokens`.
        truncate: what happens to longer texts where the request does not say.
    """

    max_tokens: int
    max_bytes: int
    buckets: tuple[int, ...]
    truncate: bool

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> EncodingSettings:
        """Read the settings from a config's parameters.

        Raises:
            ValueError: one is missing or malformed.
        """
        missing = [field.name for field in fields(cls) if field.name not in parameters]
        if missing:
            raise ValueError(f"parameters {', '.join(missing)} are missing")
        if parameters["truncate"] not in ("true", "false"):
            raise ValueError(f"parameter truncate must be true or false, found {parameters['truncate']!r}")
        settings = cls(
            max_tokens=int(parameters["max_tokens"]),
            max_bytes=int(parameters["max_bytes"]),
            buckets=tuple(int(length) for length in parameters["buckets"].split(",")),
            truncate=parameters["truncate"] == "true",
        )
        if list(settings.buckets) != sorted(set(settings.buckets)) or settings.buckets[-1] != settings.max_tokens:
            raise ValueError(f"buckets must rise to max_tokens ({settings.max_tokens}), found {parameters['buckets']}")
        return settings


class TextEncoder:
    """A model's tokenizer with its limits."""

    def __init__(self, tokenizer: Tokenizer, settings: EncodingSettings) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        padding = tokenizer.padding or {}
        self._pad_id = int(padding.get("pad_id", 0))
        tokenizer.no_padding()
        tokenizer.no_truncation()

    @classmethod
    def load(cls, folder: Path, settings: EncodingSettings) -> TextEncoder:
        """Read `folder/tokenizer.json`; its padding entry names the padding token."""
        return cls(Tokenizer.from_file(str(folder / "tokenizer.json")), settings)

    def encode(
        self, texts: Sequence[str], *, truncate: bool | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Input ids and attention mask, int64 [texts, bucket], padded on the right.

        Args:
            truncate: cut longer texts to `max_tokens`; None takes the model's setting.

        Raises:
            InvalidRequest: a text is longer than the model takes, or gives no token at all.
        """
        encodings: list[Encoding] = self._tokenizer.encode_batch(list(texts))
        limit = self._settings.max_tokens
        if self._settings.truncate if truncate is None else truncate:
            encodings = [self._truncated(encoding, text) for encoding, text in zip(encodings, texts, strict=True)]
        for row, encoding in enumerate(encodings):
            field = "text_input" if len(texts) == 1 else f"text_input[{row}]"
            if len(encoding.ids) > limit:
                raise InvalidRequest(
                    f"{field} has {len(encoding.ids)} tokens, the model takes {limit}: shorten it, or set "
                    "truncate to use its beginning alone"
                )
            if sum(encoding.special_tokens_mask) == len(encoding.ids):
                raise InvalidRequest(f"{field} is empty: {texts[row][:80]!r} holds no token")
        width = self._bucket(max(len(encoding.ids) for encoding in encodings))
        input_ids = np.full((len(encodings), width), self._pad_id, np.int64)
        attention_mask = np.zeros((len(encodings), width), np.int64)
        for row, encoding in enumerate(encodings):
            input_ids[row, : len(encoding.ids)] = encoding.ids
            attention_mask[row, : len(encoding.ids)] = 1
        return input_ids, attention_mask

    def _truncated(self, encoding: Encoding, text: str) -> Encoding:
        if len(encoding.ids) <= self._settings.max_tokens:
            return encoding
        # Again, with the special tokens after the cut: the library's own truncation of a finished encoding
        # would cut the closing token off.
        self._tokenizer.enable_truncation(self._settings.max_tokens)
        try:
            return self._tokenizer.encode(text)
        finally:
            self._tokenizer.no_truncation()

    def _bucket(self, length: int) -> int:
        return self._settings.buckets[bisect_left(self._settings.buckets, length)]
