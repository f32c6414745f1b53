"""The model's own tokenizer, read from tokenizer.json, as the `tokenizers` library writes it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # of a SentencePiece vocabulary that falls back to bytes


def _byte_alphabet() -> dict[str, bytes]:
    """The characters with which byte-level vocabularies write bytes: those that can be seen are themselves."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(0x100) if byte not in seen]
    pairs = [*((chr(byte), byte) for byte in seen), *((chr(0x100 + at), byte) for at, byte in enumerate(unseen))]
    return {character: bytes([byte]) for character, byte in pairs}


_BYTES = _byte_alphabet()


class Codec(Protocol):
    """What the engine's text side needs of a tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Text to token ids."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Token ids to text."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes of text that a token stands for, perhaps a part of a character."""
        ...


class TextTokenizer:
    """A `tokenizers.Tokenizer` with what generation needs around it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._spelled: dict[int, bytes] = {}

    @property
    def backend(self) -> Tokenizer:
        """The library's tokenizer."""
        return self._tokenizer

    @classmethod
    def load(cls, folder: Path) -> TextTokenizer:
        """Read `folder/tokenizer.json`."""
        return cls(Tokenizer.from_file(str(folder / "tokenizer.json")))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Text to token ids."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Token ids to text."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token: int) -> bytes:
        """The bytes of text that a token stands for, perhaps a part of a character; b"" if the vocabulary lacks it."""
        found = self._spelled.get(token)
        if found is None:
            found = self._spelled[token] = self._spell(token)
        return found

    def _spell(self, token: int) -> bytes:
        text = self._tokenizer.id_to_token(token)
        if text is None:
            return b""
        if token in self._tokenizer.get_added_tokens_decoder():
            return bytes(text, "utf-8")
        if self._byte_level:
            return b"".join(_BYTES[each] if each in _BYTES else each.encode("utf-8") for each in text)
        if _BYTE_TOKEN.fullmatch(text):
            return bytes([int(text[3:5], 16)])
        return bytes(text.replace("\u2581", " "), "utf-8")  # SentencePiece's space

    @cached_property
    def _byte_level(self) -> bool:
        """Whether a token is written with one character for each byte."""
        return '"ByteLevel"' in json.dumps(json.loads(self._tokenizer.to_str())["decoder"])

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Tokens that no text of an answer shows, by their own texts."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    @cached_property
    def longest_token_bytes(self) -> int | None:
        """No token stands for more bytes of text than this; None where the tokenizer gives no such bound.

        It holds where the tokenizer keeps every byte: byte-level models, which a normalizer or an
        unknown token of any length would break.
        """
        state = json.loads(self._tokenizer.to_str())
        pre_tokenizer = json.dumps(state["pre_tokenizer"])
        normalizers = (state["normalizer"] or {}).get("normalizers", [state["normalizer"]])
        if '"ByteLevel"' not in pre_tokenizer or any(normalizers):
            return None
        # A byte-level vocabulary writes one character for each byte; added tokens are written as they are.
        learned = max(len(token) for token in self._tokenizer.get_vocab(with_added_tokens=False))
        added = [len(token.content.encode()) for token in self._tokenizer.get_added_tokens_decoder().values()]
        return max(learned, *added) if added else learned
