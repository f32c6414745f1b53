"""The items of OpenAI's Responses API: those of a request as messages, and an answer as items and events."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, cast

from trident_client import GenerationChunk, Message, ToolCall
from trident_gateway.errors import ApiError, invalid
from trident_gateway.openai.sampling import Json, now, reason, shown

# Why a response is incomplete, by the reason for which its answer ended.
_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
_IMAGE = "input_image"
_TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


def messages_of(given: str | Sequence[Json], instructions: str | None) -> list[Message]:
    """The conversation that a request's items are.

    Raises:
        ApiError: there are none, or one is of a kind that no template reads.
    """
    found: list[Json] = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(given, str):
        found.append({"role": "user", "content": given})
    else:
        if not given:
            raise invalid("input is empty: it must hold at least one item", "input")
        for index, item in enumerate(given):
            _add(found, item, f"input[{index}]")
    return cast(list[Message], found)


def _add(found: list[Json], item: Json, place: str) -> None:
    """Add an item to a conversation."""
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        message = {"role": "system" if role == "developer" else role, "content": _content(item.get("content"), place)}
        if role == "assistant" and found and _is_open(found[-1]):
            found[-1]["content"] = message["content"]  # reasoning came before it
        else:
            found.append(message)
    elif kind == "reasoning":
        thought = _text(item.get("content") or item.get("summary") or [], place)
        found.append({"role": "assistant", "content": None, "reasoning_content": thought})
    elif kind == "function_call":
        call = {
            "id": item.get("call_id"),
            "type": "function",
            "function": {"name": item.get("name"), "arguments": item.get("arguments")},
        }
        if not found or found[-1].get("role") != "assistant":
            found.append({"role": "assistant", "content": None})
        found[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        found.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": _text(item.get("output"), place)})
    else:
        raise invalid(f"{place}.type is {str(kind)[:80]!r}, which is not known here", "input")


def _is_open(message: Json) -> bool:
    """Whether a message is the assistant's reasoning, whose text comes next."""
    return message["role"] == "assistant" and message.get("content") is None and "tool_calls" not in message


def _content(content: Any, place: str) -> str | list[Json]:
    """The content of a message: a text, or parts where there are images among them."""
    images = isinstance(content, list) and any(isinstance(p, dict) and p.get("type") == _IMAGE for p in content)
    if not images:
        return _text(content, place)
    parts: list[Json] = []
    for index, part in enumerate(content):
        if isinstance(part, dict) and part.get("type") == _IMAGE:
            if not isinstance(part.get("image_url"), str):
                raise invalid(f"{place}.content[{index}] needs an image_url, as data:image/png;base64,...", "input")
            parts.append({"type": "image_url", "image_url": {"url": part["image_url"]}})
        else:
            parts.append({"type": "text", "text": _text([part], place)})
    return parts


