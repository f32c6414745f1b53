"""The client: one gRPC channel, a method for each task. Safe to use from several threads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar, overload

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from trident_client import _wire
from trident_client._errors import (
    InvalidRequestError,
    TridentError,
    UnavailableError,
    from_named_code,
    translated,
)
from trident_client._types import (
    Answer,
    Entity,
    Filling,
    Generation,
    GenerationChunk,
    Health,
    Label,
    Message,
    ModelStatus,
    Ranked,
    Translation,
)

_Record = TypeVar("_Record")

_CHANNEL_OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))


_GENERATION_OPTIONS: dict[str, type[np.generic]] = {
    "max_tokens": np.int32,
    "min_tokens": np.int32,
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "repetition_penalty": np.float32,
    "presence_penalty": np.float32,
    "frequency_penalty": np.float32,
    "random_seed": np.uint64,
    "return_log_probs": np.bool_,
    "top_logprobs": np.int32,
    "prompt_lookup": np.bool_,
}


_SEQ2SEQ_OPTIONS: dict[str, type[np.generic]] = {
    **{
        name: _GENERATION_OPTIONS[name]
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


class Client:
    """Calls a Trident server.

    Args:
        url: host and port of the server's gRPC endpoint.
        timeout: seconds that a call may take where it names none; None waits as long as it takes.
    """

    def __init__(self, url: str = "localhost:8001", *, timeout: float | None = None) -> None:
        self._timeout = timeout
        self._channel = grpc.insecure_channel(url, options=_CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def generate(
        self, prompt: str, *, model: str = "smollm2", timeout: float | None = None, **options: Any
    ) -> Generation:
        """The continuation of a prompt.

        Args:
            options: `max_tokens`, `min_tokens`, `temperature` (0 is greedy), `top_k`, `top_p`, `min_p`,
                `repetition_penalty`, `presence_penalty`, `frequency_penalty`, `random_seed`, `stop_words`
                (a list of texts), `return_log_probs`, `top_logprobs` (how many), `prompt_lookup` (false: no drafts).
            timeout: seconds; the server gives the request up by then too, even while it waits for a slot.

        Raises:
            TridentError: see its subclasses.
            TypeError: an option is unknown.
            ValueError: an option's number does not fit its type.
        """
        return _joined(self._chunks("text_input", prompt, model, timeout, {**options, "stream": False}))

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        model: str = "smollm2",
        timeout: float | None = None,
        **options: Any,
    ) -> Iterator[GenerationChunk]:
        """The same, piece by piece; a list of messages is a chat. Closing the iterator cancels the request.

        Args:
            options: those of `generate`.

        Raises:
            TridentError: see its subclasses; raised while iterating.
            TypeError: an option is unknown.
        """
        field, text = ("text_input", prompt) if isinstance(prompt, str) else ("messages", json.dumps(list(prompt)))
        return self._chunks(field, text, model, timeout, {**options, "stream": True})

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        model: str = "smollm2",
        timeout: float | None = None,
        **options: Any,
    ) -> Generation:
        """The assistant's next turn, through the model's chat template; a text is one message of the user.

        Args:
            options: those of `generate`.

        Raises:
            TridentError: see its subclasses.
            TypeError: an option is unknown.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        text = json.dumps(list(messages))
        return _joined(self._chunks("messages", text, model, timeout, {**options, "stream": False}))

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

    def _rows(
        self,
        model: str,
        columns: Mapping[str, Sequence[str]],
        truncate: bool | None,
        batch_size: int,
        timeout: float | None,
        options: Mapping[str, NDArray[Any]],
    ) -> list[dict[str, NDArray[Any]]]:
        """Texts in requests of at most `batch_size` rows, sent at once; an option is repeated for each row."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {batch_size}")
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"there must be as many of each, found {lengths}")
        requests = []
        for start in range(0, max(lengths.values()), batch_size):
            inputs: dict[str, NDArray[Any]] = {
                name: _wire.texts(list(column[start : start + batch_size]))[:, None] for name, column in columns.items()
            }
            rows = len(next(iter(inputs.values())))
            if truncate is not None:
                inputs["truncate"] = np.full((rows, 1), truncate)
            inputs |= {name: np.repeat(value[None], rows, axis=0) for name, value in options.items()}
            requests.append(inputs)
        return self._infer(model, requests, timeout)

    def _infer(
        self, model: str, requests: Sequence[Mapping[str, NDArray[Any]]], timeout: float | None
    ) -> list[dict[str, NDArray[Any]]]:
        deadline = self._deadline(timeout)
        with translated():
            calls = []
            for inputs in requests:
                request = _wire.build_request(model, inputs)
                if deadline is not None:
                    request.parameters["timeout"].int64_param = max(int(deadline * 1e6), 1)
                calls.append(self._stub.ModelInfer.future(request, timeout=deadline))
            try:
                return [_wire.parse_response(call.result()) for call in calls]
            finally:
                for call in calls:
                    call.cancel()

    def models(self, *, timeout: float | None = None) -> list[ModelStatus]:
        """The models that the server has loaded or tried to load, by name.

        Raises:
            TridentError: see its subclasses.
        """
        with translated():
            index = self._stub.RepositoryIndex(pb.RepositoryIndexRequest(), timeout=self._deadline(timeout))
        statuses = [
            ModelStatus(model.name, model.version, model.state, model.reason) for model in index.models if model.state
        ]
        return sorted(statuses, key=lambda status: status.name)

    def health(self, *, timeout: float | None = None) -> Health:
        """Whether the server answers; no error where it can't be reached."""
        try:
            with translated():
                live = self._stub.ServerLive(pb.ServerLiveRequest(), timeout=self._deadline(timeout)).live
                ready = self._stub.ServerReady(pb.ServerReadyRequest(), timeout=self._deadline(timeout)).ready
        except UnavailableError:
            return Health(live=False, ready=False)
        return Health(live=live, ready=ready)

    def _deadline(self, timeout: float | None) -> float | None:
        return self._timeout if timeout is None else timeout

    def _chunks(
        self, field: str, text: str, model: str, timeout: float | None, options: dict[str, Any]
    ) -> Iterator[GenerationChunk]:
        inputs: dict[str, NDArray[Any]] = {field: _wire.texts([text])[None]}
        inputs["stream"] = np.array([[options.pop("stream")]])
        stop_words = options.pop("stop_words", None)
        if stop_words:
            inputs["stop_words"] = _wire.texts(list(stop_words))[None]
        for name, value in options.items():
            if name not in _GENERATION_OPTIONS:
                known = ", ".join([*_GENERATION_OPTIONS, "stop_words"])
                raise TypeError(f"unknown option {name!r}; known are {known}")
            if value is not None:
                inputs[name] = _wire.scalar(name, value, _GENERATION_OPTIONS[name])[None]
        request = _wire.build_request(model, inputs)
        deadline = self._deadline(timeout)
        if deadline is not None:
            request.parameters["timeout"].int64_param = max(int(deadline * 1e6), 1)
        return self._receive(request, deadline)

    def _receive(self, request: pb.ModelInferRequest, timeout: float | None) -> Iterator[GenerationChunk]:
        with translated():
            call = self._stub.ModelStreamInfer(iter([request]), timeout=timeout)
            try:
                for response in call:
                    if response.error_message:
                        raise self._stream_error(request.model_name, response.error_message)
                    yield _chunk(_wire.parse_response(response.infer_response))
            finally:
                call.cancel()

    def _stream_error(self, model: str, message: str) -> TridentError:
        """What an error on a stream means: streams carry a message and no status code.

        Trident's generator names the code at the beginning. What Triton itself refuses has none: it is an
        unknown model, for which the server is asked, or a request that does not fit the model.
        """
        if (error := from_named_code(message)) is not None:
            return error
        try:
            with translated():
                self._stub.ModelMetadata(pb.ModelMetadataRequest(name=model))
        except TridentError as refusal:
            return refusal
        return InvalidRequestError(message)


