"""Text generation, whole or streamed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trident_client import _protocol as pb
from trident_client import _wire
from trident_client._connection import Connection
from trident_client._errors import InvalidRequestError, TridentError, from_named_code, translated
from trident_client._options import GENERATION, GenerationOptions
from trident_client._types import Generation, GenerationChunk, Message, ToolCall

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GenerationCalls(Connection):
    """Calls of a generator."""

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Generation:
        """The continuation of a prompt; a list of messages is a chat.

        Args:
            prompt: a text to continue, or the messages of a chat.
            model: public name; None: the server's only generator.
            options: see `GenerationOptions`; an option that is None is left out.
            timeout: seconds; the server then gives up the request too, even one that waits for a slot.

        Raises:
            TridentError: see its subclasses.
            TypeError: an option is unknown.
            ValueError: an option's number does not fit its type.
        """
        return _joined(self._chunks(prompt, model, timeout, dict(options), stream=False))

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Iterator[GenerationChunk]:
        """The same, in chunks as they come. Closing the iterator cancels the request.

        Args:
            options: those of `generate`.

        Raises:
            TridentError: see its subclasses; raised while iterating, but for a model that is not named and not found.
            TypeError: an option is unknown.
        """
        return self._chunks(prompt, model, timeout, dict(options), stream=True)

    def generate_many(
        self,
        prompt: str | Sequence[Message],
        n: int,
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[Generation]:
        """Several answers to one prompt, which is computed once; with `temperature` above 0 they differ.

        Args:
            prompt: see `generate`.
            n: how many, between 1 and 32. The i-th has the seed `random_seed + i`.
            options: those of `generate`.

        Raises:
            TridentError: see its subclasses.
            TypeError: an option is unknown.
        """
        return [_joined(iter([chunk])) for chunk in self._chunks(prompt, model, timeout, dict(options), n=n)]

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[GenerationOptions],
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
        return self.generate(messages, model=model, timeout=timeout, **options)

    def _chunks(
        self,
        prompt: str | Sequence[Message],
        model: str | None,
        timeout: float | None,
        options: dict[str, Any],
        *,
        stream: bool = False,
        n: int = 1,
    ) -> Iterator[GenerationChunk]:
        if isinstance(prompt, str):
            field, text = "text_input", prompt
        else:
            field, text = "messages", _wire.as_json("messages", list(prompt))
        inputs: dict[str, NDArray[Any]] = {field: _wire.texts([text])[None], "stream": np.array([[stream]])}
        inputs |= _wire.options(options, GENERATION)
        if n != 1:
            inputs["n"] = _wire.scalar("n", n, np.int32)[None]
        request = _wire.build_request(model or self._only_model("text-generation", timeout), inputs)
        deadline = self._deadline(timeout)
        if deadline is not None:
            request.parameters["timeout"].int64_param = max(int(deadline * 1e6), 1)
        return self._receive(request, deadline)

    def _receive(self, request: Any, timeout: float | None) -> Iterator[GenerationChunk]:
        with translated():
            call = self._stream_infer(request, timeout=timeout)
            try:
                for response in call:
                    if response.error_message:
                        raise self._stream_error(request.model_name, response.error_message)
                    yield from _chunks(_wire.parse_response(response.infer_response))
            finally:
                call.cancel()

    def _stream_error(self, model: str, message: str) -> TridentError:
        """The error behind a message of a stream, which carries no status code.

        Trident's generator begins its messages with the code's name. Messages of Triton itself have none: either the
        model is unknown, which the server is asked, or the request does not fit the model.
        """
        if (error := from_named_code(message)) is not None:
            return error
        try:
            with translated():
                self._stub.ModelMetadata(pb.ModelMetadataRequest(name=model))
        except TridentError as refusal:
            return refusal
        return InvalidRequestError(message)


def _chunks(outputs: dict[str, NDArray[Any]]) -> list[GenerationChunk]:
    """The answers of a response: one, or all of a request with several."""
    counts = outputs["num_output_tokens"].reshape(-1).tolist()
    ends = np.cumsum([0, *counts])
    log_probs, top = outputs["output_log_probs"].reshape(-1).tolist(), _likeliest(outputs, "output")
    found = []
    for index, (text, reason, count) in enumerate(
        zip(outputs["text_output"].reshape(-1), outputs["finish_reason"].reshape(-1), counts, strict=True)
    ):
        # One answer's count is of all of its chunks, so that its new tokens are whatever there is.
        own = slice(None) if len(counts) == 1 else slice(ends[index], ends[index + 1])
        found.append(
            GenerationChunk(
                text=text.decode("utf-8"),
                finish_reason=reason.decode("utf-8"),
                num_input_tokens=int(outputs["num_input_tokens"].item()),
                num_output_tokens=count,
                log_probs=tuple(log_probs[own]),
                top_log_probs=top[own],
                prompt_log_probs=tuple(outputs.get("prompt_log_probs", np.empty(0)).reshape(-1).tolist()),
                prompt_top_log_probs=_likeliest(outputs, "prompt"),
                reasoning=_text(outputs, "reasoning", index),
                tool_calls=_calls(_text(outputs, "tool_calls", index)),
            )
        )
    return found


def _likeliest(outputs: dict[str, NDArray[Any]], name: str) -> tuple[tuple[tuple[int, float], ...], ...]:
    """For each token the likeliest ones, as (id, log-probability)."""
    ids, log_probs = (outputs.get(f"{name}_top_{kind}") for kind in ("token_ids", "log_probs"))
    if ids is None or log_probs is None:
        return ()
    pairs = zip(ids[0].tolist(), log_probs[0].tolist(), strict=True)
    return tuple(tuple(zip(*pair, strict=True)) for pair in pairs)


def _text(outputs: dict[str, NDArray[Any]], name: str, index: int) -> str:
    """A text of one of a response's answers; "" where there is none."""
    text: str = outputs[name].reshape(-1)[index].decode("utf-8") if name in outputs else ""
    return text


def _calls(text: str) -> tuple[ToolCall, ...]:
    """The `tool_calls` of an answer."""
    return tuple(
        ToolCall(call["index"], call.get("id", ""), call["function"].get("name", ""), call["function"]["arguments"])
        for call in json.loads(text or "[]")
    )


def _joined_calls(calls: Iterable[ToolCall]) -> tuple[ToolCall, ...]:
    """Calls whose parts came one after the other."""
    found: dict[int, ToolCall] = {}
    for call in calls:
        begun = found.get(call.index)
        found[call.index] = call if begun is None else replace(begun, arguments=begun.arguments + call.arguments)
    return tuple(found.values())


def _joined(chunks: Iterator[GenerationChunk]) -> Generation:
    every = list(chunks)
    last = every[-1]
    return Generation(
        text="".join(chunk.text for chunk in every),
        finish_reason=last.finish_reason,
        num_input_tokens=last.num_input_tokens,
        num_output_tokens=last.num_output_tokens,
        log_probs=tuple(value for chunk in every for value in chunk.log_probs),
        top_log_probs=tuple(value for chunk in every for value in chunk.top_log_probs),
        reasoning="".join(chunk.reasoning for chunk in every),
        tool_calls=_joined_calls(call for chunk in every for call in chunk.tool_calls),
        prompt_log_probs=every[0].prompt_log_probs,
        prompt_top_log_probs=every[0].prompt_top_log_probs,
    )