def _text(content: Any, place: str) -> str:
    """The text of an item's content: a text, or parts that are texts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(f"{place} has no content", "input")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in _TEXTS or not isinstance(part.get("text"), str):
            found = str(part.get("type") if isinstance(part, dict) else part)[:80]
            raise invalid(f"{place} holds a part of type {found!r}: only texts are read here", "input")
        texts.append(part["text"])
    return "\n".join(texts)


class Assembly:
    """An answer while it comes: as a response, and as the events that tell of it.

    Args:
        told: what the response repeats of the request.
        log_probs: whether it has log-probabilities.
        several: whether it may call more than one tool.

    Attributes:
        response: as it is now.
        prompt_tokens: of the request.
        completion_tokens: of the answer.
    """

    def __init__(self, told: Json, *, log_probs: bool, several: bool) -> None:
        self.response: Json = {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": now(),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
            **told,
        }
        self.prompt_tokens = self.completion_tokens = 0
        self._log_probs = log_probs
        self._several = several
        self._sequence = 0
        self._open: Json | None = None
        self._ended: str | None = None

    def begin(self) -> list[Json]:
        """The events before the first token."""
        return [self._whole("response.created"), self._whole("response.in_progress")]

    def add(self, chunk: GenerationChunk) -> list[Json]:
        """The events of a chunk.

        Raises:
            ApiError: the answer was given up.
        """
        events: list[Json] = []
        self.prompt_tokens, self.completion_tokens = chunk.num_input_tokens, chunk.num_output_tokens
        if chunk.reasoning:
            events += self._more("reasoning", chunk.reasoning, [])
        log_probs = _log_probs(chunk) if self._log_probs else []
        if chunk.text or log_probs:
            events += self._more("message", chunk.text, log_probs)
        for call in chunk.tool_calls:
            if self._several or call.index == 0:
                events += self._call(call)
        self._ended = reason(chunk) or self._ended
        return events

    def end(self) -> list[Json]:
        """The events behind the last token."""
        cut = _INCOMPLETE.get(self._ended or "")
        events = self._close("incomplete" if cut else "completed")
        self.response["status"] = "incomplete" if cut else "completed"
        if cut:
            self.response["incomplete_details"] = {"reason": cut}
        self.response["usage"] = {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": self.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }
        return [*events, self._whole("response.incomplete" if cut else "response.completed")]

    def fail(self, error: ApiError) -> list[Json]:
        """The events of an answer that can't be completed."""
        self.response["status"] = "failed"
        self.response["error"] = {"code": error.code or error.type, "message": error.message}
        return [self._whole("response.failed")]

    def _whole(self, kind: str) -> Json:
        return self._event(kind, {"response": {**self.response, "output": list(self.response["output"])}})

    def _event(self, kind: str, content: Json) -> Json:
        event = {"type": kind, "sequence_number": self._sequence, **content}
        self._sequence += 1
        return event

    @property
    def _at(self) -> Json:
        """Where the open item is."""
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self.response["output"]) - 1}

    def _start(self, item: Json) -> list[Json]:
        events = self._close("completed")
        self._open = item
        self.response["output"].append(item)
        return [
            *events,
            self._event(
                "response.output_item.added", {"output_index": self._at["output_index"], "item": _copied(item)}
            ),
        ]

    def _more(self, kind: str, text: str, log_probs: list[Json]) -> list[Json]:
        """More text of a message, or of the reasoning."""
        events: list[Json] = []
        if self._open is None or self._open["type"] != kind:
            events += self._start(_new(kind))
            assert self._open is not None
            part: Json = {"type": "reasoning_text", "text": ""}
            if kind == "message":
                part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self._open["content"].append(part)
            events.append(
                self._event("response.content_part.added", {**self._at, "content_index": 0, "part": dict(part)})
            )
        assert self._open is not None
        (part,) = self._open["content"]
        part["text"] += text
        delta: Json = {**self._at, "content_index": 0, "delta": text}
        if kind == "message":
            part["logprobs"] += log_probs
            return [*events, self._event("response.output_text.delta", {**delta, "logprobs": log_probs})]
        return [*events, self._event("response.reasoning_text.delta", delta)]

    def _call(self, call: ToolCall) -> list[Json]:
        """More of a call."""
        events: list[Json] = []
        if call.id:
            events += self._start({**_new("function_call"), "call_id": call.id, "name": call.name})
        assert self._open is not None
        self._open["arguments"] += call.arguments
        if call.arguments:
            delta = {**self._at, "delta": call.arguments}
            events.append(self._event("response.function_call_arguments.delta", delta))
        return events

    def _close(self, status: str) -> list[Json]:
        """The events that end the open item."""
        if self._open is None:
            return []
        item, at = self._open, self._at
        item["status"] = status
        events: list[Json] = []
        if item["type"] == "function_call":
            done = {**at, "arguments": item["arguments"], "name": item["name"]}
            events.append(self._event("response.function_call_arguments.done", done))
        else:
            (part,) = item["content"]
            done = {**at, "content_index": 0, "text": part["text"]}
            if item["type"] == "message":
                done["logprobs"] = part["logprobs"]
            name = "output_text" if item["type"] == "message" else "reasoning_text"
            events.append(self._event(f"response.{name}.done", done))
            events.append(self._event("response.content_part.done", {**at, "content_index": 0, "part": dict(part)}))
        done = {"output_index": at["output_index"], "item": _copied(item)}
        events.append(self._event("response.output_item.done", done))
        self._open = None
        return events


def _new(kind: str) -> Json:
    """An item of the answer that has nothing yet."""
    if kind == "reasoning":
        return {
            "type": kind,
            "id": f"rs_{secrets.token_hex(16)}",
            "summary": [],
            "content": [],
            "status": "in_progress",
        }
    if kind == "message":
        role = {"role": "assistant", "content": []}
        return {"type": kind, "id": f"msg_{secrets.token_hex(16)}", "status": "in_progress", **role}
    return {"type": kind, "id": f"fc_{secrets.token_hex(16)}", "status": "in_progress", "arguments": ""}


def _copied(item: Json) -> Json:
    return {name: [dict(part) for part in value] if name == "content" else value for name, value in item.items()}


def _log_probs(chunk: GenerationChunk) -> list[Json]:
    """The log-probability of each token of a chunk, and of the likeliest ones at its position."""

    def entry(token: bytes, value: float) -> Json:
        return {"token": shown(token), "logprob": value, "bytes": list(token)}

    found = []
    for index, (token, value) in enumerate(zip(chunk.tokens, chunk.log_probs, strict=True)):
        top: list[Json] = []
        if chunk.top_tokens:
            pairs = zip(chunk.top_tokens[index], chunk.top_log_probs[index], strict=True)
            top = [entry(each, its) for each, (_, its) in pairs]
        found.append({**entry(token, value), "top_logprobs": top})
    return found
