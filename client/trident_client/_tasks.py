"""Embeddings, classification, entities, question answering, ranking, gaps, translation and summarization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from trident_client import _generation, _wire
from trident_client._connection import Connection
from trident_client._types import Answer, Entity, Filling, Label, Ranked, Translation

_Record = TypeVar("_Record")

_SEQ2SEQ_OPTIONS: dict[str, type[np.generic]] = {
    **{
        name: _generation.OPTIONS[name]
        for name in ("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p")
    },
    "repetition_penalty": np.float32,
    "random_seed": np.uint64,
    "num_beams": np.int32,
    "length_penalty": np.float32,
    "early_stopping": np.bool_,
    "no_repeat_ngram_size": np.int32,
}
_SEQ2SEQ_TEXTS = ("source_lang", "target_lang", "long_input")


class TaskCalls(Connection):
    """Calls of every task but generation."""

    def embed(
        self,
        texts: str | Sequence[str],
        *,
        model: str = "minilm",
        prompt_name: str | None = None,
        truncate: bool | None = None,
        batch_size: int = 32,
        timeout: float | None = None,
    ) -> NDArray[np.float32]:
        """Embeddings, float32 [texts, dimensions]; [dimensions] for a single text.

        Args:
            prompt_name: which of the model's prompts goes before each text, often "query" or "passage".
            truncate: whether to cut texts that are longer than the model takes; None leaves it to the server,
                which refuses them unless its models.toml says otherwise.
            batch_size: texts in one request, at most the model's `max_batch_size`.

        Raises:
            TridentError: see its subclasses.
        """
        batch = [texts] if isinstance(texts, str) else texts
        options = {} if prompt_name is None else {"prompt_name": _wire.texts([prompt_name])}
        parts = self._rows(model, {"text_input": batch}, truncate, batch_size, timeout, options)
        if not parts:
            return np.empty((0, 0), np.float32)
        vectors: NDArray[np.float32] = np.concatenate([part["embedding"] for part in parts])
        single: NDArray[np.float32] = vectors[0]
        return single if isinstance(texts, str) else vectors

    @overload
    def classify(self, texts: str, *, text_pairs: str | None = None, **options: Any) -> list[Label]: ...
    @overload
    def classify(
        self, texts: Sequence[str], *, text_pairs: Sequence[str] | None = None, **options: Any
    ) -> list[list[Label]]: ...
    def classify(  # type: ignore[misc]  # the overloads leave the options to this one
        self,
        texts: str | Sequence[str],
        *,
        text_pairs: str | Sequence[str] | None = None,
        model: str = "sst2",
        top_k: int = 1,
        truncate: bool | None = None,
        batch_size: int = 32,
        timeout: float | None = None,
    ) -> list[Label] | list[list[Label]]:
        """The likeliest classes of each text, the likeliest first; one list for a single text.

        Args:
            text_pairs: a second text for each, for models that compare two.
            top_k: classes of each text, at most the model's.
            truncate: see `embed`; `batch_size` too.

        Raises:
            TridentError: see its subclasses.
        """
        columns = {"text_input": [texts] if isinstance(texts, str) else texts}
        if text_pairs is not None:
            columns["text_pair"] = [text_pairs] if isinstance(text_pairs, str) else text_pairs
        options = {"top_k": np.array([top_k], np.int32)}
        parts = self._rows(model, columns, truncate, batch_size, timeout, options)
        labels = [_records(Label, row) for part in parts for row in _split(part, ("label", "score"))]
        return labels[0] if isinstance(texts, str) else labels

    @overload
    def entities(self, texts: str, **options: Any) -> list[Entity]: ...
    @overload
    def entities(self, texts: Sequence[str], **options: Any) -> list[list[Entity]]: ...
    def entities(  # type: ignore[misc]  # the overloads leave the options to this one
        self,
        texts: str | Sequence[str],
        *,
        model: str = "ner",
        aggregation_strategy: str | None = None,
        truncate: bool | None = None,
        batch_size: int = 32,
        timeout: float | None = None,
    ) -> list[Entity] | list[list[Entity]]:
        """The entities of each text, in its order; one list for a single text.

        Args:
            aggregation_strategy: "none", "simple", "first", "average" or "max"; None leaves it to the server.
            truncate: see `embed`; `batch_size` too.

        Raises:
            TridentError: see its subclasses.
        """
        columns = {"text_input": [texts] if isinstance(texts, str) else texts}
        options = {}
        if aggregation_strategy is not None:
            options["aggregation_strategy"] = _wire.texts([aggregation_strategy])
        parts = self._rows(model, columns, truncate, batch_size, timeout, options)
        names = ("entity", "score", "word", "start", "end")
        found = [_records(Entity, row) for part in parts for row in _split(part, names)]
        return found[0] if isinstance(texts, str) else found

    @overload
    def answer(self, question: str, context: str, *, top_k: int = 1, **options: Any) -> list[Answer]: ...
    @overload
    def answer(
        self, question: Sequence[str], context: str | Sequence[str], *, top_k: int = 1, **options: Any
    ) -> list[list[Answer]]: ...
    def answer(  # type: ignore[misc]  # the overloads leave the options to this one
        self,
        question: str | Sequence[str],
        context: str | Sequence[str],
        *,
        top_k: int = 1,
        model: str = "answer",
        max_answer_len: int | None = None,
        handle_impossible_answer: bool | None = None,
        timeout: float | None = None,
    ) -> list[Answer] | list[list[Answer]]:
        """The answers that a context holds, the best first; one list for a single question.

        Args:
            question: one, or several to be answered from one context or from one each.
            top_k: answers to a question.
            max_answer_len: tokens of an answer; None: 15.
            handle_impossible_answer: whether "" may be an answer.

        Raises:
            TridentError: see its subclasses.
        """
        inputs: dict[str, NDArray[Any]] = {
            "question": _wire.texts([question] if isinstance(question, str) else list(question)),
            "context": _wire.texts([context] if isinstance(context, str) else list(context)),
            "top_k": np.array([top_k], np.int32),
        }
        if max_answer_len is not None:
            inputs["max_answer_len"] = np.array([max_answer_len], np.int32)
        if handle_impossible_answer is not None:
            inputs["handle_impossible_answer"] = np.array([handle_impossible_answer])
        (outputs,) = self._infer(model, [inputs], timeout)
        shape = outputs["answer"].shape
        outputs["no_answer_score"] = np.broadcast_to(outputs["no_answer_score"][:, None], shape)
        names = ("answer", "score", "start", "end", "no_answer_score")
        found = [_records(Answer, row) for row in _split(outputs, names)]
        return found[0] if isinstance(question, str) else found

    def rank(
        self,
        query: str,
        passages: Sequence[str],
        *,
        model: str = "reranker",
        truncate: bool | None = None,
        batch_size: int = 32,
        timeout: float | None = None,
    ) -> list[Ranked]:
        """The passages by how well they answer a query, the best first.

        Args:
            truncate: see `embed`; `batch_size` too.

        Raises:
            TridentError: see its subclasses.
        """
        columns = {"query": [query] * len(passages), "text_input": passages}
        parts = self._rows(model, columns, truncate, batch_size, timeout, {})
        scores = [float(score) for part in parts for score in part["score"][:, 0]]
        ranked = [Ranked(index, score) for index, score in enumerate(scores)]
        return sorted(ranked, key=lambda passage: passage.score, reverse=True)

    def fill_mask(
        self, text: str, *, model: str = "fill-mask", top_k: int | None = None, timeout: float | None = None
    ) -> list[list[Filling]]:
        """The likeliest tokens for each gap of a text, the likeliest first.

        Args:
            text: with the model's mask token ("[MASK]", "<mask>") in place of a word.
            top_k: tokens for a gap; None: 5.

        Raises:
            TridentError: see its subclasses.
        """
        options = {} if top_k is None else {"top_k": np.array([top_k], np.int32)}
        (outputs,) = self._rows(model, {"text_input": [text]}, None, 1, timeout, options)
        gaps = {name: values[0] for name, values in outputs.items()}
        return [_records(Filling, row) for row in _split(gaps, ("token_str", "score", "token", "sequence"))]

    @overload
    def translate(self, texts: str, **options: Any) -> Translation: ...
    @overload
    def translate(self, texts: Sequence[str], **options: Any) -> list[Translation]: ...
    def translate(
        self, texts: str | Sequence[str], *, model: str = "translate", timeout: float | None = None, **options: Any
    ) -> Translation | list[Translation]:
        """Each text in another language; one answer for a single text. Many texts are sent at once.

        Args:
            options: `source_lang` and `target_lang` (codes of the model), `long_input` (what happens to a text that is
                too long: "error", "truncate" or "window"), `max_tokens`, `min_tokens`, `num_beams`, `length_penalty`,
                `early_stopping`, `no_repeat_ngram_size`, `repetition_penalty`, `temperature` (0 does not sample),
                `top_k`, `top_p`, `min_p`, `random_seed`; what is left out is as the model's generation config says.
            timeout: seconds; the server gives the request up by then too.

        Raises:
            TridentError: see its subclasses.
            TypeError: an option is unknown.
            ValueError: an option's number does not fit its type.
        """
        inputs: dict[str, NDArray[Any]] = {}
        for name, value in options.items():
            if value is None:
                continue
            if name in _SEQ2SEQ_TEXTS:
                inputs[name] = _wire.texts([value])[None]
            elif name in _SEQ2SEQ_OPTIONS:
                inputs[name] = _wire.scalar(name, value, _SEQ2SEQ_OPTIONS[name])[None]
            else:
                known = ", ".join([*_SEQ2SEQ_OPTIONS, *_SEQ2SEQ_TEXTS])
                raise TypeError(f"unknown option {name!r}; known are {known}")
        batch = [texts] if isinstance(texts, str) else texts
        requests = [{"text_input": _wire.texts([text])[None], **inputs} for text in batch]
        found = [_translation(outputs) for outputs in self._infer(model, requests, timeout)]
        return found[0] if isinstance(texts, str) else found

    @overload
    def summarize(self, texts: str, **options: Any) -> Translation: ...
    @overload
    def summarize(self, texts: Sequence[str], **options: Any) -> list[Translation]: ...
    def summarize(
        self, texts: str | Sequence[str], *, model: str = "summarize", **options: Any
    ) -> Translation | list[Translation]:
        """Each text in short; see `translate`."""
        return self.translate(texts, model=model, **options)


def _split(tensors: Mapping[str, NDArray[Any]], names: Sequence[str]) -> list[dict[str, list[Any]]]:
    """Tensors [rows, columns] as a row each of plain lists."""
    columns = {name: tensors[name].tolist() for name in names}
    return [
        {
            name: [value.decode("utf-8") if isinstance(value, bytes) else value for value in rows[row]]
            for name, rows in columns.items()
        }
        for row in range(len(tensors[names[0]]))
    ]


def _records(kind: type[_Record], row: Mapping[str, list[Any]]) -> list[_Record]:
    """The records of one row; those whose `start` is -1 only fill it up."""
    names = list(row)
    records = [dict(zip(names, values, strict=True)) for values in zip(*row.values(), strict=True)]
    return [kind(**record) for record in records if record.get("start") != -1]


def _translation(outputs: Mapping[str, NDArray[Any]]) -> Translation:
    return Translation(
        text=outputs["text_output"].item().decode("utf-8"),
        finish_reason=outputs["finish_reason"].item().decode("utf-8"),
        num_input_tokens=int(outputs["num_input_tokens"].item()),
        num_output_tokens=int(outputs["num_output_tokens"].item()),
        log_probs=tuple(outputs["output_log_probs"].reshape(-1).tolist()),
        scores=tuple(outputs["sequence_scores"].reshape(-1).tolist()) if "sequence_scores" in outputs else (),
    )
