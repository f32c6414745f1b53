"""What `AsyncClient` stands on: runs what the calls describe, on one of its servers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from numpy.typing import NDArray

from trident_client import _control
from trident_client._choice import Choice
from trident_client._errors import (
    CancelledError,
    DeadlineExceededError,
    OverloadedError,
    TridentError,
    UnavailableError,
)
from trident_client._grpc_aio import AsyncGrpcServer
from trident_client._sending import NEVER, Retries, least, patient, send_all_async
from trident_client._settings import KEEPALIVE, SECONDS, TLS, Address, Headers, Settings, http_installed
from trident_client._steps import Ask, Batch, Pause, Prompt, Steps, Tensors
from trident_client._watch import countdown, limit

if TYPE_CHECKING:
    from typing_extensions import Self  # typing's is Python 3.11's

Result = TypeVar("Result")
_Outputs = dict[str, NDArray[Any]]


class AsyncServer(Protocol):
    """A server, over gRPC or HTTP; `GrpcServer` says what the methods do."""

    async def close(self) -> None: ...

    async def renew(self, since: float) -> None: ...

    async def ask(self, ask: Ask, seconds: float | None) -> Any: ...

    async def infer(self, model: str, inputs: Tensors, seconds: float | None) -> _Outputs: ...

    def stream(
        self, model: str, inputs: Tensors, seconds: float | None, silence: float | None
    ) -> AsyncGenerator[_Outputs, None]: ...


class AsyncConnection:
    """The connections to servers; `AsyncClient` adds the calls; `Client` says what the arguments are."""

    def __init__(
        self,
        url: str | Sequence[str] = "localhost:8001",
        *,
        timeout: float | None = SECONDS,
        admin_key: str | None = None,
        api_key: str | None = None,
        headers: Headers | Callable[[], Headers] | None = None,
        tls: TLS | bool = False,
        max_message_bytes: int | None = None,
        keepalive: float | None = KEEPALIVE,
        wait_if_full: bool = True,
        retries: int = 0,
        retry_silence: float | None = None,
    ) -> None:
        settings = Settings(admin_key, api_key, headers, tls, max_message_bytes, keepalive)
        self._timeout = limit(timeout)
        self._wait_if_full = wait_if_full
        self._retries = Retries(retries, retry_silence)
        self._only: dict[str, str] = {}
        self._closed = False
        self._settings = settings
        self._addresses = settings.addresses(url)
        if any(address.protocol == "http" for address in self._addresses):
            with http_installed():
                import httpx2  # noqa: F401
        self._loop: asyncio.AbstractEventLoop | None = None
        self._made: Choice[AsyncServer] | None = None

    @property
    def _servers(self) -> Choice[AsyncServer]:
        """The connections, which the first call makes in the event loop that uses them."""
        loop = asyncio.get_running_loop()
        if self._made is None:
            self._loop = loop
            self._made = Choice([_connected(address, self._settings) for address in self._addresses])
        elif loop is not self._loop:
            raise RuntimeError("this AsyncClient belongs to another event loop: make one in each")
        return self._made

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; calls that still run raise CancelledError."""
        self._closed = True
        if self._made is not None:
            await asyncio.gather(*(server.close() for server in self._servers.all()))

    async def _run(self, make: Callable[[], Steps[Result]], timeout: float | None) -> Result:
        """Run the steps of a call on one server."""
        return await self._on_one(lambda server: self._run_on(server, make(), timeout))

    async def _on_one(self, use: Callable[[AsyncServer], Awaitable[Result]]) -> Result:
        """What a server gives, or the next one where that can't be reached."""
        failure: TridentError = UnavailableError("no server can be reached")
        for server in self._order():
            try:
                result = await use(server)
            except TridentError as error:
                failure = error
                if not self._servers.note(server, error):
                    break
            else:
                self._servers.answered(server)
                return result
        raise failure

    async def _run_on_all(self, make: Callable[[], Steps[Result]], timeout: float | None) -> list[Result]:
        """Run the steps of a call on every server."""
        self._check_open()
        return [await self._run_on(server, make(), timeout) for server in self._servers.all()]

    async def _run_on(self, server: AsyncServer, steps: Steps[Result], timeout: float | None) -> Result:
        """Do what the steps ask for, within the timeout of the call."""
        seconds = self._deadline(timeout)
        left = countdown(seconds)
        answer: Any = None
        error: TridentError | None = None
        while True:
            try:
                step = steps.send(answer) if error is None else steps.throw(error)
            except StopIteration as end:
                result: Result = end.value
                return result
            answer = error = None
            try:
                if isinstance(step, Pause):
                    await asyncio.sleep(step.seconds)
                else:
                    answer = await server.ask(step, seconds if step.alone else left())
            except TridentError as raised:
                error = raised

    async def _send(self, batch: Batch[Result], timeout: float | None) -> Result:
        """The answer to requests that have one response each."""
        left = countdown(self._deadline(timeout))
        model = await self._model(batch.model, batch.task, timeout)
        return batch.joined(model, await self._infer(model, batch.requests, left()))

    async def _infer(self, model: str, requests: Sequence[Tensors], seconds: float | None) -> list[_Outputs]:
        """The responses to requests, each of which has so many seconds."""
        tried = [0] * len(requests)

        async def start(index: int, seconds: float | None) -> _Outputs:
            left = countdown(least(seconds, self._retries.limit(tried[index])))

            async def infer(server: AsyncServer) -> _Outputs:
                since = time.monotonic()
                try:
                    with self._servers.using(server):
                        return await server.infer(model, requests[index], left())
                except DeadlineExceededError as error:
                    if self._retries.hung(error):
                        await server.renew(since)
                    raise

            return await self._on_one(infer)

        return await send_all_async(start, len(requests), seconds, self._again(tried))

    def _again(self, tried: list[int], *, waits: bool = True) -> Callable[[int, BaseException], bool]:
        """Says whether a request is sent again that has ended with an error.

        Args:
            tried: how often each was, where its answer broke off.
            waits: whether it is where the server has no room for it.
        """

        def again(index: int, error: BaseException) -> bool:
            broke_off = self._retries.after(error, tried[index])
            tried[index] += broke_off
            return broke_off or (waits and self._wait_if_full and isinstance(error, OverloadedError))

        return again

    async def _chunks(self, prompt: Prompt[Result], timeout: float | None) -> AsyncGenerator[Result, None]:
        """The answer as it comes."""
        left = countdown(self._deadline(timeout))
        model = await self._model(prompt.model, prompt.task, timeout)
        if prompt.stream and timeout is None:
            stream = self._receive(model, prompt.inputs, None, self._timeout, self._retries)
        else:
            stream = self._receive(model, prompt.inputs, left(), None, self._retries)
        async with contextlib.aclosing(stream) as responses:
            async for outputs in responses:
                for chunk in prompt.chunks(model, outputs):
                    yield chunk

    async def _whole(self, prompt: Prompt[Result], timeout: float | None, *, waits: bool = False) -> list[Result]:
        """All of the answer; see `Connection`."""
        left = countdown(self._deadline(timeout))
        model = await self._model(prompt.model, prompt.task, timeout)
        tried = [0]

        async def ask(_: int, seconds: float | None) -> list[Result]:
            stream = self._receive(model, prompt.inputs, seconds, self._retries.limit(tried[0]))
            async with contextlib.aclosing(stream) as responses:
                return [chunk async for outputs in responses for chunk in prompt.chunks(model, outputs)]

        (found,) = await send_all_async(ask, 1, left(), self._again(tried, waits=waits))
        return found

    async def _receive(
        self,
        model: str,
        inputs: Tensors,
        seconds: float | None,
        silence: float | None = None,
        retries: Retries = NEVER,
    ) -> AsyncGenerator[_Outputs, None]:
        """The responses to a request that may have several; see `Connection`."""
        left, request, tried = countdown(seconds), patient(seconds), 0
        while True:
            begun = False
            try:
                async with contextlib.aclosing(self._received(model, inputs, left, silence)) as responses:
                    async for outputs in responses:
                        begun = True
                        yield outputs
                return
            except UnavailableError as error:
                again = not begun and retries.after(error, tried)
                pause = request.pause_in_time() if again else None
                if pause is None:
                    raise
            tried += 1
            await asyncio.sleep(pause)

    async def _received(
        self, model: str, inputs: Tensors, left: Callable[[], float | None], silence: float | None
    ) -> AsyncGenerator[_Outputs, None]:
        """The same of one server, or of the next where that can't be reached."""
        failure: TridentError = UnavailableError("no server can be reached")
        for server in self._order():
            begun, since = False, time.monotonic()
            try:
                stream = server.stream(model, inputs, left(), silence)
                with self._servers.using(server):
                    async with contextlib.aclosing(stream) as responses:
                        async for outputs in responses:
                            begun = True
                            yield outputs
            except TridentError as error:
                failure = error
                if self._retries.hung(error):
                    await server.renew(since)
                if not self._servers.note(server, error) or begun:
                    break
            else:
                self._servers.answered(server)
                return
        raise failure

    async def _model(self, model: str | None, task: str, timeout: float | None) -> str:
        """The model that is meant; a server is asked once for the only one of a task."""
        if model:
            return model
        if task not in self._only:
            again = self._again([0], waits=False)
            (self._only[task],) = await send_all_async(
                lambda _, left: self._run(lambda: _control.only_model(task), timeout if left is None else left),
                1,
                self._deadline(timeout),
                again,
            )
        return self._only[task]

    def _order(self) -> list[AsyncServer]:
        self._check_open()
        return self._servers.order()

    def _check_open(self) -> None:
        if self._closed:
            raise CancelledError("the client was closed")

    def _deadline(self, timeout: float | None) -> float | None:
        return self._timeout if timeout is None else limit(timeout)


def _connected(address: Address, settings: Settings) -> AsyncServer:
    if address.protocol == "grpc":
        return AsyncGrpcServer(address, settings)
    from trident_client._http_async import AsyncHttpServer  # only here: it needs httpx2

    return AsyncHttpServer(address, settings)
