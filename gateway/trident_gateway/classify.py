"""POST /v1/classify: a classifier's classes as vLLM asks for them, or labels of the request's own as Jina does."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from trident_client import AsyncClient, Label
from trident_gateway import bodies, calls
from trident_gateway.bodies import Body, Neutral
from trident_gateway.catalog import CLASSIFICATION, ZERO_SHOT, Model
from trident_gateway.gateway import exchange_of, gateway_of
from trident_gateway.openai.embeddings import TOKENIZERS_NAMES, listed
from trident_gateway.openai.sampling import Json, now
from trident_gateway.rerank import ModelName

router = APIRouter()


class ClassifyBody(Body):
    """Texts, and for a zero-shot model what they may be about."""

    model: ModelName
    input: str | list[str]
    labels: list[str] | None = None
    truncate: bool | None = None
    user: Neutral = None
    priority: Neutral = None


async def classified(
    request: Request,
    model: Model,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    truncate: bool | None = None,
    *,
    counted: bool = False,
) -> tuple[list[list[Label]], int]:
    """All classes of each text, the likeliest first, and how many tokens the texts have; 0 unless they are counted.

    Raises:
        ApiError: see `calls.whole`.
    """

    async def ask(client: AsyncClient) -> tuple[list[list[Label]], int]:
        classes = client.classify(
            texts, text_pairs=pairs, model=model.name, top_k=max(model.labels, 1), truncate=truncate
        )
        if not counted:
            return await classes, 0
        found, tokens = await asyncio.gather(classes, client.tokenize(texts, model=model.name, truncate=truncate))
        return found, sum(map(len, tokens))

    exchange_of(request).names = TOKENIZERS_NAMES
    found, count = await calls.whole(request, model, ask)
    if counted:
        exchange_of(request).tokens(count)
    return found, count


@router.post("/v1/classify")
async def create(request: Request, body: Annotated[ClassifyBody, Depends(bodies.read(ClassifyBody))]) -> Response:
    """The class of each text, and the scores of all classes."""
    texts = listed(body.input, "input")
    labels = body.labels
    count = None
    if labels is not None:
        model = await gateway_of(request).model(body.model, ZERO_SHOT)

        async def ask(client: AsyncClient) -> list[list[Label]]:
            return await client.classify_zero_shot(texts, labels, model=model.name, truncate=body.truncate)

        found = await calls.whole(request, model, ask)
    else:
        model = await gateway_of(request).model(body.model, CLASSIFICATION)
        found, count = await classified(request, model, texts, truncate=body.truncate, counted=True)
    used = {} if count is None else {"usage": {"prompt_tokens": count, "total_tokens": count}}
    return JSONResponse(
        {
            "id": f"classify-{secrets.token_hex(12)}",
            "object": "list",
            "created": now(),
            "model": body.model,
            "data": [_entry(index, classes, labels) for index, classes in enumerate(found)],
            **used,
        }
    )


def _entry(index: int, classes: Sequence[Label], asked: Sequence[str] | None) -> Json:
    best = classes[0]
    # In the order of the model's config, or of the request; a server of an earlier version does not tell the former.
    numbers = [each.label_id if asked is None else asked.index(each.label) for each in classes]
    ordered = {number: each.score for number, each in zip(numbers, classes, strict=True) if number is not None}
    probs = {"probs": [ordered[number] for number in sorted(ordered)]} if len(ordered) == len(classes) else {}
    return {
        "index": index,
        "object": "classification",
        "label": best.label,
        "prediction": best.label,
        "score": best.score,
        **probs,
        "num_classes": len(classes),
        "predictions": [{"label": each.label, "score": each.score} for each in classes],
    }
