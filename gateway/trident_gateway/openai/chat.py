"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, cast

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from trident_client import AsyncClient, Generation, GenerationChunk, Message, ToolCall
from trident_gateway import bodies, calls
from trident_gateway.bodies import Neutral
from trident_gateway.catalog import GENERATION
from trident_gateway.errors import ApiError, invalid
from trident_gateway.gateway import exchange_of, gateway_of
from trident_gateway.openai.sampling import DONE, Json, Sampling, event, noted, now, reason, shown, usage
from trident_gateway.routing import beginning_of

router = APIRouter()
_NOTHING: Json = {}
# What OpenAI's clients send back of an answer's message, and no template reads.
_DROPPED = ("refusal", "annotations", "audio", "function_call")


class ChatBody(Sampling):
    """A conversation, and how it goes on."""

    messages: list[Json]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    modalities: list[str] | None = None
    verbosity: str | None = None
    # Not OpenAI's.
    chat_template_kwargs: Json | None = None
    documents: list[Json] | None = None
    include_reasoning: bool | None = None
    # Of no consequence for the answer.
    prediction: Neutral = None
    prompt_cache_options: Neutral = None

    def limit(self) -> int | None:
        """Tokens of the answer.

        Raises:
            ApiError: two fields say different things.
        """
        given = {value for value in (self.max_tokens, self.max_completion_tokens) if value is not None}
        if len(given) > 1:
            raise invalid("max_tokens and max_completion_tokens differ: give one of them", "max_completion_tokens")
        return next(iter(given), None)

    def names(self) -> dict[str, str]:
        """The fields that the server calls otherwise."""
        renamed = {} if self.max_completion_tokens is None else {"max_tokens": "max_completion_tokens"}
        return super().names() | renamed

    def options(self) -> Json:
        """See `Sampling.options`.

        Raises:
            ApiError: fields contradict each other, or ask for what no model here does.
        """
        if self.modalities not in (None, ["text"]):
            raise invalid(f"modalities can only be ['text'], found {self.modalities}", "modalities")
        if self.verbosity not in (None, "medium"):
            raise invalid("verbosity is not known to any model here: leave it out", "verbosity")
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs needs logprobs true", "top_logprobs")
        found = super().options()
        if (limit := self.limit()) is not None:
            found["max_tokens"] = limit
        if self.response_format is not None:
            found |= self.response_format.options()
        if self.logprobs:
            found |= {"return_log_probs": True, "top_logprobs": self.top_logprobs or 0, "return_tokens": True}
        if self.tools:
            found["tools"] = self.tools
        if self.tool_choice is not None and (self.tools or self.tool_choice not in ("none", "auto")):
            found["tool_choice"] = self.tool_choice
        template = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            template = {"reasoning_effort": self.reasoning_effort} | template
            if self.reasoning_effort == "none":
                template = {"enable_thinking": False} | template
        if template:
            found["chat_template_kwargs"] = template
        if self.documents:
            found["documents"] = self.documents
        found["return_reasoning"] = self.include_reasoning is not False
        return found


def conversation(messages: Sequence[Json]) -> list[Message]:
    """Messages as chat templates know them.

    Our client opens the path that a part of type "image" holds: here that would be a file of the gateway's machine, so
    such parts are refused.

    Raises:
        ApiError: there are none, or one holds what no template reads, or a file.
    """
    if not messages:
        raise invalid("messages is empty: it must hold at least one message", "messages")
    found = []
    for index, message in enumerate(messages):
        for name in _DROPPED:
            if message.get(name):
                raise invalid(f"messages[{index}].{name} is not known to any model here", "messages")
        content = message.get("content")
        for place, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, dict) and part.get("type") == "image":
                raise invalid(
                    f"messages[{index}].content[{place}].type is 'image', which is not known here: send "
                    '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}',
                    "messages",
                )
        kept = {name: value for name, value in message.items() if name not in _DROPPED}
        if kept.get("role") == "developer":
            kept["role"] = "system"  # the same under its older name, which templates know
        found.append(cast(Message, kept))
    return found


def beginning(messages: Sequence[Message]) -> bytes:
    """What of a conversation stays the same while it goes on."""
    return beginning_of([str(message.get("content", "")) for message in messages])


