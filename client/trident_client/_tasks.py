"""Embeddings, classification, entities, question answering, ranking, masks, translation and summarization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from trident_client import _wire
from trident_client._connection import Connection
from trident_client._errors import InvalidRequestError
from trident_client._options import TRANSLATION, TranslationOptions
from trident_client._types import Answer, Entity, Filling, Label, Ranked, SparseVector, Translation

if TYPE_CHECKING:
    from typing_extensions import Unpack

_Record = TypeVar("_Record")


class TextOptions(TypedDict, total=False):
    """Options of every call that sends texts in batches.

    Attributes:
        model: public name; None: the server's only model of the task.
        truncate: whether to cut texts that are longer than the model takes; None leaves it to the server, which
            refuses them unless its models.toml says otherwise.
        batch_size: texts in one request, at most the model's `max_batch_size`; 32.
        timeout: seconds.
    """

    model: str | None
    truncate: bool | None
    batch_size: int
    timeout: float | None


class ClassifyOptions(TextOptions, total=False):
    """Options of `classify`; `top_k` says how many classes of each text are given, at most the model's; 1."""

    top_k: int


class ZeroShotOptions(TextOptions, total=False):
    """Options of `classify_zero_shot`, whose `batch_size` is 1.

    Attributes:
        hypothesis_template: the sentence for a label, with {} in its place; None: "This example is {}."
        multi_label: whether each label is scored by itself, so that the scores need not add up to 1.
    """

    hypothesis_template: str | None
    multi_label: bool | None


class EntityOptions(TextOptions, total=False):
    """Options of `entities`; `aggregation_strategy` None leaves it to the server."""

    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] | None


class AnswerOptions(TypedDict, total=False):
    """Options of `answer`.

    Attributes:
        top_k: answers to a question; 1.
        model: public name; None: the server's only model of the task.
        max_answer_len: tokens of an answer; None: 15.
        handle_impossible_answer: whether "" may be an answer.
        timeout: seconds.
    """

    top_k: int
    model: str | None
    max_answer_len: int | None
    handle_impossible_answer: bool | None
    timeout: float | None


QUESTIONS = 32  # in one request


