"""What is hidden at a time: words, sentences or tokens of a text, as spans of characters."""

from __future__ import annotations

import bisect
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
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


class Places:
    """Tokens by the characters that they stand for, so that those of a unit are found without a look at all.

    Args:
        tokens: None, and one without characters, stands for nothing that is hidden.
    """

    def __init__(self, tokens: Iterable[Span | None]) -> None:
        found: dict[str, list[tuple[int, int, int]]] = {}
        for place, token in enumerate(tokens):
            if token is not None and token.start < token.end:
                found.setdefault(token.part, []).append((token.start, token.end, place))
        self._parts = {part: _Part(sorted(spans)) for part, spans in found.items()}

    def of(self, unit: Span) -> list[int]:
        """Which tokens share a character with a unit, as numbers in the order of their characters."""
        part = self._parts.get(unit.part)
        return [] if part is None else part.touching(unit.start, unit.end)


class _Part:
    """The tokens of one text, sorted by their starts.

    Args:
        spans: start, end and number of each.
    """

    def __init__(self, spans: Sequence[tuple[int, int, int]]) -> None:
        self._spans = spans
        self._starts = [start for start, _, _ in spans]
        # The furthest end so far: rising, also where tokens share characters.
        self._ends = list(itertools.accumulate((end for _, end, _ in spans), max))

    def touching(self, start: int, end: int) -> list[int]:
        first, last = bisect.bisect_right(self._ends, start), bisect.bisect_left(self._starts, end)
        return [place for _, ends, place in self._spans[first:last] if ends > start]


def units(part: str, text: str, by: By, tokens: Iterable[Span]) -> list[Span]:
    """The units of a text that hold a token, in its order.

    Args:
        tokens: of all texts that the model reads; one that has no characters is part of no unit.
    """
    own = sorted({token for token in tokens if token.part == part and token.start < token.end})
    if by is By.TOKEN:
        return own
    found = words(text) if by is By.WORD else sentences(text)
    places = Places(own)
    return [span for start, end in found if places.of(span := Span(part, start, end))]


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
