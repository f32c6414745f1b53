"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Request
from numpy.typing import NDArray
from pydantic import Field
from starlette.responses import JSONResponse, Response

from trident_client import AsyncClient
from trident_gateway import bodies, calls
from trident_gateway.bodies import Body, Neutral
from trident_gateway.catalog import EMBEDDING, HYBRID, Model
from trident_gateway.errors import invalid
from trident_gateway.gateway import exchange_of, gateway_of

router = APIRouter()
MAX_TEXTS = 2048
# What counts the tokens refuses a text that is too long, too, and may be the first to do so.
TOKENIZERS_NAMES = {"prompt": "input"}
TASKS = (EMBEDDING, HYBRID)


class EmbeddingBody(Body):
    """Texts, and the form of their embeddings."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    # Not OpenAI's.
    prompt_name: str | None = None
    truncate: bool | None = None
    truncate_prompt_tokens: int | None = None
    # Of no consequence for the answer.
    user: Neutral = None

    def cut(self, model: Model) -> bool | None:
        """Whether texts that are too long are cut; vLLM's word for it is the length that they are cut to.

        Raises:
            ApiError: it is another one than the model's.
        """
        if self.truncate_prompt_tokens is None:
            return self.truncate
        if self.truncate_prompt_tokens not in (-1, model.context):
            raise invalid(
                f"truncate_prompt_tokens must be {model.context}, at which the model cuts, or -1, found "
                f"{self.truncate_prompt_tokens}",
                "truncate_prompt_tokens",
            )
        return True


@router.post("/v1/embeddings")
async def create(request: Request, body: Annotated[EmbeddingBody, Depends(bodies.read(EmbeddingBody))]) -> Response:
    """An embedding of each text."""
    model = await gateway_of(request).model(body.model, *TASKS)
    texts = listed(body.input, "input")
    vectors, count = await embed(
        request, model, texts, dimensions=body.dimensions, prompt_name=body.prompt_name, truncate=body.cut(model)
    )
    coded: list[Any]
    if body.encoding_format == "base64":
        coded = [base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii") for vector in vectors]
    else:
        coded = vectors.tolist()
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(coded)]
    used = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": used})


def listed(given: str | Sequence[Any], param: str) -> list[str]:
    """One text or several as a list.

    Raises:
        ApiError: there are none, too many, or tokens in their place.
    """
    texts = [given] if isinstance(given, str) else list(given)
    if not texts:
        raise invalid(f"{param} is empty: give at least one text", param)
    if len(texts) > MAX_TEXTS:
        raise invalid(f"{param} holds {len(texts)} texts, the limit is {MAX_TEXTS}", param)
    if not all(isinstance(text, str) for text in texts):
        raise invalid(
            f"{param} holds token ids: send texts, since only the model knows its tokens (in LangChain: "
            "check_embedding_ctx_length=False)",
            param,
        )
    return texts


async def embed(
    request: Request,
    model: Model,
    texts: list[str],
    *,
    counted: bool = True,
    dimensions: int | None = None,
    prompt_name: str | None = None,
    truncate: bool | None = None,
) -> tuple[NDArray[np.float32], int]:
    """The embeddings of texts, and how many tokens they have.

    Args:
        counted: whether the tokens are counted, which takes another call; else their number is 0.

    Raises:
        ApiError: see `calls.whole`.
    """

    async def ask(client: AsyncClient) -> tuple[NDArray[np.float32], int]:
        embedding = client.embed(
            texts, model=model.name, dimensions=dimensions, prompt_name=prompt_name, truncate=truncate
        )
        if not counted:
            return await embedding, 0
        vectors, tokens = await asyncio.gather(embedding, client.tokenize(texts, model=model.name, truncate=truncate))
        return vectors, sum(map(len, tokens))

    exchange_of(request).names = TOKENIZERS_NAMES
    vectors, count = await calls.whole(request, model, ask)
    if counted:
        exchange_of(request).tokens(count)
    return vectors, count
