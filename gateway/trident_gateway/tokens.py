"""POST /tokenize and /detokenize, as vLLM has them: the tokens of a prompt, and the text of tokens."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from trident_client import AsyncClient, Generation, Message
from trident_gateway import bodies, calls
from trident_gateway.bodies import Body
from trident_gateway.catalog import GENERATION, Model
from trident_gateway.errors import invalid
from trident_gateway.gateway import exchange_of, gateway_of
from trident_gateway.openai.chat import conversation
from trident_gateway.openai.sampling import Json, shown
from trident_gateway.rerank import ModelName

router = APIRouter()


class TokenizeBody(Body):
    """A text, or the messages of a chat."""

    model: ModelName
    prompt: str | None = None
    messages: list[Json] | None = None
    tools: list[Json] | None = None
    chat_template_kwargs: Json | None = None
    return_token_strs: bool | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None


class DetokenizeBody(Body):
    """Tokens by their ids."""

    model: ModelName
    tokens: list[int]


@router.post("/tokenize")
async def tokenize(request: Request, body: Annotated[TokenizeBody, Depends(bodies.read(TokenizeBody))]) -> Response:
    """The tokens of a prompt as the model reads it."""
    if (body.prompt is None) == (body.messages is None):
        raise invalid("give exactly one of prompt and messages", "prompt")
    if body.add_special_tokens is False and body.prompt is not None:
        raise invalid("add_special_tokens can't be false: the model reads no text without them", "add_special_tokens")
    if body.add_generation_prompt is False:
        raise invalid(
            "add_generation_prompt can't be false: the model reads no other conversation", "add_generation_prompt"
        )
    if body.prompt is not None and (body.tools or body.chat_template_kwargs):
        raise invalid("tools and chat_template_kwargs need messages", "tools")
    model = await gateway_of(request).model(body.model)
    if model.task != GENERATION:
        return await _of_an_encoder(request, model, body)
    options: Json = {"return_tokens": body.return_token_strs is True}
    if body.tools:
        options["tools"] = body.tools
    if body.chat_template_kwargs:
        options["chat_template_kwargs"] = body.chat_template_kwargs
    prompt = body.prompt if body.prompt is not None else conversation(body.messages or [])
    found = await _prompt(request, model, prompt, options)
    answer: Json = {"count": len(found.prompt_token_ids), "max_model_len": model.context}
    answer["tokens"] = list(found.prompt_token_ids)
    if body.return_token_strs:
        answer["token_strs"] = [shown(token) for token in found.prompt_tokens]
    return JSONResponse(answer)


async def _of_an_encoder(request: Request, model: Model, body: TokenizeBody) -> Response:
    """The tokens of a text as an encoder reads it."""
    text = body.prompt
    if not model.tokenizer or text is None:
        raise invalid(f"the model {model.name!r} tokenizes texts only: give prompt", "messages")
    if body.return_token_strs:
        raise invalid(f"the tokens of {model.name!r} have ids only", "return_token_strs")

    async def ask(client: AsyncClient) -> list[list[int]]:
        return await client.tokenize([text], model=model.name)

    (ids,) = await calls.whole(request, model, ask)
    return JSONResponse({"count": len(ids), "max_model_len": model.context, "tokens": ids})


@router.post("/detokenize")
async def detokenize(
    request: Request, body: Annotated[DetokenizeBody, Depends(bodies.read(DetokenizeBody))]
) -> Response:
    """The text of tokens, special ones too."""
    model = await gateway_of(request).model(body.model, GENERATION)
    if not body.tokens:
        return JSONResponse({"prompt": ""})
    options = {"exclude_input_in_output": False, "skip_special_tokens": False}
    found = await _prompt(request, model, body.tokens, options)
    return JSONResponse({"prompt": found.text})


async def _prompt(request: Request, model: Model, prompt: str | list[Message] | list[int], options: Json) -> Generation:
    """A prompt as the server reads it; the model itself does not run."""

    async def ask(client: AsyncClient) -> Generation:
        return await client.generate(prompt, model=model.name, max_tokens=0, return_prompt_token_ids=True, **options)

    found = await calls.whole(request, model, ask)
    exchange_of(request).tokens(found.num_input_tokens)
    return found
