"""Examples that a head learns from: JSON lines, one object a line.

text-classification: `{"text": ..., "label": ...}`
question-answering: `{"question": ..., "context": ..., "answer": ...}`, where the answer stands in the context; "start"
is where, in characters, for an answer that stands there several times; an answer "" says that the context has none.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trident_export.errors import TextError

T = TypeVar("T")


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
    answer = row.get("answer")
    if not isinstance(answer, str):
        raise TextError("answer must be a text")
    if not answer:
        return Question(question, context, 0, 0)
    start = row.get("start", context.find(answer))
    if not isinstance(start, int) or start < 0 or context[start : start + len(answer)] != answer:
        raise TextError(f"the answer {answer[:40]!r} does not stand in the context")
    return Question(question, context, start, start + len(answer))


def _texts(row: dict[str, Any], *names: str) -> list[str]:
    found = [row.get(name) for name in names]
    for name, text in zip(names, found, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise TextError(f"{name} must be a text")
    return [str(text) for text in found]


def _read(file: Path, make: Callable[[dict[str, Any]], T]) -> list[T]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # other ends of lines may stand in a text
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{file} can't be read: {error}") from None
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
