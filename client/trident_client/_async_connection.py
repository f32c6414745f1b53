"""What `AsyncClient` stands on: runs what the calls describe, over a connection to a server."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from numpy.typing import NDArray

from trident_client import _control, _generation
from trident_client._errors import TridentError
from trident_client._grpc_aio import AsyncGrpcServer
from trident_client._sending import send_all_async
from trident_client._steps import Batch, Pause, Prompt, Steps, Tensors
from trident_client._types import GenerationChunk

if TYPE_CHECKING:
    from typing_extensions import Self  # typing's is Python 3.11's

Result = TypeVar("Result")
_Outputs = dict[str, NDArray[Any]]


class AsyncConnection:
    """The connection to a server; `AsyncClient` adds the calls."""

    def __init__(
        self, url: str = "localhost:8001", *, timeout: float | None = None, admin_key: str | None = None
    ) -> None:
        self._timeout = timeout
        self._only: dict[str, str] = {}
        self._url = url
        self._admin_key = admin_key
        self._made: AsyncGrpcServer | None = None

    @property
    def _server(self) -> AsyncGrpcServer:
        """The connection, made by the first call, in the loop that uses it."""
        if self._made is None:
            self._made = AsyncGrpcServer(self._url, self._admin_key)
        return self._made

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls that still run raise CancelledError."""
        if self._made is not None:
            await self._made.close()

    async def _run(self, steps: Steps[Result], timeout: float | None) -> Result:
        """Do what a call's steps ask for, within its timeout."""
        seconds = self._deadline(timeout)
        until = None if seconds is None else time.monotonic() + seconds
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
                    left = seconds if step.alone or until is None else max(until - time.monotonic(), 0.0)
                    answer = await self._server.ask(step, left)
            except TridentError as raised:
                error = raised

    async def _send(self, batch: Batch[Result], timeout: float | None) -> Result:
        """The answer to requests that have one response each."""
        model = await self._model(batch.model, batch.task, timeout)
        return batch.join(await self._infer(model, batch.requests, timeout))

    async def _infer(self, model: str, requests: Sequence[Tensors], timeout: float | None) -> list[_Outputs]:
        async def start(index: int, seconds: float | None) -> _Outputs:
            return await self._server.infer(model, requests[index], seconds)

        return await send_all_async(start, len(requests), self._deadline(timeout))

    async def _chunks(self, prompt: Prompt, timeout: float | None) -> AsyncGenerator[GenerationChunk, None]:
        """The answer of a generator."""
        model = await self._model(prompt.model, _generation.TASK, timeout)
        stream = self._server.stream(model, prompt.inputs, self._deadline(timeout))
        async with contextlib.aclosing(stream) as responses:
            async for outputs in responses:
                for chunk in _generation.chunks(outputs):
                    yield chunk

    async def _model(self, model: str | None, task: str, timeout: float | None) -> str:
        """The model that is meant; the server is asked once for the only one of a task."""
        if model:
            return model
        if task not in self._only:
            self._only[task] = await self._run(_control.only_model(task), timeout)
        return self._only[task]

    def _deadline(self, timeout: float | None) -> float | None:
        return self._timeout if timeout is None else timeout
