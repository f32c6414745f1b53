"""What a generator is sent, and how its responses become chunks and answers; see `Client` for the calls."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from trident_client import _wire
from trident_client._errors import ServerError
from trident_client._files import content_of, is_file, tensor_of
from trident_client._options import GENERATION
from trident_client._steps import Prompt
from trident_client._types import (
    File,
    Finding,
    Generation,
    GenerationChunk,
    ImagePart,
    Message,
    TextPart,
    ToolCall,
)

TASK = "text-generation"


def prompt(
    given: str | Sequence[Message] | Sequence[int],
    model: str | None,
    options: Mapping[str, Any],
    *,
    images: File | Sequence[File] = (),
    stream: bool = False,
    n: int = 1,
) -> Prompt[GenerationChunk]:
    """The request for a text or tokens to continue, or for the messages of a chat."""
    inputs: dict[str, NDArray[Any]]
    files = _files(images)
    if isinstance(given, str):
        inputs = {"text_input": _wire.texts([given])[None]}
    elif len(given) and all(isinstance(each, int | np.integer) for each in given):
        inputs = {"input_ids": np.concatenate([_wire.scalar("input_ids", each, np.int32) for each in given])[None]}
    else:
        messages, files = _without_files(cast("Sequence[Message]", given), files)
        inputs = {"messages": _wire.texts([_wire.as_json("messages", messages)])[None]}
    if files:
        inputs["images"] = tensor_of(files)[None]
    inputs["stream"] = np.array([[stream]])
    inputs |= _wire.options(options, GENERATION)
    if n != 1:
        inputs["n"] = _wire.scalar("n", n, np.int32)[None]
    return Prompt(TASK, model, inputs, stream, chunks)


def _files(images: File | Sequence[File]) -> list[bytes]:
    return [content_of(file) for file in cast("Sequence[File]", [images] if is_file(images) else images)]


def _without_files(messages: Sequence[Message], files: list[bytes]) -> tuple[list[Any], list[bytes]]:
    """Messages whose parts hold no files, and the files of their parts in order; those without one take the next."""
    sent: list[Any] = []
    found, waiting = [], list(files)
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, list | tuple):
            sent.append(message)
            continue
        parts: list[Any] = []
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "image":
                parts.append(part)
                continue
            if "image" in part:
                found.append(content_of(cast("File", part["image"])))
            elif waiting:
                found.append(waiting.pop(0))
            parts.append({"type": "image"})
        sent.append({**message, "content": parts})
    return sent, [*found, *waiting]


def turns(messages: str | Sequence[Message], images: File | Sequence[File] = ()) -> Sequence[Message]:
    """The messages of a chat; a text is one message of the user, behind the images."""
    if not isinstance(messages, str):
        return messages
    count = 1 if is_file(images) else len(cast("Sequence[File]", images))
    if count:
        parts: list[TextPart | ImagePart] = [{"type": "image"} for _ in range(count)]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": messages}]}]
    return [{"role": "user", "content": messages}]


def chunks(outputs: dict[str, NDArray[Any]]) -> list[GenerationChunk]:
    """The answers of a response: one, or all of a request with several."""
    counts = outputs["num_output_tokens"].reshape(-1).tolist()
    ends = list(itertools.accumulate(counts, initial=0))
    log_probs, top = outputs["output_log_probs"].reshape(-1).tolist(), _likeliest(outputs, "output")
    prompt = outputs.get("prompt_log_probs")
    prompt_log_probs = () if prompt is None else tuple(prompt.reshape(-1).tolist())
    ids, tokens = _flat(outputs, "output_ids"), _flat(outputs, "output_tokens")
    top_tokens = _rows_of(outputs, "output_top_tokens")
    indices = _flat(outputs, "index") or tuple(range(len(counts)))
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
                prompt_log_probs=prompt_log_probs,
                prompt_top_log_probs=_likeliest(outputs, "prompt"),
                reasoning=_text(outputs, "reasoning", index),
                tool_calls=_calls(_text(outputs, "tool_calls", index)),
                index=indices[index],
                token_ids=ids[own],
                tokens=tokens[own],
                top_tokens=top_tokens[own],
                prompt_token_ids=_flat(outputs, "prompt_token_ids"),
                prompt_tokens=_flat(outputs, "prompt_tokens"),
                prompt_top_tokens=_rows_of(outputs, "prompt_top_tokens"),
                guard=tuple(Finding(**found) for found in json.loads(_text(outputs, "guard", index) or "[]")),
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


def _flat(outputs: dict[str, NDArray[Any]], name: str) -> tuple[Any, ...]:
    """A tensor's elements; () where there is none."""
    return tuple(outputs[name].reshape(-1).tolist()) if name in outputs else ()


def _rows_of(outputs: dict[str, NDArray[Any]], name: str) -> tuple[tuple[Any, ...], ...]:
    """A tensor [1, rows, n] as rows; () where there is none."""
    return tuple(map(tuple, outputs[name][0].tolist())) if name in outputs else ()


def _text(outputs: dict[str, NDArray[Any]], name: str, index: int) -> str:
    """A text of one of a response's answers; "" where there is none."""
    text: str = outputs[name].reshape(-1)[index].decode("utf-8") if name in outputs else ""
    return text


def _calls(text: str) -> tuple[ToolCall, ...]:
    """The `tool_calls` of an answer."""
    return tuple(
        ToolCall(call["index"], call.get("id", ""), call["function"].get("name", ""), call["function"]["arguments"])
        for call in (json.loads(text) if text else ())
    )


def _joined_calls(calls: Iterable[ToolCall]) -> tuple[ToolCall, ...]:
    """Calls whose parts came one after the other."""
    found: dict[int, ToolCall] = {}
    for call in calls:
        begun = found.get(call.index)
        found[call.index] = call if begun is None else replace(begun, arguments=begun.arguments + call.arguments)
    return tuple(found.values())


def joined(chunks: Iterable[GenerationChunk]) -> Generation:
    """All of an answer.

    Raises:
        ServerError: there are no chunks.
    """
    every = list(chunks)
    if not every:
        raise ServerError("the server ended the answer before it began")
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
        index=every[0].index,
        token_ids=tuple(token for chunk in every for token in chunk.token_ids),
        tokens=tuple(token for chunk in every for token in chunk.tokens),
        top_tokens=tuple(tokens for chunk in every for tokens in chunk.top_tokens),
        prompt_token_ids=every[0].prompt_token_ids,
        prompt_tokens=every[0].prompt_tokens,
        prompt_top_tokens=every[0].prompt_top_tokens,
        guard=last.guard,
    )
