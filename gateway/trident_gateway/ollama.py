"""Ollama's API: /api/chat, /api/generate, /api/embed, and what its clients ask before: /api/tags, /api/version."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from datetime import UTC, datetime
from importlib import metadata
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from trident_client import AsyncClient, Generation, GenerationChunk, Message, ToolCall
from trident_gateway import bodies, calls
from trident_gateway.bodies import Body, Neutral
from trident_gateway.catalog import GENERATION, Model
from trident_gateway.errors import ApiError, invalid
from trident_gateway.gateway import exchange_of, gateway_of
from trident_gateway.openai.chat import beginning, conversation
from trident_gateway.openai.embeddings import TASKS, embed, listed
from trident_gateway.openai.sampling import Json, reason
from trident_gateway.routing import beginning_of

router = APIRouter()
# What the server calls otherwise than Ollama does.
_NAMES = {
    "guided_json": "format",
    "max_tokens": "num_predict",
    "repetition_penalty": "repeat_penalty",
    "random_seed": "seed",
    "stop_words": "stop",
}
ModelName = Annotated[str, Field(min_length=1, max_length=256)]
_NANOSECONDS = 1e9


class Options(Body):
    """How an answer is made, in Ollama's words."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    seed: int | None = None
    num_predict: int | None = None
    stop: str | list[str] | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    # About the memory and the threads of Ollama's own models.
    num_ctx: Neutral = None
    num_batch: Neutral = None
    num_gpu: Neutral = None
    main_gpu: Neutral = None
    num_thread: Neutral = None
    num_keep: Neutral = None
    use_mmap: Neutral = None
    use_mlock: Neutral = None
    numa: Neutral = None
    low_vram: Neutral = None

    def options(self) -> Json:
        """The options of the client's calls."""
        found: Json = {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "typical_p": self.typical_p,
            "random_seed": None if self.seed is None else self.seed % 2**64,
            # -1 and -2 are "as many as there is room for", which the model's own limits say.
            "max_tokens": None if self.num_predict is None or self.num_predict < 0 else self.num_predict,
            "stop_words": [self.stop] if isinstance(self.stop, str) else self.stop,
            "repetition_penalty": self.repeat_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }
        return {name: value for name, value in found.items() if value is not None}


class OllamaBody(Body):
    """What chat and generate have in common."""

    model: ModelName
    stream: bool | None = None
    format: str | Json | None = None
    options: Options | None = None
    think: bool | str | None = None
    # Of no consequence for the answer.
    keep_alive: Neutral = None

    def given(self) -> Json:
        """The options of the client's calls.

        Raises:
            ApiError: the format is none.
        """
        found = {} if self.options is None else self.options.options()
        if self.format == "json":
            found["guided_json"] = {"type": "object"}
        elif isinstance(self.format, dict):
            found["guided_json"] = self.format
        elif self.format:
            raise invalid(f"format must be 'json' or a schema, found {self.format[:80]!r}", "format")
        return found

    def thinking(self) -> Json:
        """The options of a conversation that say whether the model thinks."""
        found: Json = {"return_reasoning": True}
        if self.think is not None:
            kwargs: Json = {"enable_thinking": bool(self.think)}
            if isinstance(self.think, str):
                kwargs["reasoning_effort"] = self.think
            found["chat_template_kwargs"] = kwargs
        return found


class OllamaChatBody(OllamaBody):
    """A conversation."""

    messages: list[Json]
    tools: list[Json] | None = None


class OllamaGenerateBody(OllamaBody):
    """A prompt, which the model's chat template reads unless it is raw."""

    prompt: str = ""
    system: str | None = None
    raw: bool | None = None
    suffix: str | None = None
    template: str | None = None
    context: list[int] | None = None
    images: list[str] | None = None


class OllamaEmbedBody(Body):
    """Texts to embed."""

    model: ModelName
    input: str | list[str]
    truncate: bool | None = None
    dimensions: int | None = None
    options: Neutral = None
    keep_alive: Neutral = None