def _chunk(outputs: dict[str, NDArray[Any]]) -> GenerationChunk:
    ids, log_probs = (outputs.get(f"output_top_{name}") for name in ("token_ids", "log_probs"))
    top = [] if ids is None or log_probs is None else zip(ids[0].tolist(), log_probs[0].tolist(), strict=True)
    return GenerationChunk(
        text=outputs["text_output"].item().decode("utf-8"),
        finish_reason=outputs["finish_reason"].item().decode("utf-8"),
        num_input_tokens=int(outputs["num_input_tokens"].item()),
        num_output_tokens=int(outputs["num_output_tokens"].item()),
        log_probs=tuple(outputs["output_log_probs"].reshape(-1).tolist()),
        top_log_probs=tuple(tuple(zip(*pair, strict=True)) for pair in top),
    )


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


def _joined(chunks: Iterator[GenerationChunk]) -> Generation:
    pieces = list(chunks)
    last = pieces[-1]
    return Generation(
        text="".join(piece.text for piece in pieces),
        finish_reason=last.finish_reason,
        num_input_tokens=last.num_input_tokens,
        num_output_tokens=last.num_output_tokens,
        log_probs=tuple(value for piece in pieces for value in piece.log_probs),
        top_log_probs=tuple(value for piece in pieces for value in piece.top_log_probs),
    )
