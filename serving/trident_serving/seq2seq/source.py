"""Text to source tokens and answer tokens to text, with languages, for every kind of tokenizer.

source.json       what surrounds a text, which languages there are and how they are asked for (`SourceSettings`)
tokenizer.json    of the source
target.json       of the target, where it is another
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from tokenizers import Tokenizer

from trident_serving.errors import InvalidRequest
from trident_serving.schema import reading
from trident_serving.schema.fields import LongInput
from trident_serving.text import knows_nothing

_SETTINGS = "source.json"
_SENTENCE = re.compile(r".+?(?:[.!?…]+[\"'”’)\]]*\s+|[。！？]+\s*|\n+|$)", re.DOTALL)
_CODE = re.compile(r">>(.+?)<<\s*")


class TargetStyle(StrEnum):
    """How a model is told the language of its answer."""

    FIXED = "fixed"
    """It has one."""
    FORCED_BOS = "forced_bos"
    """The first token of the answer is the language's."""
    TEXT_CODE = "text_code"
    """The source begins with the language's token, in a text as ">>code<<"."""


@dataclass(frozen=True)
class SourceSettings:
    """How a model's source is put together; `source.json`, which the export writes.

    Attributes:
        prefix: tokens before a text; `suffix` behind it.
        text_prefix: what goes before every text, as text ("summarize: ").
        source_surroundings: prefix and suffix by source language, for models that mark it.
        languages: the token of each language.
        source_lang: where the request names none; `target_lang` too.
        unk_token_id: of the tokenizer; None where it knows every text.
        piece_ids: the model's token of each of the tokenizer's, where they differ.
    """

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    text_prefix: str = ""
    source_surroundings: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    languages: Mapping[str, int] = field(default_factory=dict)
    target_style: TargetStyle = TargetStyle.FIXED
    source_lang: str = ""
    target_lang: str = ""
    unk_token_id: int | None = None
    piece_ids: tuple[int, ...] = ()

    @classmethod
    def load(cls, folder: Path) -> SourceSettings:
        """Read `folder/source.json`."""
        return reading.load(cls, folder / _SETTINGS)

    def save(self, folder: Path) -> None:
        """Write `folder/source.json`."""
        reading.save(self, folder / _SETTINGS)


@dataclass(frozen=True)
class Window:
    """A stretch of a text that the model reads at once.

    Attributes:
        ids: its tokens, with what surrounds them.
        separator: what stands between its answer and the one before.
    """

    ids: tuple[int, ...]
    separator: str = ""


