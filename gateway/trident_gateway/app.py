"""The application: every endpoint behind the door."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from trident_gateway import bodies, classify, explain, ollama, rerank, tei, texts, tokens, web
from trident_gateway.door import Door
from trident_gateway.errors import ApiError, ClientGone, defect
from trident_gateway.exchange import HANGUP
from trident_gateway.gateway import Gateway, exchange_of
from trident_gateway.openai import audio, chat, completions, embeddings, models, responses

MODULES = (
    *(chat, completions, responses, embeddings, audio, models),
    *(rerank, classify, texts, explain, tokens, tei, ollama, web),
)
ROUTERS = [module.router for module in MODULES]


def create(gateway: Gateway) -> ASGIApp:
    """The application of one process, around its state."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await gateway.start()
        yield
        await gateway.stop()

    # The pages that show the schema load scripts from elsewhere, so there are none; the schema itself is served.
    # A path with a slash too many is unknown: a redirect would name a scheme that a proxy before us may have changed.
    app = FastAPI(title="Trident gateway", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.gateway = gateway
    for router in ROUTERS:
        app.include_router(router)
    app.openapi = functools.cache(lambda: bodies.describe(app, ROUTERS))  # type: ignore[method-assign]
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(ClientGone, _gone)
    app.add_exception_handler(HTTPException, _not_found)
    app.add_exception_handler(Exception, _failed)
    door: ASGIApp = Door(app, gateway)
    if gateway.settings.cors_origins:
        # Outermost: a page may read why it was refused, too. Clients have headers of their own (OpenAI's has a dozen),
        # and a page of a listed site may send any, because nothing here is asked with cookies.
        door = CORSMiddleware(
            door,
            allow_origins=list(gateway.settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return door


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _answer(request, error.renamed(exchange_of(request).names))


async def _gone(request: Request, error: Exception) -> Response:
    """Nobody reads this; its status is for the log."""
    return Response(status_code=HANGUP)


async def _not_found(request: Request, error: Exception) -> Response:
    """What the router itself refuses."""
    assert isinstance(error, HTTPException)
    messages = {404: "there is no such endpoint", 405: "this endpoint has other methods"}
    message = messages.get(error.status_code, str(error.detail))
    return _answer(request, ApiError(error.status_code, message, headers=error.headers))


async def _failed(request: Request, error: Exception) -> Response:
    """A defect, which is raised again behind this and logged at the door."""
    return _answer(request, defect())


def _answer(request: Request, error: ApiError) -> Response:
    content = json.dumps(error.body(request.url.path))
    return Response(content, error.status, headers=error.headers, media_type="application/json")
