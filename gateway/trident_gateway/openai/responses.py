"""POST /v1/responses: text, tools and reasoning, streamed or not. Nothing is stored, so nothing can be referred to."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from trident_client import AsyncClient, Generation, GenerationChunk
from trident_gateway import bodies, calls
from trident_gateway.bodies import Body, Neutral
from trident_gateway.catalog import GENERATION
from trident_gateway.errors import ApiError, invalid
from trident_gateway.gateway import exchange_of, gateway_of
from trident_gateway.openai.chat import beginning
from trident_gateway.openai.items import Assembly, messages_of
from trident_gateway.openai.sampling import Json, event

router = APIRouter()
LOG_PROBS = "message.output_text.logprobs"
_NOTHING = ("reasoning.encrypted_content",)  # reasoning is never encrypted here, it is given as it is


class Format(Body):
    """The form of the text."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    schema_: Json | None = Field(None, alias="schema")
    name: Neutral = None
    description: Neutral = None
    strict: Neutral = None


class Text(Body):
    """What is asked of the text."""

    format: Format | None = None
    verbosity: str | None = None


class Reasoning(Body):
    """How much the model thinks."""

    effort: str | None = None
    summary: Neutral = None
    generate_summary: Neutral = None


class ResponsesStreamOptions(Body):
    """Options of a stream, none of which changes anything here."""

    include_obfuscation: Neutral = None


class ResponsesBody(Body):
    """What went before, and how it goes on."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: str | list[Json]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None
    # Of no consequence for the answer.
    max_tool_calls: Neutral = None
    metadata: Json | None = None
    store: Neutral = None
    user: Neutral = None
    service_tier: Neutral = None
    safety_identifier: Neutral = None
    prompt_cache_key: Neutral = None
    prompt_cache_options: Neutral = None
    prompt_cache_retention: Neutral = None

    @property
    def log_probs(self) -> bool:
        """Whether the tokens' log-probabilities are told."""
        return LOG_PROBS in (self.include or ())

    def options(self) -> Json:
        """The options of the client's calls.

        Raises:
            ApiError: fields ask for what no model here does.
        """
        for each in self.include or ():
            if each not in (LOG_PROBS, *_NOTHING):
                raise invalid(f"include can't name {each[:80]!r} here", "include")
        if self.text is not None and self.text.verbosity not in (None, "medium"):
            raise invalid("text.verbosity is not known to any model here: leave it out", "text")
        found: Json = {"return_reasoning": True}
        for name, value in (
            ("max_tokens", self.max_output_tokens),
            ("temperature", self.temperature),
            ("top_p", self.top_p),
        ):
            if value is not None:
                found[name] = value
        if self.log_probs:
            found |= {"return_log_probs": True, "top_logprobs": self.top_logprobs or 0, "return_tokens": True}
        elif self.top_logprobs:
            raise invalid(f"top_logprobs needs include to name {LOG_PROBS!r}", "top_logprobs")
        if self.reasoning is not None and self.reasoning.effort is not None:
            found["chat_template_kwargs"] = {"reasoning_effort": self.reasoning.effort}
            if self.reasoning.effort == "none":
                found["chat_template_kwargs"]["enable_thinking"] = False
        return found | self._form() | self._tools()

    def _form(self) -> Json:
        wanted = None if self.text is None else self.text.format
        if wanted is None or wanted.type == "text":
            return {}
        if wanted.type == "json_object":
            return {"guided_json": {"type": "object"}}
        if wanted.schema_ is None:
            raise invalid("text.format of type json_schema needs schema", "text")
        return {"guided_json": wanted.schema_}

    def _tools(self) -> Json:
        found: Json = {}
        if self.tools:
            for index, tool in enumerate(self.tools):
                if tool.get("type") != "function":
                    raise invalid(f"tools[{index}].type can only be 'function' here", "tools")
            inner = [{name: value for name, value in tool.items() if name != "type"} for tool in self.tools]
            found["tools"] = [{"type": "function", "function": tool} for tool in inner]
        choice = self.tool_choice
        if isinstance(choice, dict):
            if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
                raise invalid("tool_choice must be a word, or name a function", "tool_choice")
            found["tool_choice"] = {"type": "function", "function": {"name": choice["name"]}}
        elif choice is not None and (self.tools or choice not in ("none", "auto")):
            found["tool_choice"] = choice
        return found

    def told(self) -> Json:
        """What the response repeats of the request."""
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "model": self.model,
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None if self.reasoning is None else self.reasoning.effort, "summary": None},
            "store": False,
            "temperature": self.temperature,
            "text": {"format": self._told_format()},
            "tool_choice": self.tool_choice if self.tool_choice is not None else "auto",
            "tools": self.tools or [],
            "top_p": self.top_p,
            "truncation": "disabled",
            "metadata": self.metadata or {},
        }

    def _told_format(self) -> Json:
        if self.text is None or self.text.format is None:
            return {"type": "text"}
        return self.text.format.model_dump(by_alias=True, exclude_none=True)


@router.post("/v1/responses")
async def create(request: Request, body: Annotated[ResponsesBody, Depends(bodies.read(ResponsesBody))]) -> Response:
    """What the model answers."""
    gateway, exchange = gateway_of(request), exchange_of(request)
    exchange.names = {"guided_json": "text", "max_tokens": "max_output_tokens", "messages": "input"}
    model = await gateway.model(body.model, GENERATION)
    messages, options = messages_of(body.input, body.instructions), body.options() | model.options
    assembly = Assembly(body.told(), log_probs=body.log_probs, several=body.parallel_tool_calls is not False)
    if body.stream:
        exchange.stream = True

        def ask(client: AsyncClient) -> AsyncGenerator[GenerationChunk, None]:
            return client.stream(messages, model=model.name, **options)

        return calls.Stream(
            _events(request, await calls.parts(request, model, ask, beginning=beginning(messages)), assembly)
        )

    async def one(client: AsyncClient) -> Generation:
        return await client.generate(messages, model=model.name, **options)

    found = await calls.whole(request, model, one, beginning=beginning(messages))
    exchange.tokens(found.num_input_tokens, found.num_output_tokens)
    assembly.add(found)
    assembly.end()
    return JSONResponse(assembly.response)


async def _events(
    request: Request, chunks: AsyncGenerator[GenerationChunk, None], assembly: Assembly
) -> AsyncGenerator[bytes, None]:
    """The stream of events."""

    def coded(events: list[Json]) -> bytes:
        return b"".join(event(each, each["type"]) for each in events)

    yield coded(assembly.begin())
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                if told := assembly.add(chunk):
                    yield coded(told)
            yield coded(assembly.end())
        except ApiError as error:
            exchange_of(request).status = error.status
            yield coded(assembly.fail(error))
        finally:
            exchange_of(request).tokens(assembly.prompt_tokens, assembly.completion_tokens)