class SourceText:
    """A model's tokenizers with what its sources look like.

    Args:
        max_tokens: the longest source, with what surrounds the text.
    """

    def __init__(self, source: Tokenizer, target: Tokenizer, settings: SourceSettings, max_tokens: int) -> None:
        self._source = source
        self._target = target
        self._settings = settings
        self._max_tokens = max_tokens
        for tokenizer in (source, target):
            tokenizer.no_padding()
            tokenizer.no_truncation()

    @classmethod
    def load(cls, folder: Path, max_tokens: int) -> SourceText:
        """Read a version folder."""
        source = Tokenizer.from_file(str(folder / "tokenizer.json"))
        target = folder / "target.json"
        return cls(
            source,
            Tokenizer.from_file(str(target)) if target.exists() else source,
            SourceSettings.load(folder),
            max_tokens,
        )

    def forced_bos(self, target_lang: str | None) -> int | None:
        """The first token of an answer, where the target's language is told by it.

        Raises:
            InvalidRequest: the language is not known, or the model has no choice of languages.
        """
        self._check_language("target_lang", target_lang)
        if self._settings.target_style is not TargetStyle.FORCED_BOS:
            return None
        chosen = target_lang or self._settings.target_lang
        return self._settings.languages[chosen] if chosen else None

    def windows(
        self, text: str, policy: LongInput, source_lang: str | None = None, target_lang: str | None = None
    ) -> list[Window]:
        """The source tokens of a text: one window, or several by the policy.

        Raises:
            InvalidRequest: the text is empty or too long, or a language is not known.
        """
        self._check_language("source_lang", source_lang)
        prefix, suffix, text = self._surroundings(text, source_lang, target_lang)
        room = self._max_tokens - len(prefix) - len(suffix) - len(self._ids(self._settings.text_prefix))
        ids = self._ids(self._settings.text_prefix + text)
        if not self._ids(text):
            raise InvalidRequest(f"text_input is empty: {text[:80]!r} holds no token")
        if knows_nothing(self._source.encode(text, add_special_tokens=False), self._settings.unk_token_id):
            raise InvalidRequest("text_input holds no token that the model's vocabulary knows")
        if len(ids) + len(prefix) + len(suffix) <= self._max_tokens:
            return [Window((*prefix, *ids, *suffix))]
        if policy is LongInput.TRUNCATE:
            return [Window((*prefix, *ids[: self._max_tokens - len(prefix) - len(suffix)], *suffix))]
        if policy is LongInput.WINDOW:
            chunks = list(self._packed(text, room))
            before = ["", *(chunk for chunk in chunks[:-1])]
            return [
                Window((*prefix, *self._ids(self._settings.text_prefix + chunk), *suffix), _separator(previous))
                for chunk, previous in zip(chunks, before, strict=True)
            ]
        raise InvalidRequest(
            f"text_input has {len(ids) + len(prefix) + len(suffix)} tokens, the model reads {self._max_tokens}: "
            'shorten it, or set long_input to "truncate" (only its beginning) or "window" (in parts)'
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of an answer, special tokens left out."""
        text: str = self._target.decode(list(tokens), skip_special_tokens=True)
        # SentencePiece writes a space where an answer begins; transformers strips it from those with own vocabularies.
        return text.strip() if self._settings.piece_ids else text

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._source.encode(text, add_special_tokens=False).ids
        return [self._settings.piece_ids[token] for token in ids] if self._settings.piece_ids else ids

    def _surroundings(
        self, text: str, source_lang: str | None, target_lang: str | None
    ) -> tuple[Sequence[int], Sequence[int], str]:
        settings = self._settings
        prefix, suffix = settings.prefix, settings.suffix
        chosen = source_lang or settings.source_lang
        if settings.source_surroundings and chosen:
            prefix, suffix = settings.source_surroundings[chosen]
        if settings.target_style is TargetStyle.TEXT_CODE:
            if found := _CODE.match(text):
                target_lang, text = found.group(1), text[found.end() :]
                self._check_language("target_lang", target_lang)
            code = target_lang or settings.target_lang
            prefix = (settings.languages[code], *prefix) if code else prefix
        return prefix, suffix, text

    def _check_language(self, field: str, language: str | None) -> None:
        settings = self._settings
        if language is None:
            return
        known: Sequence[str] = list(settings.languages)
        if field == "source_lang" and not settings.source_surroundings:
            known = []
        if field == "target_lang" and settings.target_style is TargetStyle.FIXED:
            known = []
        if language not in known:
            shown = ", ".join(known[:12]) + (f" and {len(known) - 12} more" if len(known) > 12 else "")
            raise InvalidRequest(
                f"{field} {language[:80]!r} is not known to this model; known: {shown or 'it has no choice'}"
            )

    def _packed(self, text: str, room: int) -> Iterator[str]:
        """Chunks of a text of `room` tokens at most, at ends of sentences where that is possible."""
        chunk = ""
        for sentence in _SENTENCE.findall(text):
            if chunk and len(self._ids(chunk + sentence)) > room:
                yield chunk
                chunk = ""
            chunk += sentence
            while len(self._ids(chunk)) > room:
                cut = self._source.encode(chunk, add_special_tokens=False).offsets[room][0]
                space = chunk.rfind(" ", 0, cut)
                cut = space + 1 if space > 0 else cut
                yield chunk[:cut]
                chunk = chunk[cut:]
        if chunk.strip():
            yield chunk


def _separator(before: str) -> str:
    """What stands between two answers, by how the first's source ends."""
    if before.endswith("\n"):
        return "\n"
    return " " if before[-1:].isspace() else ""
