"""POST /v1/explain, of our own: which words the answer of a model rests on."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from trident_client import AsyncClient, Explanation
from trident_gateway import bodies, calls
from trident_gateway.bodies import Body
from trident_gateway.errors import invalid
from trident_gateway.gateway import exchange_of, gateway_of
from trident_gateway.rerank import ModelName

router = APIRouter()
_NAMES = {"text_input": "input"}  # the server's, and the caller's
_AT_ONCE = 2  # that a server explains of one model; those that wait for it would keep answers of the model waiting


class ExplainBody(Body):
    """A text, and what is asked of it; which of the others a model takes follows from its task."""

    model: ModelName
    input: str
    by: Literal["word", "sentence", "token"] | None = None
    label: str | None = None
    text_pair: str | None = None
    query: str | None = None
    question: str | None = None
    candidate_labels: list[str] | None = None
    hypothesis_template: str | None = None
    multi_label: bool | None = None
    answer: str | None = None
    chat: bool | None = None
    max_tokens: int | None = None
    response_format: Literal["json", "html"] = "json"


@router.post("/v1/explain")
async def explain(request: Request, body: Annotated[ExplainBody, Depends(bodies.read(ExplainBody))]) -> Response:
    """What each statement of the model about the text rests on: as data, or as a page."""
    exchange_of(request).names = dict(_NAMES)
    model = await gateway_of(request).model(body.model)
    if not model.explained or model.adapter:
        raise invalid(
            f"the model {body.model!r} is not explained: set explain = true in its table of models.toml",
            "model",
            code="model_not_suitable",
        )
    asked: Any = body.model_dump(exclude={"model", "input", "response_format"}, exclude_none=True)

    async def page(client: AsyncClient) -> str:
        return await client.explain_page(body.input, model=model.name, **asked)

    async def data(client: AsyncClient) -> list[Explanation]:
        return await client.explain(body.input, model=model.name, **asked)

    turns = calls.Turns(f"{model.name}_explain", _AT_ONCE)
    if body.response_format == "html":
        shown = await calls.whole(request, model, page, turns=turns)
        return HTMLResponse(shown, headers={"content-security-policy": _POLICY})
    found = [asdict(each) for each in await calls.whole(request, model, data, turns=turns)]
    return JSONResponse({"object": "list", "model": body.model, "data": found})


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox"
