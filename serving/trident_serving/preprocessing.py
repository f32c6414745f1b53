"""The first stage of an ensemble: a request's texts to the model's input tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from trident_serving.encoding import EncodingSettings, TextEncoder
from trident_serving.errors import InvalidRequest
from trident_serving.question_answering import QuestionEncoder, WindowSettings
from trident_serving.text import decode_texts

Tensors = Mapping[str, NDArray[Any]]
Preprocess = Callable[[Tensors], Tensors]


def create(parameters: Mapping[str, str], folder: Path) -> Preprocess:
    """The preprocess that a config's `parameters` name, with the tokenizer of the version folder.

    Raises:
        ValueError: the task is unknown, or a setting is missing or malformed.
    """
    task = parameters.get("task")
    if task not in _TASKS:
        raise ValueError(f"parameter 'task' must be one of {', '.join(_TASKS)}, found {task!r}")
    return _TASKS[task](folder, parameters)


def _texts(folder: Path, parameters: Mapping[str, str], *, spans: bool = False) -> Preprocess:
    settings = EncodingSettings.from_parameters(parameters)
    encoder = TextEncoder.load(folder, settings)

    def preprocess(tensors: Tensors) -> Tensors:
        texts = decode_texts(tensors["text_input"], "text_input", settings.max_bytes)
        pairs = None
        if "text_pair" in tensors:
            pairs = decode_texts(tensors["text_pair"], "text_pair", settings.max_bytes)
        if "prompt_name" in tensors:
            names = set(decode_texts(tensors["prompt_name"], "prompt_name"))
            if len(names) > 1:
                raise InvalidRequest(f"prompt_name must be the same for all texts of a request, found {sorted(names)}")
            texts = encoder.with_prompt(names.pop(), texts)
        return encoder.encode(texts, pairs, truncate=_truncate(tensors), spans=spans)

    return preprocess


def _ranking(folder: Path, parameters: Mapping[str, str]) -> Preprocess:
    settings = EncodingSettings.from_parameters(parameters)
    encoder = TextEncoder.load(folder, settings, field="query", pair_field="text_input")

    def preprocess(tensors: Tensors) -> Tensors:
        queries = decode_texts(tensors["query"], "query", settings.max_bytes)
        passages = decode_texts(tensors["text_input"], "text_input", settings.max_bytes)
        return encoder.encode(queries, passages, truncate=_truncate(tensors))

    return preprocess


def _questions(folder: Path, parameters: Mapping[str, str]) -> Preprocess:
    settings = EncodingSettings.from_parameters(parameters)
    encoder = QuestionEncoder.load(folder, settings, WindowSettings.from_parameters(parameters))

    def preprocess(tensors: Tensors) -> Tensors:
        questions = decode_texts(tensors["question"], "question", settings.max_bytes)
        contexts = decode_texts(tensors["context"], "context", settings.max_bytes)
        return encoder.encode(questions, contexts)

    return preprocess


def _truncate(tensors: Tensors) -> bool | None:
    return bool(tensors["truncate"].any()) if "truncate" in tensors else None


_TASKS: dict[str, Callable[[Path, Mapping[str, str]], Preprocess]] = {
    "feature-extraction": _texts,
    "text-classification": _texts,
    "token-classification": partial(_texts, spans=True),
    "fill-mask": _texts,
    "text-ranking": _ranking,
    "question-answering": _questions,
}
