"""The bytes that tokens stand for: they join to the text, whatever the vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models

from tests import tiny_models
from trident_serving.runtime.tokenizer import TextTokenizer

TEXT = "The cat 😀 sat\ton the  mat — ünïcödé"


def test_byte_level() -> None:
    tokenizer = TextTokenizer(tiny_models.byte_level_tokenizer().backend_tokenizer)
    ids = tokenizer.encode(TEXT)
    assert b"".join(map(tokenizer.token_bytes, ids)) == TEXT.encode()
    every = [tokenizer.token_bytes(token) for token in range(tokenizer.backend.get_vocab_size())]
    assert {bytes([byte]) for byte in range(256)} <= set(every)
    assert tokenizer.token_bytes(0) == b"<|end|>"
    assert tokenizer.token_bytes(10**6) == b""


@pytest.mark.parametrize(
    ("token", "right"),
    [("▁cat", b" cat"), ("<0xF0>", b"\xf0"), ("<0x>", b"<0x>"), ("é", "é".encode()), ("<s>", b"<s>")],
)
def test_sentencepiece(token: str, right: bytes) -> None:
    model: Any = models.BPE({token: 0, "a": 1}, [], byte_fallback=True)
    backend = Tokenizer(model)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    assert TextTokenizer(backend).token_bytes(0) == right
