"""An answer's text as what its responses carry: the text itself, the reasoning, and calls as chat APIs have them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from trident_serving.generation.parsing import AnswerParser, CallArguments, CallName, Part, Reasoning, Text, merged

_ID_CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID_LENGTH = 9  # Mistral's templates take no other


class AnswerParts:
    """Collects the parts of one answer between two responses.

    Args:
        parser: parts the text.
        marks: special tokens that the parser knows, by their ids.
        prompt_ids: the ids of calls come from them, so that an answer that is given again has the same ones.
        calls: whether responses tell calls.
        reasoning: whether they tell the reasoning.
    """

    def __init__(
        self,
        parser: AnswerParser,
        marks: Mapping[int, str],
        prompt_ids: Sequence[int],
        *,
        calls: bool,
        reasoning: bool,
    ) -> None:
        self.marks = marks
        self._parser = parser
        self._prompt_ids = prompt_ids
        self._calls, self._reasoning = calls, reasoning
        self._parts: list[Part] = []

    @property
    def waiting(self) -> bool:
        """Whether there is something to tell besides text."""
        return bool(self._parts)

    def push(self, text: str) -> str:
        """Take more of the answer; returns what of it is text."""
        return self._kept(self._parser.push(text))

    def finish(self) -> str:
        """The answer is complete; returns the rest of its text."""
        return self._kept(self._parser.finish())

    def take(self) -> tuple[str | None, str | None]:
        """Reasoning, and calls as JSON, since the last response; None for what was not asked for."""
        parts, self._parts = merged(self._parts), []
        reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
        calls: dict[int, dict[str, Any]] = {}
        for part in parts:
            if isinstance(part, CallName):
                calls[part.index] = {
                    "index": part.index,
                    "id": self._id(part.index),
                    "type": "function",
                    "function": {"name": part.name, "arguments": ""},
                }
            elif isinstance(part, CallArguments):
                call = calls.setdefault(part.index, {"index": part.index, "function": {"arguments": ""}})
                call["function"]["arguments"] += part.text
        told = json.dumps(list(calls.values()), ensure_ascii=False) if self._calls else None
        return reasoning if self._reasoning else None, told

    def _kept(self, parts: Sequence[Part]) -> str:
        self._parts += [part for part in parts if not isinstance(part, Text)]
        return "".join(part.text for part in parts if isinstance(part, Text))

    def _id(self, index: int) -> str:
        digest = hashlib.sha256(repr((tuple(self._prompt_ids), index)).encode()).digest()
        return "".join(_ID_CHARACTERS[byte % len(_ID_CHARACTERS)] for byte in digest[:_ID_LENGTH])
