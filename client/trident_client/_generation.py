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
        stream: bool,
    ) -> Iterator[GenerationChunk]:
        if isinstance(prompt, str):
            field, text = "text_input", prompt
        else:
            field, text = "messages", _wire.as_json("messages", list(prompt))
        inputs: dict[str, NDArray[Any]] = {field: _wire.texts([text])[None], "stream": np.array([[stream]])}
        inputs |= _wire.options(options, GENERATION)
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
                    yield _chunk(_wire.parse_response(response.infer_response))
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
        reasoning=outputs["reasoning"].item().decode("utf-8") if "reasoning" in outputs else "",
        tool_calls=_calls(outputs["tool_calls"].item()) if "tool_calls" in outputs else (),
    )


def _calls(text: bytes) -> tuple[ToolCall, ...]:
    """The `tool_calls` of a response."""
    return tuple(
        ToolCall(call["index"], call.get("id", ""), call["function"].get("name", ""), call["function"]["arguments"])
        for call in json.loads(text)
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
    )