@router.post("/api/chat")
async def chat(request: Request, body: Annotated[OllamaChatBody, Depends(bodies.read(OllamaChatBody))]) -> Response:
    """The next turn of a conversation."""
    if not body.messages:
        return await _loaded(request, body, {"message": {"role": "assistant", "content": ""}})
    messages = _messages(body.messages)
    options = body.given() | body.thinking()
    if body.tools:
        options["tools"] = body.tools

    def part(text: str, thinking: str, tool_calls: list[ToolCall]) -> Json:
        message: Json = {"role": "assistant", "content": text}
        if thinking:
            message["thinking"] = thinking
        if tool_calls:
            message["tool_calls"] = [_call(call) for call in tool_calls]
        return {"message": message}

    return await _answer(request, body, messages, options, beginning(messages), part)


@router.post("/api/generate")
async def generate(
    request: Request, body: Annotated[OllamaGenerateBody, Depends(bodies.read(OllamaGenerateBody))]
) -> Response:
    """How a prompt goes on."""
    for name in ("suffix", "template", "context"):
        if getattr(body, name):
            raise invalid(f"{name} is not known to any model here: leave it out", name)
    if body.images and body.raw:
        raise invalid("images can't be used with raw: leave one of the two out", "images")
    if not body.prompt:
        return await _loaded(request, body, {"response": ""})
    prompt: str | list[Message] = body.prompt
    options = body.given()
    if not body.raw:
        messages = [{"role": "system", "content": body.system}] if body.system else []
        content = _with_images(body.prompt, body.images) if body.images else body.prompt
        prompt = conversation([*messages, {"role": "user", "content": content}])
        options |= body.thinking()

    def part(text: str, thinking: str, tool_calls: list[ToolCall]) -> Json:
        return {"response": text, **({"thinking": thinking} if thinking else {})}

    begins = beginning_of([prompt]) if isinstance(prompt, str) else beginning(prompt)
    return await _answer(request, body, prompt, options, begins, part)


async def _loaded(request: Request, body: OllamaBody, nothing: Json) -> Response:
    """The answer to nothing, with which Ollama's clients have a model loaded; here it is, where it is known."""
    await gateway_of(request).model(body.model, GENERATION)
    ended = {"done": True, "done_reason": "unload" if body.keep_alive in (0, "0") else "load"}
    return JSONResponse({**_head(body.model), **nothing, **ended})


async def _answer(
    request: Request,
    body: OllamaBody,
    prompt: str | list[Message],
    options: Json,
    begins: bytes,
    part: Callable[[str, str, list[ToolCall]], Json],
) -> Response:
    """The answer of a generator; streamed unless the request says no.

    Args:
        part: what a line tells of an answer's new text, reasoning and calls.
    """
    began = time.perf_counter_ns()
    exchange_of(request).names = _NAMES
    model = await gateway_of(request).model(body.model, GENERATION)
    options |= model.options
    if body.stream is not False:
        exchange_of(request).stream = True

        def ask(client: AsyncClient) -> AsyncGenerator[GenerationChunk, None]:
            return client.stream(prompt, model=model.name, **options)

        chunks = await calls.parts(request, model, ask, beginning=begins)
        return calls.Stream(_lines(request, body.model, chunks, part, began), "application/x-ndjson")

    async def one(client: AsyncClient) -> Generation:
        return await client.generate(prompt, model=model.name, **options)

    found = await calls.whole(request, model, one, beginning=begins)
    exchange_of(request).tokens(found.num_input_tokens, found.num_output_tokens)
    told = part(found.text, found.reasoning, list(found.tool_calls))
    return JSONResponse({**_head(body.model), **told, **_end(found, began)})


