"""Calls of a server for a request: they wait for their turn, and end when the client hangs up."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, NamedTuple, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from trident_client import AsyncClient
from trident_gateway.catalog import Model
from trident_gateway.errors import ApiError, ClientGone
from trident_gateway.gateway import exchange_of, gateway_of

Result = TypeVar("Result")


class Turns(NamedTuple):
    """Of requests that don't take the turns of their model's other requests.

    Attributes:
        name: of their queue.
        at_once: that a server takes.
    """

    name: str
    at_once: int


async def whole(
    request: Request,
    model: Model,
    ask: Callable[[AsyncClient], Awaitable[Result]],
    *,
    beginning: bytes = b"",
    answers: int = 1,
    turns: Turns | None = None,
) -> Result:
    """An answer in one.

    Args:
        ask: calls a server.
        beginning: see `Servers.order`.
        answers: that the model makes at once for this request.
        turns: among which it waits for its own; None: the model's.

    Raises:
        ApiError: see `Admission.slot` and `Servers.call`.
        ClientGone: the client has hung up; the server is told.
    """
    work = turn(request, model, ask, beginning=beginning, answers=answers, turns=turns)
    return await unless_gone(request.receive, work)


async def turn(
    request: Request,
    model: Model,
    ask: Callable[[AsyncClient], Awaitable[Result]],
    *,
    beginning: bytes = b"",
    answers: int = 1,
    turns: Turns | None = None,
) -> Result:
    """As `whole`, but for the hang-up, which the caller minds."""
    async with _slot(request, model, answers, turns):
        return await gateway_of(request).servers.call(model.name, beginning, ask)


async def parts(
    request: Request,
    model: Model,
    ask: Callable[[AsyncClient], AsyncGenerator[Result, None]],
    *,
    beginning: bytes = b"",
    answers: int = 1,
) -> AsyncGenerator[Result, None]:
    """An answer in parts, whose first is there when this returns; closing it cancels the request.

    Raises:
        ApiError: as in `whole`, and later while iterating.
        ClientGone: as in `whole`.
    """

    async def every() -> AsyncGenerator[Result, None]:
        async with (
            _slot(request, model, answers),
            contextlib.aclosing(gateway_of(request).servers.stream(model.name, beginning, ask)) as found,
        ):
            async for part in found:
                yield part

    stream = every()
    try:
        first = await unless_gone(request.receive, anext(stream))
    except BaseException:
        await stream.aclose()
        raise
    return _joined(first, stream)


async def _joined(first: Result, rest: AsyncGenerator[Result, None]) -> AsyncGenerator[Result, None]:
    async with contextlib.aclosing(rest):
        yield first
        async for part in rest:
            yield part


@contextlib.asynccontextmanager
async def _slot(request: Request, model: Model, answers: int, turns: Turns | None = None) -> AsyncIterator[None]:
    """The turn of a request at its model."""
    gateway, exchange = gateway_of(request), exchange_of(request)
    settings, key = gateway.settings, exchange.key
    servers = max(len(gateway.servers.having(model.name)), 1)
    name, at_once = turns or Turns(model.name, settings.max_running or model.at_once)
    limit = max(at_once * servers // settings.workers, 1)
    per_key = (key.max_concurrent if key is not None else 0) or settings.max_per_key
    owner = key.name if key is not None else ""
    exchange.model = model.name
    began = time.perf_counter()
    async with gateway.admission.slot(name, limit, answers=answers, key=owner, per_key=per_key, request=exchange):
        exchange.queue_seconds = time.perf_counter() - began
        try:
            yield
        except ApiError as error:
            exchange.error = error.cause
            raise


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result] | Awaitable[Result]) -> Result:
    """Do something until the client hangs up. The request's body must have been read.

    Raises:
        ClientGone: it has.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hangup(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _hangup(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Stream(Response):
    """A response that is sent while it is made.

    Args:
        content: its chunks; it is closed when the client hangs up.
    """

    def __init__(self, content: AsyncGenerator[bytes, None], media_type: str = "text/event-stream") -> None:
        super().__init__(None, media_type=media_type, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._content = content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the chunks as they come."""

        async def send_all() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for chunk in self._content:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await unless_gone(receive, send_all())
        except ClientGone:
            pass  # the response has begun: there is nobody to tell, and nothing went wrong
        finally:
            await self._content.aclose()