class TaskCalls(Connection):
    """Calls of every task but generation."""

    def embed(
        self,
        texts: str | Sequence[str],
        *,
        model: str | None = None,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        truncate: bool | None = None,
        batch_size: int = 32,
        timeout: float | None = None,
    ) -> NDArray[np.float32]:
        """Embeddings, float32 [texts, dimensions]; [dimensions] for a single text.

        Args:
            prompt_name: which of the model's prompts goes before each text, often "query" or "passage"; None: the
                model's default one, if it has one.
            dimensions: numbers in an embedding, one of those that the model allows; None: all that it gives.
            truncate: whether to cut texts that are longer than the model takes; None leaves it to the server,
                which refuses them unless its models.toml says otherwise.
            batch_size: texts in one request, at most the model's `max_batch_size`.

        Raises:
            TridentError: see its subclasses.
            ValueError: `dimensions` is no number of 64 bits, or a text is no text.
        """
        batch = [texts] if isinstance(texts, str) else texts
        options = _prompted(prompt_name)
        if dimensions is not None:
            options["dimensions"] = _wire.scalar("dimensions", dimensions, np.int64)
        model = model or self._only_model("feature-extraction", timeout)
        responses = self._rows(model, {"text_input": batch}, truncate, batch_size, timeout, options)
        if not responses:
            return np.empty((0, 0), np.float32)
        vectors: NDArray[np.float32] = np.concatenate([response["embedding"] for response in responses])
        single: NDArray[np.float32] = vectors[0]
        return single if isinstance(texts, str) else vectors

    # A str is a sequence of str too: the first overload wins.
    @overload
    def embed_sparse(  # type: ignore[overload-overlap]
        self, texts: str, *, prompt_name: str | None = None, **options: Unpack[TextOptions]
    ) -> SparseVector: ...
    @overload
    def embed_sparse(
        self, texts: Sequence[str], *, prompt_name: str | None = None, **options: Unpack[TextOptions]
    ) -> list[SparseVector]: ...
    def embed_sparse(
        self,
        texts: str | Sequence[str],
        *,
        model: str | None = None,
        prompt_name: str | None = None,
        truncate: bool | None = None,
        batch_size: int = 32,
        timeout: float | None = None,
    ) -> SparseVector | list[SparseVector]:
        """Sparse embeddings, one a text: a weight for some tokens of the vocabulary; one for a single text.

        Args:
            model: public name, of sparse or hybrid embeddings; None: the server's only model of sparse ones.
            prompt_name: see `embed`; `truncate` and `batch_size` too.

        Raises:
            TridentError: see its subclasses.
        """
        batch = [texts] if isinstance(texts, str) else texts
        model = model or self._only_model("sparse-embedding", timeout)
        responses = self._rows(model, {"text_input": batch}, truncate, batch_size, timeout, _prompted(prompt_name))
        found = [
            SparseVector(tuple(indices[indices >= 0].tolist()), tuple(weights[indices >= 0].tolist()))
            for response in responses
            for indices, weights in zip(response["indices"], response["weights"], strict=True)
        ]
        return found[0] if isinstance(texts, str) else found

    @overload
    def classify(  # type: ignore[overload-overlap]
        self, texts: str, *, text_pairs: str | None = None, **options: Unpack[ClassifyOptions]
    ) -> list[Label]: ...
    @overload
    def classify(
        self, texts: Sequence[str], *, text_pairs: Sequence[str] | None = None, **options: Unpack[ClassifyOptions]
    ) -> list[list[Label]]: ...
    def classify(
        self,
        texts: str | Sequence[str],
        *,
        text_pairs: str | Sequence[str] | None = None,
        model: str | None = None,
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
        options = {"top_k": _wire.scalar("top_k", top_k, np.int32)}
        model = model or self._only_model("text-classification", timeout)
        responses = self._rows(model, columns, truncate, batch_size, timeout, options)
        labels = [_records(Label, row) for response in responses for row in _split(response, ("label", "score"))]
        return labels[0] if isinstance(texts, str) else labels

    @overload
    def classify_zero_shot(  # type: ignore[overload-overlap]
        self, texts: str, candidate_labels: Sequence[str], **options: Unpack[ZeroShotOptions]
    ) -> list[Label]: ...
    @overload
    def classify_zero_shot(
        self, texts: Sequence[str], candidate_labels: Sequence[str], **options: Unpack[ZeroShotOptions]
    ) -> list[list[Label]]: ...
    def classify_zero_shot(
        self,
        texts: str | Sequence[str],
        candidate_labels: Sequence[str],
        *,
        hypothesis_template: str | None = None,
        multi_label: bool | None = None,
        model: str | None = None,
        truncate: bool | None = None,
        batch_size: int = 1,
        timeout: float | None = None,
    ) -> list[Label] | list[list[Label]]:
        """All of the labels for each text, the likeliest first; one list for a single text.

        Args:
            candidate_labels: what a text may be about, in words.
            hypothesis_template: the sentence for a label, with {} in its place; None: "This example is {}."
            multi_label: whether each label is scored by itself, so that the scores need not add up to 1.
            truncate: see `embed`.
            batch_size: texts in one request; times the labels at most the model's `max_batch_size`.

        Raises:
            TridentError: see its subclasses.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {batch_size}")
        options: dict[str, NDArray[Any]] = {"candidate_labels": _wire.texts(list(candidate_labels))}
        if hypothesis_template is not None:
            options["hypothesis_template"] = _wire.texts([hypothesis_template])
        flags = {"multi_label": multi_label, "truncate": truncate}
        options |= {name: np.array([value]) for name, value in flags.items() if value is not None}
        batch = [texts] if isinstance(texts, str) else list(texts)
        starts = range(0, len(batch), batch_size)
        requests = [{"text_input": _wire.texts(batch[start : start + batch_size]), **options} for start in starts]
        responses = self._infer(model or self._only_model("zero-shot-classification", timeout), requests, timeout)
        labels = [_records(Label, row) for response in responses for row in _split(response, ("label", "score"))]
        return labels[0] if isinstance(texts, str) else labels

    @overload
    def entities(  # type: ignore[overload-overlap]
        self, texts: str, **options: Unpack[EntityOptions]
    ) -> list[Entity]: ...
    @overload
    def entities(self, texts: Sequence[str], **options: Unpack[EntityOptions]) -> list[list[Entity]]: ...
    def entities(
        self,
        texts: str | Sequence[str],
        *,
        model: str | None = None,
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
        model = model or self._only_model("token-classification", timeout)
        responses = self._rows(model, columns, truncate, batch_size, timeout, options)
        names = ("entity", "score", "word", "start", "end")
        found = [_records(Entity, row) for response in responses for row in _split(response, names)]
        return found[0] if isinstance(texts, str) else found

    @overload
    def answer(  # type: ignore[overload-overlap]
        self, question: str, context: str, **options: Unpack[AnswerOptions]
    ) -> list[Answer]: ...
    @overload
    def answer(
        self, question: Sequence[str], context: str | Sequence[str], **options: Unpack[AnswerOptions]
    ) -> list[list[Answer]]: ...
    def answer(
        self,
        question: str | Sequence[str],
        context: str | Sequence[str],
        *,
        top_k: int = 1,
        model: str | None = None,
        max_answer_len: int | None = None,
        handle_impossible_answer: bool | None = None,
        timeout: float | None = None,
    ) -> list[Answer] | list[list[Answer]]:
        """The answers that a context holds, the best first; one list for a single question.

        Many questions go out in requests of 32.

        Args:
            question: one, or several to be answered from one context or from one each.
            top_k: answers to a question.
            max_answer_len: tokens of an answer; None: 15.
            handle_impossible_answer: whether "" may be an answer.

        Raises:
            TridentError: see its subclasses.
        """
        questions = [question] if isinstance(question, str) else list(question)
        options = {"top_k": _wire.scalar("top_k", top_k, np.int32)}
        if max_answer_len is not None:
            options["max_answer_len"] = _wire.scalar("max_answer_len", max_answer_len, np.int32)
        if handle_impossible_answer is not None:
            options["handle_impossible_answer"] = np.array([handle_impossible_answer])
        contexts = [context] if isinstance(context, str) else list(context)
        if len(contexts) not in (1, len(questions)):
            raise InvalidRequestError(
                f"there are {len(questions)} questions and {len(contexts)} contexts: give one context, or one for each"
            )
        requests = []
        for start in range(0, len(questions), QUESTIONS):
            part = slice(start, start + QUESTIONS)
            read = contexts if len(contexts) == 1 else contexts[part]
            requests.append({"question": _wire.texts(questions[part]), "context": _wire.texts(read), **options})
        found = []
        for outputs in self._infer(model or self._only_model("question-answering", timeout), requests, timeout):
            shape = outputs["answer"].shape
            outputs["no_answer_score"] = np.broadcast_to(outputs["no_answer_score"][:, None], shape)
            names = ("answer", "score", "start", "end", "no_answer_score")
            found += [_records(Answer, row) for row in _split(outputs, names)]
        return found[0] if isinstance(question, str) else found

    def rank(
        self,
        query: str,
        passages: Sequence[str],
        *,
        model: str | None = None,
        prompt_name: str | None = None,
        truncate: bool | None = None,
        batch_size: int = 32,
        timeout: float | None = None,
    ) -> list[Ranked]:
        """The passages by how well they answer a query, the best first.

        Args:
            prompt_name: which of the model's prompts goes with the query; None: the model's default one, if any.
            truncate: see `embed`; `batch_size` too.

        Raises:
            TridentError: see its subclasses.
        """
        columns = {"query": [query] * len(passages), "text_input": passages}
        model = model or self._only_model("text-ranking", timeout)
        responses = self._rows(model, columns, truncate, batch_size, timeout, _prompted(prompt_name))
        scores = [float(score) for response in responses for score in response["score"][:, 0]]
        ranked = [Ranked(index, score) for index, score in enumerate(scores)]
        return sorted(ranked, key=lambda passage: passage.score, reverse=True)

    def fill_mask(
        self, text: str, *, model: str | None = None, top_k: int | None = None, timeout: float | None = None
    ) -> list[list[Filling]]:
        """The likeliest tokens for each mask of a text, the likeliest first.

        Args:
            text: with the model's mask token ("[MASK]", "<mask>") in place of a word.
            top_k: tokens for a mask; None: 5.

        Raises:
            TridentError: see its subclasses.
        """
        options = {} if top_k is None else {"top_k": _wire.scalar("top_k", top_k, np.int32)}
        model = model or self._only_model("fill-mask", timeout)
        (outputs,) = self._rows(model, {"text_input": [text]}, None, 1, timeout, options)
        masks = {name: values[0] for name, values in outputs.items()}
        return [_records(Filling, row) for row in _split(masks, ("token_str", "score", "token", "sequence"))]

    @overload
    def translate(  # type: ignore[overload-overlap]
        self,
        texts: str,
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[TranslationOptions],
    ) -> Translation: ...
    @overload
    def translate(
        self,
        texts: Sequence[str],
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[TranslationOptions],
    ) -> list[Translation]: ...
    def translate(
        self,
        texts: str | Sequence[str],
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[TranslationOptions],
    ) -> Translation | list[Translation]:
        """Each text in another language; one answer for a single text.

        Many texts are sent 16 at a time. One that finds the server's queue full is sent again, within its `timeout`.

        Args:
            texts: one text or several.
            model: public name; None: the server's only model of the task.
            options: see `TranslationOptions`; the model's generation config has the defaults.
            timeout: seconds; the server then gives up the request too.

        Raises:
            TridentError: see its subclasses.
            TypeError: an option is unknown.
            ValueError: an option's number does not fit its type.
        """
        return self._text_to_text("translation", texts, model, timeout, dict(options))

    @overload
    def summarize(  # type: ignore[overload-overlap]
        self,
        texts: str,
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[TranslationOptions],
    ) -> Translation: ...
    @overload
    def summarize(
        self,
        texts: Sequence[str],
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[TranslationOptions],
    ) -> list[Translation]: ...
    def summarize(
        self,
        texts: str | Sequence[str],
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[TranslationOptions],
    ) -> Translation | list[Translation]:
        """A summary of each text; see `translate`."""
        return self._text_to_text("summarization", texts, model, timeout, dict(options))

    def _text_to_text(
        self,
        task: str,
        texts: str | Sequence[str],
        model: str | None,
        timeout: float | None,
        options: Mapping[str, Any],
    ) -> Translation | list[Translation]:
        inputs = _wire.options(options, TRANSLATION)
        batch = [texts] if isinstance(texts, str) else texts
        requests = [{"text_input": _wire.texts([text])[None], **inputs} for text in batch]
        found = [
            _translation(outputs)
            for outputs in self._infer(model or self._only_model(task, timeout), requests, timeout)
        ]
        return found[0] if isinstance(texts, str) else found


def _prompted(prompt_name: str | None) -> dict[str, NDArray[Any]]:
    return {} if prompt_name is None else {"prompt_name": _wire.texts([prompt_name])}


def _split(tensors: Mapping[str, NDArray[Any]], names: Sequence[str]) -> list[dict[str, list[Any]]]:
    """Tensors [rows, columns] as plain lists: for each row, its values by name."""
    columns = {name: tensors[name].tolist() for name in names}
    return [
        {
            name: [value.decode("utf-8") if isinstance(value, bytes) else value for value in rows[row]]
            for name, rows in columns.items()
        }
        for row in range(len(tensors[names[0]]))
    ]


def _records(kind: type[_Record], row: Mapping[str, list[Any]]) -> list[_Record]:
    """The records of one row, without padding, whose `start` is -1."""
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
