"""POST /embed, /rerank and /predict, as the clients of Hugging Face's Text Embeddings Inference ask.

They name no model: it is the server's only one of the task, or the one that an extra field `model` names.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from trident_client import Label
from trident_gateway import bodies
from trident_gateway.bodies import Body
from trident_gateway.catalog import CLASSIFICATION, EMBEDDING, HYBRID, RANKING
from trident_gateway.classify import classified
from trident_gateway.errors import invalid
from trident_gateway.gateway import gateway_of
from trident_gateway.openai.embeddings import embed, listed
from trident_gateway.openai.sampling import Json
from trident_gateway.rerank import ranked

router = APIRouter()


class TeiBody(Body):
    """What all three have."""

    model: Annotated[str, Field(max_length=256)] = ""
    truncate: bool | None = None
    truncation_direction: Literal["right", "Right"] | None = None


class EmbedBody(TeiBody):
    """Texts to embed."""

    inputs: str | list[str]
    normalize: bool | None = None
    prompt_name: str | None = None
    dimensions: int | None = None


class TeiRerankBody(TeiBody):
    """A query and passages."""

    query: str
    texts: list[str]
    raw_scores: bool | None = None
    return_text: bool | None = None


class PredictParameters(Body):
    """What huggingface_hub adds."""

    top_k: Annotated[int, Field(ge=1)] | None = None
    function_to_apply: None = None


class PredictBody(TeiBody):
    """A text, a pair of texts, or a list of either."""

    inputs: str | list[str] | list[list[str]]
    raw_scores: bool | None = None
    parameters: PredictParameters | None = None


@router.post("/embed")
async def vectors(request: Request, body: Annotated[EmbedBody, Depends(bodies.read(EmbedBody))]) -> Response:
    """An embedding of each text, of length 1."""
    if body.normalize is False:
        raise invalid("normalize can't be false: embeddings here have length 1", "normalize")
    model = await gateway_of(request).model(body.model, EMBEDDING, HYBRID, param="inputs")
    texts = listed(body.inputs, "inputs")
    found, _ = await embed(
        request,
        model,
        texts,
        counted=False,
        dimensions=body.dimensions,
        prompt_name=body.prompt_name,
        truncate=body.truncate,
    )
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    if not np.allclose(lengths, 1, atol=1e-5):
        found = found / np.maximum(lengths, 1e-12)
    return JSONResponse(found.tolist())


@router.post("/rerank")
async def rerank(request: Request, body: Annotated[TeiRerankBody, Depends(bodies.read(TeiRerankBody))]) -> Response:
    """The passages, best first; the scores are what the model's files make of them."""
    if body.raw_scores:
        raise invalid("raw_scores can't be true: scores are as the model's files say", "raw_scores")
    model = await gateway_of(request).model(body.model, RANKING, param="texts")
    texts = listed(body.texts, "texts")
    found, _ = await ranked(request, model, body.query, texts, counted=False, truncate=body.truncate)
    answer: list[Json] = [{"index": each.index, "score": each.score} for each in found]
    if body.return_text:
        for each in answer:
            each["text"] = texts[each["index"]]
    return JSONResponse(answer)


@router.post("/predict")
async def predict(request: Request, body: Annotated[PredictBody, Depends(bodies.read(PredictBody))]) -> Response:
    """The classes of each text or pair, the likeliest first; of a single one, its list alone."""
    if body.raw_scores:
        raise invalid("raw_scores can't be true: scores are as the model's files say", "raw_scores")
    model = await gateway_of(request).model(body.model, CLASSIFICATION, param="inputs")
    texts, pairs, single = _inputs(body.inputs)
    found, _ = await classified(request, model, listed(texts, "inputs"), pairs, body.truncate)
    top_k = None if body.parameters is None else body.parameters.top_k
    answers = [_labels(each[:top_k]) for each in found]
    return JSONResponse(answers[0] if single else answers)


def _inputs(given: str | list[str] | list[list[str]]) -> tuple[list[str], list[str] | None, bool]:
    """The texts, the second ones of pairs, and whether there is only one text or pair.

    A flat list is one text or one pair, as TEI reads it; several are lists within the list.

    Raises:
        ApiError: texts and pairs are mixed, or a pair is none.
    """
    if isinstance(given, str):
        return [given], None, True
    flat = [each for each in given if isinstance(each, str)]
    rows = [flat] if flat else [each for each in given if not isinstance(each, str)]
    lengths = {len(row) for row in rows}
    if lengths == {1}:
        return [row[0] for row in rows], None, bool(flat)
    if lengths == {2}:
        return [row[0] for row in rows], [row[1] for row in rows], bool(flat)
    raise invalid(
        "inputs must be a text, a pair [text, text], or a list of lists: all of one text or all pairs", "inputs"
    )


def _labels(found: list[Label]) -> list[Json]:
    return [{"label": each.label, "score": each.score} for each in found]
