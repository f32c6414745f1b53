"""POST /v1/completions: a text or tokens, and how they go on."""

from __future__ import annotations

import asyncio
import codecs
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from trident_client import AsyncClient, Generation, GenerationChunk
from trident_gateway import bodies, calls
from trident_gateway.catalog import GENERATION, Model
from trident_gateway.errors import ApiError, invalid
from trident_gateway.gateway import exchange_of, gateway_of
from trident_gateway.openai.sampling import DONE, Json, Sampling, event, noted, now, reason, usage
from trident_gateway.routing import beginning_of

router = APIRouter()
Prompt = str | list[int]
DEFAULT_MAX_TOKENS = 16  # OpenAI's
MAX_PROMPTS = 2048
_AT_ONCE = 16  # prompts of one request


class CompletionBody(Sampling):
    """Prompts, and how they go on."""

    prompt: str | list[int] | list[str] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None

    def prompts(self) -> list[Prompt]:
        """Each prompt: a text, or tokens.

        Raises:
            ApiError: there are none, or too many.
        """
        given = self.prompt
        every: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
        if not every or [] in every:
            raise invalid("prompt is empty: give a text, or at least one token", "prompt")
        if len(every) > MAX_PROMPTS:
            raise invalid(f"prompt holds {len(every)} prompts, the limit is {MAX_PROMPTS}", "prompt")
        return every

    def options(self) -> Json:
        """See `Sampling.options`.

        Raises:
            ApiError: fields ask for what is not done here.
        """
        if self.best_of is not None and self.best_of != self.answers:
            raise invalid("best_of must be n: answers are not chosen among", "best_of")
        if self.suffix:
            raise invalid("suffix is not known to any model here: leave it out", "suffix")
        found = super().options()
        length = found.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
        if self.response_format is not None:
            found |= self.response_format.options()
        if self.echo:
            found["exclude_input_in_output"] = False
        if self.logprobs is not None:
            found |= {"return_log_probs": True, "top_logprobs": self.logprobs, "return_tokens": True}
            if self.echo:
                found["prompt_logprobs"] = self.logprobs
        if length == 0 or (self.echo and self.logprobs is not None):
            found["return_prompt_token_ids"] = True
        return found


@router.post("/v1/completions")
async def create(request: Request, body: Annotated[CompletionBody, Depends(bodies.read(CompletionBody))]) -> Response:
    """How each prompt goes on."""
    gateway, exchange = gateway_of(request), exchange_of(request)
    exchange.names = body.names()
    model = await gateway.model(body.model, GENERATION)
    prompts, options = body.prompts(), body.options() | model.options
    include_usage = body.include_usage()
    head = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": now(),
        "model": body.model,
    }
    if body.stream:
        exchange.stream = True
        first = await _chunks(request, model, prompts[0], options, body.answers)
        chunks = _every(request, model, first, prompts[1:], options, body.answers)
        return calls.Stream(_events(request, body, chunks, head, include_usage=include_usage))

    room = asyncio.Semaphore(_AT_ONCE)

    async def one(prompt: Prompt) -> list[Generation]:
        async with room:
            return await _answers(request, model, prompt, options, body.answers)

    found = await calls.unless_gone(request.receive, _together([one(prompt) for prompt in prompts]))
    used = usage(
        sum(answers[0].num_input_tokens for answers in found),
        sum(each.num_output_tokens for answers in found for each in answers),
    )
    exchange.tokens(used["prompt_tokens"], used["completion_tokens"])
    every = [each for answers in found for each in answers]
    choices = [
        {
            "index": index,
            "text": each.text,
            "logprobs": LogProbs(body.echo).of(each) if body.logprobs is not None else None,
            "finish_reason": reason(each),
            **noted(each),
        }
        for index, each in enumerate(every)
    ]
    return JSONResponse({**head, "choices": choices, "usage": used})


