"""POST /v1/translate and /v1/entities, of our own, because no other API that the gateway speaks has them."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from trident_client import AsyncClient, Entity, Translation
from trident_gateway import bodies, calls
from trident_gateway.bodies import Body
from trident_gateway.catalog import ENTITIES, TRANSLATION
from trident_gateway.gateway import exchange_of, gateway_of
from trident_gateway.openai.embeddings import listed
from trident_gateway.openai.sampling import Json
from trident_gateway.rerank import ModelName

router = APIRouter()


class TranslateBody(Body):
    """Texts, and their languages as the model names them; a model of one pair needs none."""

    model: ModelName
    input: str | list[str]
    source_lang: str | None = None
    target_lang: str | None = None
    max_tokens: int | None = None
    num_beams: int | None = None
    long_input: Literal["error", "truncate", "window"] | None = None


class EntitiesBody(Body):
    """Texts, and how tokens become words."""

    model: ModelName
    input: str | list[str]
    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] | None = None
    truncate: bool | None = None


@router.post("/v1/translate")
async def translate(request: Request, body: Annotated[TranslateBody, Depends(bodies.read(TranslateBody))]) -> Response:
    """The translation of each text."""
    model = await gateway_of(request).model(body.model, TRANSLATION)
    texts = listed(body.input, "input")

    async def ask(client: AsyncClient) -> list[Translation]:
        return await client.translate(
            texts,
            model=model.name,
            source_lang=body.source_lang,
            target_lang=body.target_lang,
            max_tokens=body.max_tokens,
            num_beams=body.num_beams,
            long_input=body.long_input,
        )

    found = await calls.whole(request, model, ask)
    read, written = sum(each.num_input_tokens for each in found), sum(each.num_output_tokens for each in found)
    exchange_of(request).tokens(read, written)
    data = [
        {"index": index, "object": "translation", "text": each.text, "finish_reason": each.finish_reason}
        for index, each in enumerate(found)
    ]
    used = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    return JSONResponse({"object": "list", "model": body.model, "data": data, "usage": used})


@router.post("/v1/entities")
async def entities(request: Request, body: Annotated[EntitiesBody, Depends(bodies.read(EntitiesBody))]) -> Response:
    """The entities in each text; `start` and `end` count characters, which are Unicode's code points."""
    model = await gateway_of(request).model(body.model, ENTITIES)
    texts = listed(body.input, "input")

    async def ask(client: AsyncClient) -> list[list[Entity]]:
        return await client.entities(
            texts, model=model.name, aggregation_strategy=body.aggregation_strategy, truncate=body.truncate
        )

    found = await calls.whole(request, model, ask)
    data = [
        {"index": index, "object": "entities", "entities": [_entity(each) for each in every]}
        for index, every in enumerate(found)
    ]
    return JSONResponse({"object": "list", "model": body.model, "data": data})


def _entity(found: Entity) -> Json:
    return {
        "entity": found.entity,
        "score": found.score,
        "word": found.word,
        "start": found.start,
        "end": found.end,
    }
