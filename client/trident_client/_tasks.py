"""What the calls of every task but generation send, and how their answers are joined; `Client` says what they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from trident_client import _wire
from trident_client._errors import InvalidRequestError, ServerError
from trident_client._files import content_of, is_file, tensor_of
from trident_client._options import EXPLANATION, TRANSCRIPTION, TRANSLATION
from trident_client._steps import Batch, Prompt, Tensors
from trident_client._types import (
    Answer,
    Attribution,
    Entity,
    Explanation,
    File,
    Filling,
    Label,
    Ranked,
    Segment,
    SparseVector,
    Transcription,
    TranscriptionChunk,
    Translation,
)

_Record = TypeVar("_Record")
_Responses = list[dict[str, NDArray[Any]]]
Item = TypeVar("Item")
QUESTIONS = 32  # in one request
# Bytes of files in one request of several: a server's HTTP endpoint ends at 4 MiB.
_FILES_BYTES = 5 * 2**19


def embed(
    texts: str | Sequence[str],
    model: str | None,
    prompt_name: str | None,
    dimensions: int | None,
    truncate: bool | None,
    batch_size: int,
) -> Batch[NDArray[np.float32]]:
    """See `Client.embed`."""
    options = _prompted(prompt_name)
    if dimensions is not None:
        options["dimensions"] = _wire.scalar("dimensions", dimensions, np.int64)

    def join(responses: _Responses) -> NDArray[np.float32]:
        if not responses:
            return np.empty((0, 0), np.float32)
        vectors: NDArray[np.float32] = np.concatenate([response["embedding"] for response in responses])
        single: NDArray[np.float32] = vectors[0]
        return single if isinstance(texts, str) else vectors

    requests = _rows({"text_input": _listed(texts)}, truncate, batch_size, options)
    return Batch("feature-extraction", model, requests, join)


def tokenize(
    texts: Sequence[str], text_pairs: Sequence[str] | None, model: str, truncate: bool | None, batch_size: int
) -> Batch[list[list[int]]]:
    """See `Client.tokenize`."""

    def join(responses: _Responses) -> list[list[int]]:
        return [
            ids[mask > 0].tolist()
            for response in responses
            for ids, mask in zip(response["input_ids"], response["attention_mask"], strict=True)
        ]

    columns = {"text_input": texts} if text_pairs is None else {"query": texts, "text_input": text_pairs}
    return Batch("", f"{model.partition('_')[0]}_tokenizer", _rows(columns, truncate, batch_size, {}), join)


def infer(model: str, tensors: Tensors) -> Batch[dict[str, NDArray[Any]]]:
    """See `Client.infer`."""
    return Batch("", model, [tensors], lambda responses: responses[0])


def embed_sparse(
    texts: str | Sequence[str], model: str | None, prompt_name: str | None, truncate: bool | None, batch_size: int
) -> Batch[SparseVector | list[SparseVector]]:
    """See `Client.embed_sparse`."""

    def found(responses: _Responses) -> list[SparseVector]:
        return [
            SparseVector(tuple(indices[indices >= 0].tolist()), tuple(weights[indices >= 0].tolist()))
            for response in responses
            for indices, weights in zip(response["indices"], response["weights"], strict=True)
        ]

    requests = _rows({"text_input": _listed(texts)}, truncate, batch_size, _prompted(prompt_name))
    join = _one_or_all(texts, found)
    return Batch("sparse-embedding", model, requests, join)


def classify(
    texts: str | Sequence[str],
    text_pairs: str | Sequence[str] | None,
    model: str | None,
    top_k: int,
    truncate: bool | None,
    batch_size: int,
) -> Batch[list[Label] | list[list[Label]]]:
    """See `Client.classify`."""
    columns = {"text_input": _listed(texts)}
    if text_pairs is not None:
        columns["text_pair"] = _listed(text_pairs)
    options = {"top_k": _wire.scalar("top_k", top_k, np.int32)}
    requests = _rows(columns, truncate, batch_size, options)
    join = _one_or_all(texts, _labels)
    return Batch("text-classification", model, requests, join)


def classify_zero_shot(
    texts: str | Sequence[str],
    candidate_labels: Sequence[str],
    hypothesis_template: str | None,
    multi_label: bool | None,
    model: str | None,
    truncate: bool | None,
    batch_size: int,
) -> Batch[list[Label] | list[list[Label]]]:
    """See `Client.classify_zero_shot`."""
    _check(batch_size)
    options: dict[str, NDArray[Any]] = {"candidate_labels": _wire.texts(list(candidate_labels))}
    if hypothesis_template is not None:
        options["hypothesis_template"] = _wire.texts([hypothesis_template])
    flags = {"multi_label": multi_label, "truncate": truncate}
    options |= {name: _wire.flag(name, value) for name, value in flags.items() if value is not None}
    batch = list(_listed(texts))
    starts = range(0, len(batch), batch_size)
    requests = [{"text_input": _wire.texts(batch[start : start + batch_size]), **options} for start in starts]
    join = _one_or_all(texts, _labels)
    return Batch("zero-shot-classification", model, requests, join)


def entities(
    texts: str | Sequence[str],
    model: str | None,
    aggregation_strategy: str | None,
    truncate: bool | None,
    batch_size: int,
) -> Batch[list[Entity] | list[list[Entity]]]:
    """See `Client.entities`."""
    options = {}
    if aggregation_strategy is not None:
        options["aggregation_strategy"] = _wire.texts([aggregation_strategy])

    def found(responses: _Responses) -> list[list[Entity]]:
        names = ("entity", "score", "word", "start", "end")
        return [_records(Entity, row) for response in responses for row in _split(response, names)]

    requests = _rows({"text_input": _listed(texts)}, truncate, batch_size, options)
    join = _one_or_all(texts, found)
    return Batch("token-classification", model, requests, join)


def answer(
    question: str | Sequence[str],
    context: str | Sequence[str],
    top_k: int,
    model: str | None,
    max_answer_len: int | None,
    handle_impossible_answer: bool | None,
) -> Batch[list[Answer] | list[list[Answer]]]:
    """See `Client.answer`."""
    questions, contexts = list(_listed(question)), list(_listed(context))
    if len(contexts) not in (1, len(questions)):
        raise InvalidRequestError(
            f"there are {len(questions)} questions and {len(contexts)} contexts: give one context, or one for each"
        )
    options = {"top_k": _wire.scalar("top_k", top_k, np.int32)}
    if max_answer_len is not None:
        options["max_answer_len"] = _wire.scalar("max_answer_len", max_answer_len, np.int32)
    if handle_impossible_answer is not None:
        options["handle_impossible_answer"] = _wire.flag("handle_impossible_answer", handle_impossible_answer)
    requests = []
    for start in range(0, len(questions), QUESTIONS):
        part = slice(start, start + QUESTIONS)
        read = contexts if len(contexts) == 1 else contexts[part]
        requests.append({"question": _wire.texts(questions[part]), "context": _wire.texts(read), **options})

    def found(responses: _Responses) -> list[list[Answer]]:
        answers = []
        for outputs in responses:
            scores = np.broadcast_to(outputs["no_answer_score"][:, None], outputs["answer"].shape)
            names = ("answer", "score", "start", "end", "no_answer_score")
            answers += [_records(Answer, row) for row in _split(outputs | {"no_answer_score": scores}, names)]
        return answers

    join = _one_or_all(question, found)
    return Batch("question-answering", model, requests, join)


def rank(
    query: str,
    passages: Sequence[str],
    model: str | None,
    prompt_name: str | None,
    truncate: bool | None,
    batch_size: int,
) -> Batch[list[Ranked]]:
    """See `Client.rank`."""

    def join(responses: _Responses) -> list[Ranked]:
        scores = [float(score) for response in responses for score in response["score"][:, 0]]
        ranked = [Ranked(index, score) for index, score in enumerate(scores)]
        return sorted(ranked, key=lambda passage: passage.score, reverse=True)

    columns = {"query": [query] * len(passages), "text_input": passages}
    return Batch("text-ranking", model, _rows(columns, truncate, batch_size, _prompted(prompt_name)), join)


def fill_mask(text: str, model: str | None, top_k: int | None) -> Batch[list[list[Filling]]]:
    """See `Client.fill_mask`."""

    def join(responses: _Responses) -> list[list[Filling]]:
        (outputs,) = responses
        names = ("token_str", "score", "token", "sequence")
        return [_records(Filling, row) for row in _split({name: outputs[name][0] for name in names}, names)]

    options = {} if top_k is None else {"top_k": _wire.scalar("top_k", top_k, np.int32)}
    return Batch("fill-mask", model, _rows({"text_input": [text]}, None, 1, options), join)


def text_to_text(
    task: str, texts: str | Sequence[str], model: str | None, options: Mapping[str, Any]
) -> Batch[Translation | list[Translation]]:
    """See `Client.translate` and `Client.summarize`."""
    inputs = _wire.options(options, TRANSLATION)
    requests = [{"text_input": _wire.texts([text])[None], **inputs} for text in _listed(texts)]
    return Batch(
        task, model, requests, _one_or_all(texts, lambda responses: [_translation(each) for each in responses])
    )


def transcribe(
    audio: File, model: str | None, options: Mapping[str, Any], *, stream: bool = False
) -> Prompt[TranscriptionChunk]:
    """See `Client.transcribe` and `Client.stream_transcription`."""
    inputs = {"audio": tensor_of([content_of(audio)])[None], **_wire.options(options, TRANSCRIPTION)}
    inputs["stream"] = np.array([[stream]])
    return Prompt("automatic-speech-recognition", model, inputs, stream, lambda outputs: [_heard(outputs)])


def explain(text: str, model: str, options: Mapping[str, Any]) -> Batch[list[Explanation]]:
    """See `Client.explain`."""

    def join(responses: _Responses) -> list[Explanation]:
        found = json.loads(responses[0]["explanation"].item())
        return [
            Explanation(**{**each, "attributions": tuple(Attribution(**one) for one in each["attributions"])})
            for each in found
        ]

    return Batch("", *_explaining(text, model, options), join)


def explain_page(text: str, model: str, options: Mapping[str, Any]) -> Batch[str]:
    """See `Client.explain_page`."""
    name, requests = _explaining(text, model, options)
    pages = [{**each, "page": np.array([[True]])} for each in requests]
    return Batch("", name, pages, lambda responses: str(responses[0]["page"].item(), "utf-8"))


def _explaining(text: str, model: str, options: Mapping[str, Any]) -> tuple[str, list[Tensors]]:
    """The model that explains another one, and the request for it."""
    base, _, variant = model.partition("_")
    tensors: dict[str, NDArray[Any]] = {"text_input": _wire.texts([text])[None]}
    if variant:
        tensors["variant"] = _wire.texts([variant])[None]
    return f"{base}_explain", [tensors | _wire.options(options, EXPLANATION)]


def embed_images(images: File | Sequence[File], model: str | None, batch_size: int) -> Batch[NDArray[np.float32]]:
    """See `Client.embed_images`."""

    def join(responses: _Responses) -> NDArray[np.float32]:
        if not responses:
            return np.empty((0, 0), np.float32)
        vectors: NDArray[np.float32] = np.concatenate([response["embedding"] for response in responses])
        single: NDArray[np.float32] = vectors[0]
        return single if is_file(images) else vectors

    requests = [{"image": files[:, None]} for files in _files(images, batch_size)]
    return Batch("image-feature-extraction", model, requests, join)


def classify_images(
    images: File | Sequence[File], model: str | None, top_k: int, batch_size: int
) -> Batch[list[Label] | list[list[Label]]]:
    """See `Client.classify_images`."""
    number = _wire.scalar("top_k", top_k, np.int32)
    requests = [
        {"image": files[:, None], "top_k": np.repeat(number[None], len(files), axis=0)}
        for files in _files(images, batch_size)
    ]
    join = _one_or_all(images, _labels)
    return Batch("image-classification", model, requests, join)


def classify_images_zero_shot(
    images: File | Sequence[File],
    candidate_labels: Sequence[str],
    hypothesis_template: str | None,
    model: str | None,
    batch_size: int,
) -> Batch[list[Label] | list[list[Label]]]:
    """See `Client.classify_images_zero_shot`."""
    options: dict[str, NDArray[Any]] = {"candidate_labels": _wire.texts(list(candidate_labels))}
    if hypothesis_template is not None:
        options["hypothesis_template"] = _wire.texts([hypothesis_template])
    requests = [{"image": files, **options} for files in _files(images, batch_size)]
    join = _one_or_all(images, _labels)
    return Batch("zero-shot-image-classification", model, requests, join)


def _files(images: File | Sequence[File], batch_size: int) -> Iterator[NDArray[np.object_]]:
    """Files as BYTES tensors [files], cut where a request has `batch_size` of them, or many bytes."""
    _check(batch_size)
    waiting: list[bytes] = []
    for file in cast("Sequence[File]", [images] if is_file(images) else images):
        content = content_of(file)
        if waiting and (len(waiting) == batch_size or sum(map(len, waiting)) + len(content) > _FILES_BYTES):
            yield tensor_of(waiting)
            waiting = []
        waiting.append(content)
    if waiting:
        yield tensor_of(waiting)


def _listed(texts: str | Sequence[str]) -> Sequence[str]:
    return [texts] if isinstance(texts, str) else texts


def _one_or_all(
    given: File | Sequence[File], found: Callable[[_Responses], list[Item]]
) -> Callable[[_Responses], Item | list[Item]]:
    """For a single text or file the one answer, else the list of all."""
    return lambda responses: found(responses)[0] if is_file(given) else found(responses)


def _rows(
    columns: Mapping[str, Sequence[str]],
    truncate: bool | None,
    batch_size: int,
    options: Mapping[str, NDArray[Any]],
) -> list[Tensors]:
    """Texts in requests of at most `batch_size` rows; an option is repeated for each row."""
    _check(batch_size)
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the lists must have the same length, found {lengths}")
    requests: list[Tensors] = []
    for start in range(0, max(lengths.values()), batch_size):
        inputs: dict[str, NDArray[Any]] = {
            name: _wire.texts(list(column[start : start + batch_size]))[:, None] for name, column in columns.items()
        }
        rows = len(next(iter(inputs.values())))
        if truncate is not None:
            inputs["truncate"] = np.repeat(_wire.flag("truncate", truncate)[None], rows, axis=0)
        inputs |= {name: np.repeat(value[None], rows, axis=0) for name, value in options.items()}
        requests.append(inputs)
    return requests


def _check(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {batch_size}")


def _prompted(prompt_name: str | None) -> dict[str, NDArray[Any]]:
    return {} if prompt_name is None else {"prompt_name": _wire.texts([prompt_name])}


def _labels(responses: _Responses) -> list[list[Label]]:
    return [
        _records(Label, row)
        for response in responses
        for row in _split(response, ("label", "score", *({"label_id"} & response.keys())))
    ]


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


def transcription(chunks: Sequence[TranscriptionChunk]) -> Transcription:
    """All of an answer.

    Raises:
        ServerError: there are no chunks.
    """
    if not chunks:
        raise ServerError("the server ended the answer before it began")
    return Transcription(
        text="".join(chunk.text for chunk in chunks),
        language=chunks[-1].language,
        duration=chunks[-1].duration,
        finish_reason=chunks[-1].finish_reason,
        num_output_tokens=chunks[-1].num_output_tokens,
        segments=tuple(segment for chunk in chunks for segment in chunk.segments),
    )


def _heard(outputs: Mapping[str, NDArray[Any]]) -> TranscriptionChunk:
    tokens = outputs["output_ids"].reshape(-1).tolist()
    names = ("segment_start", "segment_end", "segment_text", "segment_tokens", "segment_log_prob", "segment_no_speech")
    columns = [outputs[name].reshape(-1).tolist() for name in names]
    segments, first = [], 0
    for start, end, text, count, log_prob, no_speech in zip(*columns, strict=True):
        its = tuple(tokens[first : first + count])
        segments.append(Segment(round(start, 3), round(end, 3), text.decode("utf-8"), its, log_prob, no_speech))
        first += count
    return TranscriptionChunk(
        text=outputs["text_output"].item().decode("utf-8"),
        language=outputs["language"].item().decode("utf-8"),
        duration=float(outputs["duration"].item()),
        finish_reason=outputs["finish_reason"].item().decode("utf-8"),
        num_output_tokens=int(outputs["num_output_tokens"].item()),
        segments=tuple(segments),
    )


def _translation(outputs: Mapping[str, NDArray[Any]]) -> Translation:
    return Translation(
        text=outputs["text_output"].item().decode("utf-8"),
        finish_reason=outputs["finish_reason"].item().decode("utf-8"),
        num_input_tokens=int(outputs["num_input_tokens"].item()),
        num_output_tokens=int(outputs["num_output_tokens"].item()),
        log_probs=tuple(outputs["output_log_probs"].reshape(-1).tolist()),
        scores=tuple(outputs["sequence_scores"].reshape(-1).tolist()) if "sequence_scores" in outputs else (),
    )
