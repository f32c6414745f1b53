"""Examples that a head learns from: JSON lines, one object a line.

text-classification: `{"text": ..., "label": ...}`
question-answering: `{"question": ..., "context": ..., "answer": ...}`, where the answer stands in the context; "start"
is where, in characters, for an answer that stands there several times; an answer "" says that the context has none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trident_export.errors import TextError

T = TypeVar("T")
_HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Labelled:
    """A text and its class."""

    text: str
    label: str


@dataclass(frozen=True)
class Question:
    """A question, and where its answer stands in a context; from 0 to 0 where it has none."""

    question: str
    context: str
    start: int
    end: int


def labelled(file: Path) -> list[Labelled]:
    """The examples of a classifier.

    Raises:
        TextError: the file can't be read, or a line is no such example.
    """
    return _read(file, lambda row: Labelled(*_texts(row, "text", "label")))


def questions(file: Path) -> list[Question]:
    """The examples of extractive question answering.

    Raises:
        TextError: the file can't be read, or a line is no such example.
    """
    return _read(file, _question)


def _question(row: dict[str, Any]) -> Question:
    question, context = _texts(row, "question", "context")
    answer = _text(row, "answer")
    if not answer:
        return Question(question, context, 0, 0)
    start = row.get("start", context.find(answer))
    whole = isinstance(start, int) and not isinstance(start, bool)
    if not whole or start < 0 or context[start : start + len(answer)] != answer:
        raise TextError(f"the answer {answer[:40]!r} does not stand in the context")
    return Question(question, context, start, start + len(answer))


def _texts(row: dict[str, Any], *names: str) -> list[str]:
    found = [_text(row, name) for name in names]
    for name, text in zip(names, found, strict=True):
        if not text.strip():
            raise TextError(f"{name} must be a text, found an empty one")
    return found


def _text(row: dict[str, Any], name: str) -> str:
    if name not in row:
        raise TextError(f"{name} must be a text, found none")
    text = row[name]
    if not isinstance(text, str):
        raise TextError(f"{name} must be a text, found {json.dumps(text)[:40]}")
    if half := _HALF.search(text):
        raise TextError(f"{name} holds half of a surrogate pair, {half[0]!r}, which is no character")
    return text


def _read(file: Path, make: Callable[[dict[str, Any]], T]) -> list[T]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # other ends of lines may stand in a text
    except OSError as error:
        raise TextError(f"{file} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TextError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise TextError("it is no object")
            found.append(make(row))
        except (TextError, ValueError, RecursionError) as error:
            raise TextError(f"{file}, line {number}: {error}") from None
    return found