async def _together(work: Sequence[Any]) -> list[list[Generation]]:
    """The results of all, or the first failure, after which the others are cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


async def _answers(request: Request, model: Model, prompt: Prompt, options: Json, answers: int) -> list[Generation]:
    async def ask(client: AsyncClient) -> list[Generation]:
        return await client.generate_many(prompt, answers, model=model.name, **options)

    return await calls.turn(request, model, ask, beginning=_beginning(prompt), answers=answers)


async def _chunks(
    request: Request, model: Model, prompt: Prompt, options: Json, answers: int
) -> AsyncGenerator[GenerationChunk, None]:
    def ask(client: AsyncClient) -> AsyncGenerator[GenerationChunk, None]:
        return client.stream(prompt, model=model.name, n=answers, **options)

    return await calls.parts(request, model, ask, beginning=_beginning(prompt), answers=answers)


async def _every(
    request: Request,
    model: Model,
    first: AsyncGenerator[GenerationChunk, None],
    others: Sequence[Prompt],
    options: Json,
    answers: int,
) -> AsyncGenerator[tuple[int, GenerationChunk], None]:
    """The chunks of all prompts, one prompt after the other, each with the index of its answer."""
    async with aclosing(first):
        async for chunk in first:
            yield chunk.index, chunk
    for place, prompt in enumerate(others, 1):
        async with aclosing(await _chunks(request, model, prompt, options, answers)) as chunks:
            async for chunk in chunks:
                yield place * answers + chunk.index, chunk


def _beginning(prompt: Prompt) -> bytes:
    return beginning_of([prompt if isinstance(prompt, str) else str(prompt[:64])])


async def _events(
    request: Request,
    body: CompletionBody,
    chunks: AsyncGenerator[tuple[int, GenerationChunk], None],
    head: Json,
    *,
    include_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """A stream of answers as server-sent events."""
    tail: Json = {"usage": None} if include_usage else {}
    told: dict[int, LogProbs] = {}
    prompts, counts = dict[int, int](), dict[int, int]()
    async with aclosing(chunks):
        try:
            async for index, chunk in chunks:
                prompts[index // body.answers], counts[index] = chunk.num_input_tokens, chunk.num_output_tokens
                log_probs = None
                if body.logprobs is not None:
                    log_probs = told.setdefault(index, LogProbs(body.echo)).of(chunk)
                ended = reason(chunk)
                choice = {"index": index, "text": chunk.text, "logprobs": log_probs, "finish_reason": ended}
                choice |= noted(chunk)
                yield event({**head, "choices": [choice], **tail})
        except ApiError as error:
            exchange_of(request).status = error.status
            yield event(error.openai())
            return
        finally:
            exchange_of(request).tokens(sum(prompts.values()), sum(counts.values()))
    if include_usage:
        yield event({**head, "choices": [], "usage": usage(sum(prompts.values()), sum(counts.values()))})
    yield DONE


class LogProbs:
    """The log-probabilities of one answer in OpenAI's older form, with each token's place in the text.

    Args:
        echo: whether the prompt's tokens come first.
    """

    def __init__(self, echo: bool | None) -> None:
        self._echo = echo
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def of(self, chunk: GenerationChunk) -> Json:
        """Those of a chunk, which come behind those before."""
        told: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if self._echo and chunk.prompt_tokens:
            missing = (None,) * (len(chunk.prompt_tokens) - len(chunk.prompt_log_probs))
            tops = _tops(chunk.prompt_top_tokens, chunk.prompt_top_log_probs)
            self._add(told, chunk.prompt_tokens, (*missing, *chunk.prompt_log_probs), [*missing, *tops])
        self._add(told, chunk.tokens, chunk.log_probs, _tops(chunk.top_tokens, chunk.top_log_probs))
        return told

    def _add(
        self,
        told: Json,
        tokens: Sequence[bytes],
        log_probs: Sequence[float | None],
        tops: Sequence[dict[str, float] | None],
    ) -> None:
        for index, (token, log_prob) in enumerate(zip(tokens, log_probs, strict=True)):
            top = tops[index] if index < len(tops) else {}
            name = written(token)
            told["tokens"].append(name)
            told["token_logprobs"].append(log_prob)
            told["top_logprobs"].append(None if log_prob is None or top is None else {name: log_prob, **top})
            told["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(token))


def _tops(tokens: Sequence[Sequence[bytes]], pairs: Sequence[Sequence[tuple[int, float]]]) -> list[dict[str, float]]:
    """For each position, the likeliest tokens and their log-probabilities."""
    return [
        {written(token): value for token, (_, value) in zip(each, of, strict=True)}
        for each, of in zip(tokens, pairs, strict=True)
    ]


def written(token: bytes) -> str:
    """A token as a text; one that is no text by itself as its bytes, so that no two look alike."""
    try:
        return token.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