async def _lines(
    request: Request,
    name: str,
    chunks: AsyncGenerator[GenerationChunk, None],
    part: Callable[[str, str, list[ToolCall]], Json],
    began: int,
) -> AsyncGenerator[bytes, None]:
    """A stream of answers, a line of JSON each; a call is told once it is complete."""
    open_calls: dict[int, ToolCall] = {}

    def line(content: Json) -> bytes:
        return json.dumps(content, ensure_ascii=False).encode() + b"\n"

    async with aclosing(chunks):
        last: GenerationChunk | None = None
        try:
            async for chunk in chunks:
                last = chunk
                for call in chunk.tool_calls:
                    begun = open_calls.get(call.index)
                    arguments = call.arguments if begun is None else begun.arguments + call.arguments
                    first = call if begun is None else begun
                    open_calls[call.index] = ToolCall(first.index, first.id, first.name, arguments)
                ended = reason(chunk)
                told = list(open_calls.values()) if ended else []
                if chunk.text or chunk.reasoning or told:
                    yield line({**_head(name), **part(chunk.text, chunk.reasoning, told), "done": False})
                if ended:
                    yield line({**_head(name), **part("", "", []), **_end(chunk, began)})
        except ApiError as error:
            exchange_of(request).status = error.status
            yield line({"error": error.message})
        finally:
            if last is not None:
                exchange_of(request).tokens(last.num_input_tokens, last.num_output_tokens)


def _head(name: str) -> Json:
    return {"model": name, "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z")}


def _end(chunk: GenerationChunk, began: int) -> Json:
    return {
        "done": True,
        "done_reason": reason(chunk),
        "total_duration": time.perf_counter_ns() - began,
        "load_duration": 0,
        "prompt_eval_count": chunk.num_input_tokens,
        "eval_count": chunk.num_output_tokens,
    }


def _messages(given: list[Json]) -> list[Message]:
    """A conversation in the words of chat templates.

    Raises:
        ApiError: there is none.
    """
    found = []
    for message in given:
        kept = {name: value for name, value in message.items() if name not in ("images", "thinking", "tool_name")}
        if message.get("thinking"):
            kept["reasoning_content"] = message["thinking"]
        if message.get("tool_name"):
            kept["name"] = message["tool_name"]
        if isinstance(kept.get("tool_calls"), list):
            kept["tool_calls"] = [{"type": "function", **call} for call in kept["tool_calls"]]
        if message.get("images"):
            kept["content"] = _with_images(kept.get("content"), message["images"])
        found.append(kept)
    return conversation(found)


def _with_images(text: Any, images: Any) -> list[Json]:
    """A content as parts: images, which come as base64, before the text.

    Raises:
        ApiError: the images are no list of texts.
    """
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise invalid("images must be a list of files as base64", "images")
    parts: list[Json] = [
        {"type": "image_url", "image_url": {"url": f"data:application/octet-stream;base64,{image}"}} for image in images
    ]
    return [*parts, {"type": "text", "text": text}] if text else parts


def _call(call: ToolCall) -> Json:
    """A call as Ollama has it, whose arguments are an object.

    Raises:
        ApiError: the model wrote what is none.
    """
    try:
        arguments: Any = call.parsed()
    except ValueError:
        raise ApiError(500, "the model called a tool with arguments that are no JSON", code="bad_tool_call") from None
    return {"function": {"name": call.name, "arguments": arguments}}


@router.post("/api/embed")
async def embeddings(
    request: Request, body: Annotated[OllamaEmbedBody, Depends(bodies.read(OllamaEmbedBody))]
) -> Response:
    """An embedding of each text."""
    began = time.perf_counter_ns()
    model = await gateway_of(request).model(body.model, *TASKS)
    vectors, count = await embed(
        request, model, listed(body.input, "input"), dimensions=body.dimensions, truncate=body.truncate
    )
    duration = time.perf_counter_ns() - began
    return JSONResponse(
        {
            "model": body.model,
            "embeddings": vectors.tolist(),
            "total_duration": duration,
            "load_duration": 0,
            "prompt_eval_count": count,
        }
    )


@router.get("/api/tags")
async def tags(request: Request) -> Response:
    """The models."""
    models = [_tag(model) for model in gateway_of(request).servers.models().values()]
    return JSONResponse({"models": models})


def _tag(model: Model) -> Json:
    return {
        "name": f"{model.name}:latest",
        "model": f"{model.name}:latest",
        "modified_at": "1970-01-01T00:00:00Z",  # a server does not say
        "size": 0,
        "digest": hashlib.sha256(model.name.encode()).hexdigest(),
        "details": {"format": "onnx", "family": model.task, "parameter_size": "", "quantization_level": ""},
    }


@router.get("/api/version")
async def version() -> Response:
    """Trident's version."""
    return JSONResponse({"version": metadata.version("trident-serving")})
