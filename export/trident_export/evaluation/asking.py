"""Asks a server for its answers to examples."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tqdm import tqdm

from trident_client import Client, TridentError
from trident_export.errors import TextError
from trident_export.evaluation.datasets import Dataset, Example

CALLERS = 8
_UNKNOWN = re.compile(r"unexpected keyword argument ('.*')")
TOKENS = 256  # of an answer, where an example says nothing else


def answers(client: Client, task: str, model: str, data: Dataset) -> list[Any]:
    """The model's answer to each example.

    Of the kind text: a text; perplexity: the log-probabilities of all tokens but the first; label: the name of the
    likeliest class; entities: (class, start, end) of each; answers: the best text; search: the indices of the passages,
    the best first.

    Raises:
        TextError: the server refuses an example, or can't be asked; the message names its line.
    """
    # Asked of all questions of a file alike: which of them have no answer is what the model is to find out.
    may_be_none = data.kind == "answers" and any("" in (each.expected or [""]) for each in data.examples)
    ask = _asker(client, task, model, data.kind, may_be_none)

    def one(example: Example) -> Any:
        where = f"{data.path}, line {example.line}"
        try:
            found = ask(example)
        except (TridentError, ValueError, TypeError) as error:
            unknown = _UNKNOWN.search(str(error)) if isinstance(error, TypeError) else None
            why = f"says: {error}" if unknown is None else f"takes no field {unknown[1]}"
            raise TextError(f"{where}: {model} {why}") from error
        if data.kind == "perplexity" and not found:
            raise TextError(f"{where}: the text is one token, and the first of a text has no probability")
        return found

    with ThreadPoolExecutor(CALLERS) as pool:
        return list(tqdm(pool.map(one, data.examples), desc=model, total=len(data.examples), disable=None, leave=False))


def _asker(client: Client, task: str, model: str, kind: str, may_be_none: bool) -> Callable[[Example], Any]:
    if kind == "perplexity":
        return lambda example: _scored(client, model, example)
    if kind == "text":
        return lambda example: _text(client, task, model, example)
    if kind == "search":
        return lambda example: _searched(client, task, model, example)
    if kind == "entities":
        return lambda example: {
            (each.entity, each.start, each.end)
            for each in client.entities(example.asked["text_input"], model=model, **example.options)
        }
    if kind == "answers":
        return lambda example: _answered(client, model, example, may_be_none)
    if task == "zero-shot-classification":
        return lambda example: (
            client.classify_zero_shot(
                example.asked["text_input"], example.asked["candidate_labels"], model=model, **example.options
            )[0].label
        )
    return lambda example: (
        client.classify(
            example.asked["text_input"], text_pairs=example.asked.get("text_pair"), model=model, **example.options
        )[0].label
    )


def _scored(client: Client, model: str, example: Example) -> tuple[float, ...]:
    text = example.asked["text"]
    return client.generate(text, model=model, max_tokens=0, prompt_logprobs=0, **example.options).prompt_log_probs


def _text(client: Client, task: str, model: str, example: Example) -> str:
    options = {"max_tokens": TOKENS} | dict(example.options)
    if "messages" in example.asked:
        return client.generate(example.asked["messages"], model=model, **options).text
    text = example.asked["text_input"]
    if task == "text-generation":
        return client.generate(text, model=model, **options).text
    found = (client.translate if task == "translation" else client.summarize)(text, model=model, **options)
    return str(found.text)


def _answered(client: Client, model: str, example: Example, may_be_none: bool) -> str:
    none = {"handle_impossible_answer": True} if may_be_none else {}
    found = client.answer(
        example.asked["question"], example.asked["context"], model=model, **none | dict(example.options)
    )
    return found[0].answer if found else ""


def _searched(client: Client, task: str, model: str, example: Example) -> list[int]:
    query, passages = example.asked["query"], example.asked["passages"]
    if task == "text-ranking":
        return [each.index for each in client.rank(query, passages, model=model, **example.options)]
    embed = _Roles(client, model, example)
    scores = embed(passages, "document") @ embed([query], "query")[0]
    return [int(index) for index in np.argsort(-scores, kind="stable")]


class _Roles:
    """Embeds texts as queries and passages, with the prompts of models that have such."""

    def __init__(self, client: Client, model: str, example: Example) -> None:
        self._client, self._model, self._options = client, model, dict(example.options)

    def __call__(self, texts: Sequence[str], role: str) -> Any:
        name = self._options.get(f"{role}_prompt_name")
        more = {key: value for key, value in self._options.items() if not key.endswith("_prompt_name")}
        found = self._client.embed(list(texts), model=self._model, **({"prompt_name": name} if name else {}), **more)
        return found / np.linalg.norm(found, axis=1, keepdims=True)
