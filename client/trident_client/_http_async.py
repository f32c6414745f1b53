"""A server over HTTP, with calls that are awaited."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Any

import httpx2
from numpy.typing import NDArray

from trident_client import _http
from trident_client._connections import Connections
from trident_client._errors import CancelledError, UnavailableError
from trident_client._settings import Address, Settings
from trident_client._steps import Ask, Tensors
from trident_client._watch import Alarm

_LATE = "the server did not answer in time"
# The alarm limits all waits, also those in which little by little comes.
_TIMEOUT = httpx2.Timeout(None, connect=_http.CONNECT_SECONDS)


class AsyncHttpServer:
    """Connections to one server, as many as there are requests; the methods are those of `AsyncGrpcServer`.

    Args:
        address: of the server.
        settings: see `Client`.
    """

    def __init__(self, address: Address, settings: Settings) -> None:
        self._url = address.target
        self._address = address
        self._settings = settings
        self._closed = False
        self._connections = Connections(self._connect)
        self._extensions = _http.extensions(settings)

    def _connect(self, again: bool) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(**_http.arguments(self._address, self._settings))

    async def close(self) -> None:
        """Close the connections."""
        self._closed = True
        for client in self._connections.all():
            await client.aclose()

    async def renew(self, since: float) -> None:
        """See `GrpcServer.renew`."""
        for client in self._connections.renew(since):
            await client.aclose()

    async def ask(self, ask: Ask, seconds: float | None) -> Any:
        """The answer to a question."""
        method, path = _http.question(ask)
        content = b"{}" if method == "POST" else b""
        status, _, body = await self._call(method, path, content, _http.headers(self._settings, ask), seconds)
        return _http.answer(ask, status, body)

    async def infer(self, model: str, inputs: Tensors, seconds: float | None) -> dict[str, NDArray[Any]]:
        """The response to a request that has one."""
        path, body, its = _http.inference(model, inputs, seconds, self._settings.max_message_bytes)
        sent = {**_http.headers(self._settings), **its}
        status, found, answer = await self._call("POST", path, body, sent, seconds)
        if status != 200:
            raise _http.failure(status, answer)
        return _http.inferred(found, answer)

    async def stream(
        self, model: str, inputs: Tensors, seconds: float | None, silence: float | None
    ) -> AsyncGenerator[dict[str, NDArray[Any]], None]:
        """The responses to a request, as they come."""
        path, body, its = _http.generation(model, inputs, seconds, self._settings.max_message_bytes)
        sent = {**_http.headers(self._settings), **its}
        events = _http.Events(inputs, self._settings.max_message_bytes)
        until = math.inf if seconds is None else time.monotonic() + seconds

        def alarm() -> Alarm:
            return Alarm(min(until - time.monotonic(), math.inf if silence is None else silence), _LATE)

        with self._translated(), self._connections.using() as client:
            with alarm():
                response = await self._send(client, "POST", path, body, sent)
            try:
                if response.status_code != 200:
                    with alarm():
                        raise _http.failure(response.status_code, await response.aread())
                blocks = response.aiter_raw()
                while True:
                    with alarm():
                        block = await anext(blocks, None)
                    if block is None:
                        break
                    for outputs in events.feed(block):
                        yield outputs
                events.end()
            finally:
                await response.aclose()

    async def _call(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], seconds: float | None
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of a response."""
        with self._translated(), self._connections.using() as client, Alarm(seconds, _LATE):
            response = await self._send(client, method, path, body, headers)
            async with contextlib.aclosing(response):
                parts = _http.Body(self._settings.max_message_bytes)
                async for block in response.aiter_raw():
                    parts.add(block)
                return response.status_code, response.headers, parts.whole()

    async def _send(
        self, client: httpx2.AsyncClient, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> httpx2.Response:
        request = client.build_request(
            method,
            f"{self._url}{path}",
            content=body,
            headers=headers,
            timeout=_TIMEOUT,
            extensions=self._extensions,
        )
        return await client.send(request, stream=True)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise httpx2's errors as this package's."""
        try:
            with _http.translated(self._url):
                yield
        except UnavailableError:
            if self._closed:
                raise CancelledError("the client was closed") from None
            raise
