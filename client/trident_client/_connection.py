"""What `Client` stands on: runs what the calls describe, on one of its servers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from numpy.typing import NDArray

from trident_client import _control
from trident_client._choice import Choice
from trident_client._errors import CancelledError, TridentError, UnavailableError
from trident_client._grpc_channel import GrpcServer
from trident_client._sending import NEVER, Retries, least, patient, send_all, send_one, was_full
from trident_client._settings import KEEPALIVE, SECONDS, TLS, Address, Headers, Settings, http_installed
from trident_client._steps import Ask, Batch, Pause, Prompt, Steps, Tensors
from trident_client._watch import Watch, countdown, limit

if TYPE_CHECKING:
    from typing_extensions import Self  # typing's is Python 3.11's

Result = TypeVar("Result")
_Outputs = dict[str, NDArray[Any]]


class Server(Protocol):
    """A server, over gRPC or HTTP; `GrpcServer` says what the methods do."""

    def close(self) -> None: ...

    def renew(self, since: float) -> None: ...

    def ask(self, ask: Ask, seconds: float | None) -> Any: ...

    def start(self, model: str, inputs: Tensors, seconds: float | None) -> Any: ...

    def stream(
        self, model: str, inputs: Tensors, seconds: float | None, silence: float | None
    ) -> Generator[_Outputs, None, None]: ...


class Connection:
    """The connections to servers; `Client` adds the calls and says what the arguments are."""

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
        watch = Watch()
        self._servers = Choice([_connected(address, settings, watch) for address in settings.addresses(url)])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; calls that still run raise CancelledError."""
        self._closed = True
        for server in self._servers.all():
            server.close()

    def _run(self, make: Callable[[], Steps[Result]], timeout: float | None) -> Result:
        """Run the steps of a call on one server, or on the next where that can't be reached."""
        failure: TridentError = UnavailableError("no server can be reached")
        for server in self._order():
            try:
                result = self._run_on(server, make(), timeout)
            except TridentError as error:
                failure = error
                if not self._servers.note(server, error):
                    break
            else:
                self._servers.answered(server)
                return result
        raise failure

    def _run_on_all(self, make: Callable[[], Steps[Result]], timeout: float | None) -> list[Result]:
        """Run the steps of a call on every server."""
        self._check_open()
        return [self._run_on(server, make(), timeout) for server in self._servers.all()]

    def _run_on(self, server: Server, steps: Steps[Result], timeout: float | None) -> Result:
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
                    time.sleep(step.seconds)
                else:
                    answer = server.ask(step, seconds if step.alone else left())
            except TridentError as raised:
                error = raised

    def _send(self, batch: Batch[Result], timeout: float | None) -> Result:
        """The answer to requests that have one response each."""
        left = countdown(self._deadline(timeout))
        model = self._model(batch.model, batch.task, timeout)
        return batch.joined(model, self._infer(model, batch.requests, left()))

    def _infer(self, model: str, requests: Sequence[Tensors], seconds: float | None) -> list[_Outputs]:
        """The responses to requests, each of which has so many seconds."""
        asked: dict[Any, tuple[Server, int, float]] = {}
        tried = [0] * len(requests)

        def start(index: int, seconds: float | None) -> Any:
            server = self._order()[0]
            call = server.start(model, requests[index], least(seconds, self._retries.limit(tried[index])))
            asked[call] = server, index, time.monotonic()
            end = self._servers.begin(server)
            call.add_done_callback(lambda _: end())
            return call

        def again(call: Any) -> bool:
            server, index, since = asked.pop(call)
            if self._servers.note(server, call.error()) or (self._wait_if_full and was_full(call)):
                return True
            broke_off = self._retries.after(call.error(), tried[index])
            if broke_off and self._retries.hung(call.error()):
                server.renew(since)
            tried[index] += broke_off
            return broke_off

        return send_all(start, len(requests), seconds, again)

    def _chunks(self, prompt: Prompt[Result], timeout: float | None) -> Generator[Result, None, None]:
        """The answer as it comes. A model that is not named is looked for at once, all else while iterating."""
        left = countdown(self._deadline(timeout))
        model = self._model(prompt.model, prompt.task, timeout)
        if prompt.stream and timeout is None:
            return self._parsed(prompt, model, self._receive(model, prompt.inputs, None, self._timeout, self._retries))
        return self._parsed(prompt, model, self._receive(model, prompt.inputs, left(), None, self._retries))

    def _whole(self, prompt: Prompt[Result], timeout: float | None, *, waits: bool = False) -> list[Result]:
        """All of the answer; the request is sent again where that breaks off, whatever of it has come.

        Args:
            waits: whether it is sent again, too, where the server has no room for it.
        """
        left = countdown(self._deadline(timeout))
        model = self._model(prompt.model, prompt.task, timeout)

        def ask(seconds: float | None, silence: float | None) -> list[Result]:
            return list(self._parsed(prompt, model, self._receive(model, prompt.inputs, seconds, silence)))

        return send_one(ask, left(), waits and self._wait_if_full, self._retries)

    def _parsed(
        self, prompt: Prompt[Result], model: str, stream: Generator[_Outputs, None, None]
    ) -> Generator[Result, None, None]:
        with contextlib.closing(stream) as responses:
            for outputs in responses:
                yield from prompt.chunks(model, outputs)

    def _receive(
        self,
        model: str,
        inputs: Tensors,
        seconds: float | None,
        silence: float | None = None,
        retries: Retries = NEVER,
    ) -> Generator[_Outputs, None, None]:
        """The responses to a request that may have several.

        Args:
            seconds: until the last of them, from the first look for one; None: no limit.
            silence: seconds without a response; None: no limit.
            retries: of the request, as long as no response has come. Their limit of silence is not for it.
        """
        left, request, tried = countdown(seconds), patient(seconds), 0
        while True:
            begun = False
            try:
                with contextlib.closing(self._received(model, inputs, left, silence)) as responses:
                    for outputs in responses:
                        begun = True
                        yield outputs
                return
            except UnavailableError as error:
                again = not begun and retries.after(error, tried)
                pause = request.pause_in_time() if again else None
                if pause is None:
                    raise
            tried += 1
            time.sleep(pause)

    def _received(
        self, model: str, inputs: Tensors, left: Callable[[], float | None], silence: float | None
    ) -> Generator[_Outputs, None, None]:
        """The same of one server, or of the next where that can't be reached."""
        failure: TridentError = UnavailableError("no server can be reached")
        for server in self._order():
            begun, since = False, time.monotonic()
            try:
                with (
                    self._servers.using(server),
                    contextlib.closing(server.stream(model, inputs, left(), silence)) as responses,
                ):
                    for outputs in responses:
                        begun = True
                        yield outputs
            except TridentError as error:
                failure = error
                if self._retries.hung(error):
                    server.renew(since)
                if not self._servers.note(server, error) or begun:
                    break
            else:
                self._servers.answered(server)
                return
        raise failure

    def _model(self, model: str | None, task: str, timeout: float | None) -> str:
        """The model that is meant; a server is asked once for the only one of a task."""
        if model:
            return model
        if task not in self._only:
            self._only[task] = send_one(
                lambda left, _: self._run(lambda: _control.only_model(task), timeout if left is None else left),
                self._deadline(timeout),
                False,
                Retries(self._retries.times),
            )
        return self._only[task]

    def _order(self) -> list[Server]:
        self._check_open()
        return self._servers.order()

    def _check_open(self) -> None:
        if self._closed:
            raise CancelledError("the client was closed")

    def _deadline(self, timeout: float | None) -> float | None:
        return self._timeout if timeout is None else limit(timeout)


def _connected(address: Address, settings: Settings, watch: Watch) -> Server:
    if address.protocol == "grpc":
        return GrpcServer(address, settings, watch)
    with http_installed():
        from trident_client._http_client import HttpServer
    return HttpServer(address, settings, watch)
