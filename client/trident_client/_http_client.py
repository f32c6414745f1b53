"""A server over HTTP, with calls that block."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import grpc
import httpx2
from numpy.typing import NDArray

from trident_client import _http
from trident_client._connections import Connections
from trident_client._errors import CancelledError, DeadlineExceededError, UnavailableError
from trident_client._sending import least
from trident_client._settings import Address, Settings
from trident_client._steps import Ask, Tensors
from trident_client._watch import Watch, countdown


class HttpServer:
    """Connections to one server, as many as there are requests; the methods are those of `GrpcServer`.

    Args:
        address: of the server.
        settings: see `Client`.
        watch: ends streams that take too long.
    """

    def __init__(self, address: Address, settings: Settings, watch: Watch) -> None:
        self._url = address.target
        self._address = address
        self._settings = settings
        self._watch = watch
        self._closed = False
        self._connections = Connections(self._connect)
        self._extensions = _http.extensions(settings)

    def _connect(self, again: bool) -> httpx2.Client:
        return httpx2.Client(**_http.arguments(self._address, self._settings))

    def close(self) -> None:
        """Close the connections."""
        self._closed = True
        for client in self._connections.all():
            client.close()

    def renew(self, since: float) -> None:
        """See `GrpcServer.renew`."""
        for client in self._connections.renew(since):
            client.close()

    def ask(self, ask: Ask, seconds: float | None) -> Any:
        """The answer to a question."""
        method, path = _http.question(ask)
        content = b"{}" if method == "POST" else b""
        status, _, body = self._call(method, path, content, _http.headers(self._settings, ask), seconds)
        return _http.answer(ask, status, body)

    def start(self, model: str, inputs: Tensors, seconds: float | None) -> HttpCall:
        """Send a request that has one response, in a thread of its own."""
        path, body, its = _http.inference(model, inputs, seconds, self._settings.max_message_bytes)
        sent = {**_http.headers(self._settings), **its}

        def work() -> dict[str, NDArray[Any]]:
            status, found, answer = self._call("POST", path, body, sent, seconds)
            if status != 200:
                raise _http.failure(status, answer)
            return _http.inferred(found, answer)

        return HttpCall(work)

    def stream(
        self, model: str, inputs: Tensors, seconds: float | None, silence: float | None
    ) -> Generator[dict[str, NDArray[Any]], None, None]:
        """The responses to a request, as they come."""
        path, body, its = _http.generation(model, inputs, seconds, self._settings.max_message_bytes)
        sent = {**_http.headers(self._settings), **its}
        events = _http.Events(inputs, self._settings.max_message_bytes)
        until = math.inf if seconds is None else time.monotonic() + seconds
        with self._translated(), self._opened("POST", path, body, sent, least(seconds, silence)) as response:
            if response.status_code != 200:
                raise _http.failure(response.status_code, response.read())
            with contextlib.closing(self._blocks(response, until, silence)) as blocks:
                for block in blocks:
                    yield from events.feed(block)
            events.end()

    def _call(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], seconds: float | None
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of a response."""
        left = countdown(seconds)
        with self._translated(), self._opened(method, path, body, headers, seconds) as response:
            parts = _http.Body(self._settings.max_message_bytes)
            for block in response.iter_raw():
                if left() == 0.0:  # each wait has its limit, and little by little comes for ever
                    raise DeadlineExceededError("the server did not answer in time")
                parts.add(block)
            return response.status_code, response.headers, parts.whole()

    @contextlib.contextmanager
    def _opened(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], seconds: float | None
    ) -> Iterator[httpx2.Response]:
        """A response whose body is still to be read; each wait for the server is limited."""
        if seconds is not None and seconds <= 0:  # a socket without time would not even try
            raise DeadlineExceededError("the server did not answer in time")
        timeout = httpx2.Timeout(seconds, connect=least(seconds, _http.CONNECT_SECONDS))
        url = f"{self._url}{path}"
        with (
            self._connections.using() as client,
            client.stream(
                method, url, content=body, headers=headers, timeout=timeout, extensions=self._extensions
            ) as response,
        ):
            yield response

    def _blocks(self, response: httpx2.Response, until: float, silence: float | None) -> Generator[bytes, None, None]:
        """The body as it comes."""
        blocks = response.iter_raw()
        with self._watch.over(lambda: _http.hang_up(response)) as wait:
            while True:
                limit = until if silence is None else min(until, time.monotonic() + silence)
                try:
                    with wait.limited(limit):
                        block = next(blocks, None)
                except httpx2.TransportError:
                    if not wait.ended:
                        raise
                if wait.ended:
                    raise DeadlineExceededError("the server did not answer in time")
                if block is None:
                    return
                yield block

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


class HttpCall:
    """A request under way; `send_all` waits for it.

    Args:
        work: sends it; gives the tensors of its response.
    """

    def __init__(self, work: Callable[[], dict[str, NDArray[Any]]]) -> None:
        self._ended: Future[dict[str, NDArray[Any]]] = Future()
        threading.Thread(target=self._run, args=(work,), name="trident-http", daemon=True).start()

    def _run(self, work: Callable[[], dict[str, NDArray[Any]]]) -> None:
        try:
            self._ended.set_result(work())
        except BaseException as error:
            self._ended.set_exception(error)

    def add_done_callback(self, callback: Callable[[Any], Any]) -> None:
        """Have a function called with this call once it has ended."""
        self._ended.add_done_callback(lambda _: callback(self))

    def code(self) -> grpc.StatusCode:
        """How it ended, as gRPC calls it."""
        error = self._ended.exception()
        if error is None:
            return grpc.StatusCode.OK
        return grpc.StatusCode.UNAVAILABLE if isinstance(error, UnavailableError) else grpc.StatusCode.UNKNOWN

    def error(self) -> BaseException | None:
        """Its error, None if it has a response."""
        return self._ended.exception()

    def details(self) -> str:
        """What the server said of an error."""
        return str(self._ended.exception() or "")

    def cancel(self) -> None:
        """Do nothing: the server would compute the answer to its end, and its thread ends with it, or in time."""

    def result(self) -> dict[str, NDArray[Any]]:
        """The tensors of the response."""
        return self._ended.result()
