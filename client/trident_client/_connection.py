"""What `Client` stands on: runs what the calls describe, over a connection to a server."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from numpy.typing import NDArray

from trident_client import _control, _generation, _wire
from trident_client._errors import TridentError, translated
from trident_client._grpc_channel import GrpcServer
from trident_client._sending import send_all
from trident_client._steps import Batch, Pause, Prompt, Steps, Tensors
from trident_client._types import GenerationChunk

if TYPE_CHECKING:
    from typing_extensions import Self  # typing's is Python 3.11's

Result = TypeVar("Result")
_Outputs = dict[str, NDArray[Any]]


class Connection:
    """The connection to a server; `Client` adds the calls and says what the arguments are."""

    def __init__(
        self, url: str = "localhost:8001", *, timeout: float | None = None, admin_key: str | None = None
    ) -> None:
        self._timeout = timeout
        self._only: dict[str, str] = {}
        self._server = GrpcServer(url, admin_key)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls that still run raise CancelledError."""
        self._server.close()

    def _run(self, steps: Steps[Result], timeout: float | None) -> Result:
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
                    time.sleep(step.seconds)
                else:
                    left = seconds if step.alone or until is None else max(until - time.monotonic(), 0.0)
                    answer = self._server.ask(step, left)
            except TridentError as raised:
                error = raised

    def _send(self, batch: Batch[Result], timeout: float | None) -> Result:
        """The answer to requests that have one response each."""
        return batch.join(self._infer(self._model(batch.model, batch.task, timeout), batch.requests, timeout))

    def _infer(self, model: str, requests: Sequence[Tensors], timeout: float | None) -> list[_Outputs]:
        def start(index: int, seconds: float | None) -> Any:
            return self._server.start(model, requests[index], seconds)

        with translated():
            responses = send_all(start, len(requests), self._deadline(timeout))
        return [_wire.parse_response(response) for response in responses]

    def _chunks(self, prompt: Prompt, timeout: float | None) -> Generator[GenerationChunk, None, None]:
        """The answer of a generator. A model that is not named is looked for at once, all else while iterating."""
        model = self._model(prompt.model, _generation.TASK, timeout)
        return self._parsed(model, prompt.inputs, timeout)

    def _parsed(self, model: str, inputs: Tensors, timeout: float | None) -> Generator[GenerationChunk, None, None]:
        with contextlib.closing(self._receive(model, inputs, timeout)) as responses:
            for outputs in responses:
                yield from _generation.chunks(outputs)

    def _receive(self, model: str, inputs: Tensors, timeout: float | None) -> Generator[_Outputs, None, None]:
        return self._server.stream(model, inputs, self._deadline(timeout))

    def _model(self, model: str | None, task: str, timeout: float | None) -> str:
        """The model that is meant; the server is asked once for the only one of a task."""
        if model:
            return model
        if task not in self._only:
            self._only[task] = self._run(_control.only_model(task), timeout)
        return self._only[task]

    def _deadline(self, timeout: float | None) -> float | None:
        return self._timeout if timeout is None else timeout