@router.post("/v1/chat/completions")
async def create(request: Request, body: Annotated[ChatBody, Depends(bodies.read(ChatBody))]) -> Response:
    """The next turn of a conversation."""
    gateway, exchange = gateway_of(request), exchange_of(request)
    exchange.names = body.names()
    model = await gateway.model(body.model, GENERATION)
    messages, options, answers = conversation(body.messages), body.options() | model.options, body.answers
    include_usage = body.include_usage()
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": now(), "model": body.model}
    several = body.parallel_tool_calls is not False
    begins = beginning(messages)
    if body.stream:
        exchange.stream = True

        def ask(client: AsyncClient) -> AsyncGenerator[GenerationChunk, None]:
            return client.stream(messages, model=model.name, n=answers, **options)

        chunks = await calls.parts(request, model, ask, beginning=begins, answers=answers)
        return calls.Stream(_events(request, body, chunks, head, include_usage=include_usage, several=several))

    async def one(client: AsyncClient) -> list[Generation]:
        return await client.generate_many(messages, answers, model=model.name, **options)

    found = await calls.whole(request, model, one, beginning=begins, answers=answers)
    used = usage(found[0].num_input_tokens, sum(each.num_output_tokens for each in found))
    exchange.tokens(used["prompt_tokens"], used["completion_tokens"])
    choices = [_choice(index, each, body, several=several) for index, each in enumerate(found)]
    return JSONResponse({**head, "object": "chat.completion", "choices": choices, "usage": used})


def _choice(index: int, found: Generation, body: ChatBody, *, several: bool) -> Json:
    message: Json = {"role": "assistant", "content": found.text, "refusal": None}
    tool_calls = [_call(call) for call in found.tool_calls if several or call.index == 0]
    if tool_calls:
        message |= {"content": found.text or None, "tool_calls": tool_calls}
    if found.reasoning:
        message["reasoning_content"] = found.reasoning
    return {
        "index": index,
        "message": message,
        "logprobs": _log_probs(found) if body.logprobs else None,
        "finish_reason": reason(found, calls=bool(tool_calls)),
        **noted(found),
    }


def _call(call: ToolCall) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _log_probs(chunk: GenerationChunk) -> Json:
    """The log-probability of each token of a chunk, and of the likeliest ones at its position."""

    def entry(token: bytes, log_prob: float) -> Json:
        return {"token": shown(token), "logprob": log_prob, "bytes": list(token)}

    content = []
    for index, (token, log_prob) in enumerate(zip(chunk.tokens, chunk.log_probs, strict=True)):
        top: list[Json] = []
        if chunk.top_tokens:
            pairs = zip(chunk.top_tokens[index], chunk.top_log_probs[index], strict=True)
            top = [entry(each, value) for each, (_, value) in pairs]
        content.append({**entry(token, log_prob), "top_logprobs": top})
    return {"content": content, "refusal": None}


async def _events(
    request: Request,
    body: ChatBody,
    chunks: AsyncGenerator[GenerationChunk, None],
    head: Json,
    *,
    include_usage: bool,
    several: bool,
) -> AsyncGenerator[bytes, None]:
    """A stream of answers as server-sent events."""
    head = {**head, "object": "chat.completion.chunk"}
    tail: Json = {"usage": None} if include_usage else {}
    begun: set[int] = set()
    called: set[int] = set()
    prompt, counts = 0, dict[int, int]()

    def told(
        index: int, delta: Json, ended: str | None = None, log_probs: Json | None = None, notes: Json = _NOTHING
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": ended, **notes}
        return event({**head, "choices": [choice], **tail})

    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                index = chunk.index
                prompt, counts[index] = chunk.num_input_tokens, chunk.num_output_tokens
                if index not in begun:
                    begun.add(index)
                    yield told(index, {"role": "assistant", "content": ""})
                delta = _delta(chunk, several=several)
                if "tool_calls" in delta:
                    called.add(index)
                log_probs = _log_probs(chunk) if body.logprobs and chunk.tokens else None
                if delta or log_probs:
                    yield told(index, delta, None, log_probs)
                if ended := reason(chunk, calls=index in called):
                    yield told(index, {}, ended, notes=noted(chunk))
        except ApiError as error:
            exchange_of(request).status = error.status
            yield event(error.openai())
            return
        finally:
            exchange_of(request).tokens(prompt, sum(counts.values()))
    if include_usage:
        yield event({**head, "choices": [], "usage": usage(prompt, sum(counts.values()))})
    yield DONE


def _delta(chunk: GenerationChunk, *, several: bool) -> Json:
    delta: dict[str, Any] = {}
    if chunk.reasoning:
        delta["reasoning_content"] = chunk.reasoning
    if chunk.text:
        delta["content"] = chunk.text
    tool_calls = []
    for call in chunk.tool_calls:
        if not several and call.index:
            continue
        if call.id:
            tool_calls.append({"index": call.index, **_call(call)})
        else:
            tool_calls.append({"index": call.index, "function": {"arguments": call.arguments}})
    if tool_calls:
        delta["tool_calls"] = tool_calls
    return delta
