"""Tokens to text, chunk by chunk, never breaking a character.

A token may end in the middle of a character (an emoji is four bytes), and some tokenizers drop a leading
space. So a short window of tokens is decoded again each time, and its text is handed out only when it does
not end in U+FFFD, the mark of an unfinished character. What remains at the end is handed out as it is.

Streamed or not, an answer's text is made here, so both are the same. It equals the tokenizer's decoding of
all tokens at once, but for byte-fallback tokenizers on invalid UTF-8, which they spoil back to the start of
the run of bytes.
"""

from __future__ import annotations

from trident_serving.runtime.tokenizer import Codec

_UNFINISHED = "\ufffd"


class Detokenizer:
    """The text of one answer."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._ids: list[int] = []
        # Tokens before `_read` have been handed out; those from `_start` on give them their context.
        self._start = 0
        self._read = 0

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
        known = self._codec.decode(self._ids[self._start : self._read])
        return self._codec.decode(self._ids[self._start :])[len(known) :]
