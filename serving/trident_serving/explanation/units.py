"""What is hidden at a time: words, sentences or tokens of a text, as spans of characters."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from trident_serving.errors import InvalidRequest

# Behind a sentence, or a line.
_END = re.compile(r"(?<=[.!?…])[\"'”’»)\]]*\s+|[。！？]+|\n+")
_CHUNK = re.compile(r"\S+")
# Chinese and Japanese characters: words are not parted there, so that each is one.
_UNPARTED = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_JOINERS = "'’-_."  # inside of a word or a number


class By(StrEnum):
    """What a unit is."""

    WORD = "word"
    SENTENCE = "sentence"
    TOKEN = "token"


class Span(NamedTuple):
    """Characters of one of the texts that a model reads, [start, end).

    Attributes:
        part: the text, by its name in a request: `text_input`, `context`, ...
    """

    part: str
    start: int
    end: int

    def touches(self, other: Span) -> bool:
        """Whether two spans share a character."""
        return self.part == other.part and self.start < other.end and other.start < self.end


@dataclass(frozen=True)
class Attribution:
    """A unit, and what the score loses without it; below 0: the score is higher without it."""

    text: str
    part: str
    start: int
    end: int
    value: float


@dataclass(frozen=True)
class Explanation:
    """What one statement of a model rests on.

    Attributes:
        model: its public name.
        of: the statement: a label, an entity, an answer.
        score: of the whole text; what attributions are differences of.
        measure: what the score is.
        by: what a unit is.
        hidden: how units are hidden: "masked" or "removed".
        texts: what the model read, by the names of a request.
        attributions: in the order of the texts.
    """

    model: str
    task: str
    of: str
    score: float
    measure: str
    by: str
    hidden: str
    texts: dict[str, str]
    attributions: tuple[Attribution, ...]


def check_work(runs: int, most: int | None) -> None:
    """Refuse an explanation that takes too much work.

    Args:
        runs: texts that the model reads for it.
        most: how many it may be; None: any.

    Raises:
        InvalidRequest: they are more.
    """
    if most is not None and runs > most:
        raise InvalidRequest(
            f"text_input makes {runs} texts without one of its parts, the limit is {most}: shorten it, or hide larger "
            "parts (by sentence)"
        )


def units(part: str, text: str, by: By, tokens: Iterable[Span]) -> list[Span]:
    """The units of a text that hold a token, in its order.

    Args:
        tokens: of all texts that the model reads; one that has no characters is part of no unit.
    """
    own = sorted({token for token in tokens if token.part == part and token.start < token.end})
    if by is By.TOKEN:
        return own
    found = words(text) if by is By.WORD else sentences(text)
    spans = [Span(part, start, end) for start, end in found]
    return [span for span in spans if any(span.touches(token) for token in own)]


def words(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each word, and of each mark of punctuation; characters of Chinese and Japanese are words."""
    for chunk in _CHUNK.finditer(text):
        start = chunk.start()
        for at in range(chunk.start(), chunk.end()):
            if _alone(text, at):
                if start < at:
                    yield start, at
                yield at, at + 1
                start = at + 1
        if start < chunk.end():
            yield start, chunk.end()


def _alone(text: str, at: int) -> bool:
    if _UNPARTED.match(text[at]):
        return True
    if unicodedata.category(text[at])[0] not in "PS":
        return False
    beside = text[at - 1 : at], text[at + 1 : at + 2]
    return not (text[at] in _JOINERS and at > 0 and all(each.isalnum() for each in beside))


def sentences(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each sentence, without the white space around it; a line ends one, too."""
    start = 0
    for end in (*(match.end() for match in _END.finditer(text)), len(text)):
        sentence = text[start:end]
        if sentence.strip():
            yield start + len(sentence) - len(sentence.lstrip()), start + len(sentence.rstrip())
        start = end
