"""POST /v1/rerank as Jina's and Cohere's clients ask, /v2/rerank as Cohere's do today, and /v1/score as vLLM has it."""

from __future__ import annotations

import asyncio
import secrets
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from trident_client import AsyncClient, Ranked
from trident_gateway import bodies, calls
from trident_gateway.bodies import Body, Neutral
from trident_gateway.catalog import EMBEDDING, HYBRID, RANKING, Model
from trident_gateway.errors import invalid
from trident_gateway.gateway import exchange_of, gateway_of
from trident_gateway.openai.embeddings import MAX_TEXTS, TOKENIZERS_NAMES, embed, listed
from trident_gateway.openai.sampling import Json, now

router = APIRouter()
ModelName = Annotated[str, Field(min_length=1, max_length=256)]


class Document(Body):
    """A passage as an object."""

    text: str


class RerankBody(Body):
    """A query and passages."""

    model: ModelName
    query: str
    documents: list[str | Document]
    top_n: int | None = None
    return_documents: bool | None = None
    # Not theirs.
    prompt_name: str | None = None
    truncate: bool | None = None
    # Of no consequence for the answer.
    user: Neutral = None
    priority: Neutral = None


class Rerank2Body(Body):
    """The same as Cohere has it today."""

    model: ModelName
    query: str
    documents: list[str]
    top_n: int | None = None
    max_tokens_per_doc: int | None = None
    priority: Neutral = None


class ScoreBody(Body):
    """Texts and what they are compared with."""

    model: ModelName
    text_1: str | list[str]
    text_2: str | list[str]
    truncate: bool | None = None
    user: Neutral = None
    priority: Neutral = None


async def ranked(
    request: Request,
    model: Model,
    query: str,
    texts: list[str],
    *,
    counted: bool,
    prompt_name: str | None = None,
    truncate: bool | None = None,
) -> tuple[list[Ranked], int]:
    """The passages, best first, and how many tokens were read; 0 unless they are counted, which takes another call.

    Raises:
        ApiError: see `calls.whole`.
    """

    async def ask(client: AsyncClient) -> tuple[list[Ranked], int]:
        ranking = client.rank(query, texts, model=model.name, prompt_name=prompt_name, truncate=truncate)
        if not counted:
            return await ranking, 0
        queries = [query] * len(texts)
        counting = client.tokenize(queries, text_pairs=texts, model=model.name, truncate=truncate)
        found, tokens = await asyncio.gather(ranking, counting)
        return found, sum(map(len, tokens))

    exchange_of(request).names = TOKENIZERS_NAMES
    found, count = await calls.whole(request, model, ask)
    if counted:
        exchange_of(request).tokens(count)
    return found, count


def first(top_n: int | None, found: list[Ranked]) -> list[Ranked]:
    """The best ones.

    Raises:
        ApiError: none are wanted.
    """
    if top_n is not None and top_n < 1:
        raise invalid(f"top_n must be at least 1, found {top_n}", "top_n")
    return found[:top_n]


def passages(documents: list[Any], param: str) -> list[str]:
    """The texts of documents.

    Raises:
        ApiError: there are none, or too many.
    """
    texts = [each.text if isinstance(each, Document) else each for each in documents]
    return listed(texts, param)


@router.post("/v1/rerank")
async def rerank(request: Request, body: Annotated[RerankBody, Depends(bodies.read(RerankBody))]) -> Response:
    """The passages, best first: with what Jina's clients read, and what Cohere's do."""
    model = await gateway_of(request).model(body.model, RANKING)
    texts = passages(body.documents, "documents")
    found, count = await ranked(
        request, model, body.query, texts, counted=True, prompt_name=body.prompt_name, truncate=body.truncate
    )
    results: list[Json] = [{"index": each.index, "relevance_score": each.score} for each in first(body.top_n, found)]
    if body.return_documents is not False:
        for result in results:
            result["document"] = {"text": texts[result["index"]]}
    return JSONResponse(
        {
            "id": f"rerank-{secrets.token_hex(12)}",
            "object": "list",
            "model": body.model,
            "results": results,
            "usage": {"prompt_tokens": count, "total_tokens": count},
            "meta": _meta("1"),
        }
    )


@router.post("/v2/rerank")
async def rerank2(request: Request, body: Annotated[Rerank2Body, Depends(bodies.read(Rerank2Body))]) -> Response:
    """The passages, best first, as Cohere's clients read them."""
    model = await gateway_of(request).model(body.model, RANKING)
    texts, cut = passages(body.documents, "documents"), body.max_tokens_per_doc is not None
    found, _ = await ranked(request, model, body.query, texts, counted=False, truncate=cut or None)
    results = [{"index": each.index, "relevance_score": each.score} for each in first(body.top_n, found)]
    return JSONResponse({"id": f"rerank-{secrets.token_hex(12)}", "results": results, "meta": _meta("2")})


def _meta(version: str) -> Json:
    return {"api_version": {"version": version}, "billed_units": {"search_units": 1}}


@router.post("/v1/score")
async def score(request: Request, body: Annotated[ScoreBody, Depends(bodies.read(ScoreBody))]) -> Response:
    """How well texts go together: a ranker's scores, or the cosines of an embedder's vectors."""
    model = await gateway_of(request).model(body.model, RANKING, EMBEDDING, HYBRID)
    left, right = listed(body.text_1, "text_1"), listed(body.text_2, "text_2")
    if len(left) not in (1, len(right)):
        raise invalid(f"text_1 holds {len(left)} texts, text_2 {len(right)}: give one, or one for each", "text_1")
    left = left * len(right) if len(left) == 1 else left
    if model.task == RANKING:
        scores, count = await _scores(request, model, left, right, body.truncate)
    else:
        vectors, count = await embed(request, model, [*left, *right], truncate=body.truncate)
        units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        scores = (units[: len(left)] * units[len(left) :]).sum(axis=1).tolist()
    return JSONResponse(
        {
            "id": f"score-{secrets.token_hex(12)}",
            "object": "list",
            "created": now(),
            "model": body.model,
            "data": [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores)],
            "usage": {"prompt_tokens": count, "total_tokens": count},
        }
    )


async def _scores(
    request: Request, model: Model, queries: list[str], texts: list[str], truncate: bool | None
) -> tuple[list[float], int]:
    """A ranker's score of each text for its query."""
    by_query: dict[str, list[int]] = {}
    for place, query in enumerate(queries):
        by_query.setdefault(query, []).append(place)
    if len(by_query) > MAX_TEXTS:
        raise invalid(f"text_1 holds {len(by_query)} different texts, the limit is {MAX_TEXTS}", "text_1")
    scores, total = [0.0] * len(texts), 0
    for query, places in by_query.items():
        found, count = await ranked(
            request, model, query, [texts[place] for place in places], counted=True, truncate=truncate
        )
        total += count
        for each in found:
            scores[places[each.index]] = each.score
    exchange_of(request).tokens(total)
    return scores, total
