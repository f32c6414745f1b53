"""Tokens to text, chunk by chunk, never breaking a character.

A token may end in the middle of a character (an emoji is four bytes), and some tokenizers drop a leading
space. So a short window of tokens is decoded again each time, and its text is handed out only when it does
not end in U+FFFD, the mark of an unfinished character. What remains at the end is handed out as it is.

An answer goes on from its prompt, so the window begins with the prompt's last tokens: SentencePiece's tokenizers drop
a space at the beginning of what they decode, and an answer that stood alone would lose its first one.

Streamed or not, an answer's text is made here, so both are the same. It equals what the tokenizer's decoding of
prompt and answer at once has beyond that of the prompt, as transformers' pipeline shows it, but for byte-fallback
tokenizers on invalid UTF-8, which they spoil back to the start of the run of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from trident_serving.runtime.tokenizer import Codec

_UNFINISHED = "\ufffd"
# Tokens of the prompt that an answer's first ones are decoded with; more, where these have no text of their own.
_CONTEXT = 4


class Detokenizer:
    """The text of one answer.

    Args:
        prompt_ids: the tokens that it goes on from.
        skip_special_tokens: whether they are left out.
    """

    def __init__(self, codec: Codec, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> None:
        self._decode = partial(codec.decode, skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = list(_context(codec, prompt_ids))
        # Tokens before `_read` have been handed out; those from `_start` on give them their context.
        self._start = 0
        self._read = len(self._ids)

    def push(self, token: int) -> str:
        """Add a token; returns the text that became certain, often none."""
        self._ids.append(token)
        chunk = self._pending()
        if not chunk or chunk.endswith(_UNFINISHED):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return chunk

    def flush(self) -> str:
        """The rest, unfinished characters included."""
        chunk = self._pending()
        self._start = self._read = len(self._ids)
        return chunk

    def _pending(self) -> str:
        known = self._decode(self._ids[self._start : self._read])
        return self._decode(self._ids[self._start :])[len(known) :]


def _context(codec: Codec, prompt_ids: Sequence[int]) -> Sequence[int]:
    """The last tokens of a prompt, from the beginning of a character on, with a text that is more than a space."""
    count = _CONTEXT
    while count < len(prompt_ids):
        text = codec.decode(prompt_ids[-count:])
        if text.strip() and not text.startswith(_UNFINISHED):
            break
        count *= 2
    return prompt_ids[-count:]
