"""Examples with references, a JSON object in each line.

    a text generator, a translator, a summarizer   text_input or messages, and references; or text, whose tokens are
                                                   scored, for perplexity
    text-classification                            text_input, perhaps text_pair, and label
    zero-shot-classification                       text_input, candidate_labels, and label
    token-classification                           text_input, and entities: of each entity, start and end
    question-answering                             question, context, and answers; [] where there is none
    feature-extraction, text-ranking               query, passages, and relevant: the indices of the passages that
                                                   answer it, or a grade for each by index, {"3": 2}

Any other key but `id` is an option of the request, such as `target_lang` or `max_tokens`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trident_export.errors import TextError

GENERATING = ("text-generation", "translation", "summarization")
SEARCHING = ("feature-extraction", "text-ranking")


@dataclass(frozen=True)
class Example:
    """One line: what is asked, what is right, and options of the request."""

    line: int
    asked: Mapping[str, Any]
    expected: Any
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """The examples of a file, all of one kind.

    Attributes:
        kind: "text", "perplexity", "label", "entities", "answers" or "search".
    """

    path: Path
    kind: str
    examples: tuple[Example, ...]


def _text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)


def _strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _messages(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) and "role" in each for each in value)


def _entities(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, dict)
        and _text(each.get("entity"))
        and all(type(each.get(key)) is int for key in ("start", "end"))
        and 0 <= each["start"] < each["end"]
        for each in value
    )


def _grades(value: object) -> bool:
    if isinstance(value, dict):
        return all(
            key.isdecimal() and len(key) < 10 and isinstance(grade, (int, float)) and 0 <= grade < math.inf
            for key, grade in value.items()
        )
    return isinstance(value, list) and all(type(index) is int and index >= 0 for index in value)


# What a key must be: a test, and words for it.
_KEYS: dict[str, tuple[Callable[[object], bool], str]] = {
    "text_input": (_text, "a text"),
    "text_pair": (_text, "a text"),
    "text": (_text, "a text"),
    "messages": (_messages, "a list of messages"),
    "references": (_texts, "a list of texts"),
    "label": (_text, "the name of a class"),
    "candidate_labels": (_texts, "a list of texts"),
    "entities": (_entities, 'a list of {"entity", "start", "end"}, with start before end'),
    "question": (_text, "a text"),
    "context": (_text, "a text"),
    "answers": (_strings, "a list of texts"),
    "query": (_text, "a text"),
    "passages": (_texts, "a list of texts"),
    "relevant": (_grades, "a list of indices, or an object of grades by index"),
}


@dataclass(frozen=True)
class _Form:
    """A kind of example: the keys that it must have, that it can have, and which of them holds what is right."""

    kind: str
    asked: tuple[str, ...]
    expected: str
    optional: tuple[str, ...] = ()


def _forms(task: str) -> tuple[_Form, ...]:
    if task in GENERATING:
        text = _Form("text", ("text_input",), "references")
        if task != "text-generation":
            return (text,)
        return text, _Form("text", ("messages",), "references"), _Form("perplexity", ("text",), "")
    if task in SEARCHING:
        return (_Form("search", ("query", "passages"), "relevant"),)
    forms = {
        "text-classification": _Form("label", ("text_input",), "label", ("text_pair",)),
        "zero-shot-classification": _Form("label", ("text_input", "candidate_labels"), "label"),
        "token-classification": _Form("entities", ("text_input",), "entities"),
        "question-answering": _Form("answers", ("question", "context"), "answers"),
    }
    return (forms[task],) if task in forms else ()


def read(path: Path, task: str) -> Dataset:
    """Read a file for models of a task.

    Raises:
        TextError: there is no such file, it is no UTF-8, has no example, or a line is not what the task takes; the
            message names the line.
    """
    forms = _forms(task)
    if not forms:
        raise TextError(f"{task} models have no evaluation against references")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise TextError(f"{path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise TextError(
            f"{path} is no text in UTF-8, line {line} has the byte {error.object[error.start]:#x}"
        ) from error
    found = [_example(path, number, line, forms) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not found:
        raise TextError(f"{path} has no example: give it a JSON object in each line")
    kinds = {form.kind for form, _ in found}
    if len(kinds) > 1:
        raise TextError(
            f"{path} has examples with references and others to be scored: put them into files of their own"
        )
    return Dataset(path, kinds.pop(), tuple(example for _, example in found))


def _example(path: Path, number: int, line: str, forms: Sequence[_Form]) -> tuple[_Form, Example]:
    where = f"{path}, line {number}"
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TextError(f"{where} is no JSON: {error}") from error
    if not isinstance(entry, dict):
        raise TextError(f"{where} is no JSON object")
    fitting = [form for form in forms if entry.keys() >= {*form.asked, *((form.expected,) if form.expected else ())}]
    if not fitting:
        wanted = " or ".join(", ".join((*form.asked, *((form.expected,) if form.expected else ()))) for form in forms)
        raise TextError(f"{where} has the keys {', '.join(entry) or 'of nothing'}; needed are {wanted}")
    form = fitting[0]
    keys = [*form.asked, *(key for key in form.optional if key in entry)]
    for key in (*keys, *((form.expected,) if form.expected else ())):
        fits, words = _KEYS[key]
        if not fits(entry[key]):
            raise TextError(f"{where} has {key} {json.dumps(entry[key])[:80]}, which must be {words}")
    _check(where, entry, form)
    options = {key: value for key, value in entry.items() if key not in (*keys, form.expected, "id")}
    return form, Example(number, {key: entry[key] for key in keys}, entry.get(form.expected), options)


def _check(where: str, entry: Mapping[str, Any], form: _Form) -> None:
    """What is true of several keys together."""
    if form.kind == "search":
        relevant = entry["relevant"]
        indices = [int(index) for index in relevant]
        if not indices or (isinstance(relevant, dict) and not any(relevant.values())):
            raise TextError(f"{where} names no relevant passage, so no order of the passages is right")
        if max(indices) >= (count := len(entry["passages"])):
            raise TextError(f"{where} names passage {max(indices)}, and there are {count}, counted from 0")
    if form.kind == "entities" and entry["entities"]:
        last = max(each["end"] for each in entry["entities"])
        if last > (length := len(entry["text_input"])):
            raise TextError(f"{where} has an entity that ends at {last}, and the text has {length} characters")
    if "candidate_labels" in form.asked and entry["label"] not in entry["candidate_labels"]:
        raise TextError(f"{where} has label {entry['label']!r}, which is none of its candidate_labels")
