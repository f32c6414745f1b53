"""Answers the requests of a template task with calls to its generator, over the server's own gRPC port.

Everything here runs on one thread, in an event loop: calls to the generator, checks for clients that have gone, and
responses. docs/decisions/0025-templates-call-over-grpc.md says why Triton's calls between models are not used.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
from numpy.typing import NDArray

from trident_client import _protocol as pb
from trident_client import _wire
from trident_serving.errors import Cancelled, DeadlineExceeded, InvalidRequest, Overloaded
from trident_serving.runtime_folder import ADDRESS_ENVIRONMENT, PASS_PARAMETER
from trident_serving.templates import Completion, Prompt, TemplateTask, error_from

logger = logging.getLogger(__name__)

DEFAULT_ADDRESS = "127.0.0.1:8001"  # Triton's default, for a server without a launcher
WATCH_SECONDS = 0.05
UNLOADING_SECONDS = 0.2  # between two questions whether the model is being unloaded
# Questions of one request that run at once; more would crowd other requests out of the generator's queue.
QUESTIONS_AT_ONCE = 4

# Triton's messages about a model that is being loaded again, or is not loaded; on a stream they carry no code.
_AWAY = re.compile(r"Request for unknown model|is not at ready state|Stub process '.*' is not healthy")
_ENSEMBLE = re.compile(r"in ensemble '[^']*', ")  # Triton's own, of models with stages
_METHOD = f"/{pb.SERVICE}/ModelStreamInfer"
_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
)
Tensors = Mapping[str, NDArray[Any]]


class Channel(Protocol):
    """Takes the one response to a request."""

    def is_cancelled(self) -> bool:
        """Whether the client has gone."""
        ...

    def send(self, result: Tensors) -> None:
        """Send the answer."""
        ...

    def fail(self, error: Exception) -> None:
        """Send an error."""
        ...


class Generator(Protocol):
    """Answers prompts."""

    async def complete(self, tensors: Tensors, seconds: float) -> Completion:
        """The answer to one call.

        Args:
            tensors: of the call, [1, n] each.
            seconds: how long it may take.

        Raises:
            ServingError: the generator refuses it, or can't be reached.
        """
        ...

    async def close(self) -> None:
        """Close the connection."""
        ...


class GrpcModel:
    """A model of this server.

    Args:
        model: its name.
        own_pass: shows that a call comes from a model of this server; see `runtime_folder`.
        address: of the server's gRPC port; None: the environment's, or Triton's default.
        version: of the model; "": the one that the server takes for a request.
    """

    def __init__(self, model: str, own_pass: str, address: str | None = None, version: str = "") -> None:
        self._model = model
        self._version = version
        self._pass = own_pass
        self._address = address or os.environ.get(ADDRESS_ENVIRONMENT) or DEFAULT_ADDRESS
        self._channel: grpc.aio.Channel | None = None

    async def infer(self, tensors: Tensors, seconds: float) -> Tensors:
        """The first response to a call, which is the only one unless it asks for a stream.

        Args:
            tensors: of the call.
            seconds: how long it may take.

        Raises:
            ServingError: the model refuses it, or can't be reached.
        """
        if self._channel is None:  # made in the loop that uses it
            self._channel = grpc.aio.insecure_channel(self._address, options=_OPTIONS)
            self._call = self._channel.unary_stream(
                _METHOD,
                request_serializer=pb.ModelInferRequest.SerializeToString,
                response_deserializer=pb.ModelStreamInferResponse.FromString,
            )
        found: Tensors | None = None
        refused = ""
        try:
            # To its end, also behind an error: a call that is left earlier counts as one that is cancelled.
            async for response in self._call(self._request(tensors, seconds), timeout=seconds + 1):
                refused = refused or response.error_message
                if not refused and found is None:
                    found = _wire.parse_response(response.infer_response)
        except grpc.aio.AioRpcError as error:
            if not refused:
                raise self._translated(error) from None
        if refused:
            raise self._refusal(refused)
        if found is None:
            raise RuntimeError(f"{self._model} gave no answer")
        return found

    async def close(self) -> None:
        """Close the connection."""
        if self._channel is not None:
            await self._channel.close()

    def _request(self, tensors: Tensors, seconds: float) -> Any:
        request = _wire.build_request(self._model, tensors)
        request.model_version = self._version
        request.parameters["timeout"].int64_param = max(int(seconds * 1e6), 1)
        if self._pass:
            request.parameters[PASS_PARAMETER].string_param = self._pass
        return request

    def _refusal(self, message: str) -> Exception:
        if _AWAY.search(message):
            return Overloaded(f"{self._model}, which answers for this model, is not ready: {message}")
        return error_from(message)

    def _translated(self, error: grpc.aio.AioRpcError) -> Exception:
        if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded("the timeout was over before all was answered")
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.CANCELLED):
            return Overloaded(f"{self._model}, which answers for this model, is not ready: {error.details()}")
        return RuntimeError(f"{self._model} answers {error.code().name}: {error.details()}")


class GrpcEncoder(GrpcModel):
    """A model of this server that has one response; unlike a stream, that says which kind an error is of."""

    async def infer(self, tensors: Tensors, seconds: float) -> Tensors:
        """See `GrpcModel.infer`."""
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._address, options=_OPTIONS)
            self._one = self._channel.unary_unary(
                f"/{pb.SERVICE}/ModelInfer",
                request_serializer=pb.ModelInferRequest.SerializeToString,
                response_deserializer=pb.ModelInferResponse.FromString,
            )
        try:
            return _wire.parse_response(await self._one(self._request(tensors, seconds), timeout=seconds + 1))
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.INVALID_ARGUMENT:
                raise InvalidRequest(_ENSEMBLE.sub("", error.details() or "")) from None
            raise self._translated(error) from None


class GrpcGenerator(GrpcModel):
    """A generator of this server."""

    async def complete(self, tensors: Tensors, seconds: float) -> Completion:
        """See `Generator.complete`."""
        return Completion.from_tensors(await self.infer(tensors, seconds))


@dataclass(eq=False)
class _Open:
    channel: Channel
    inputs: Tensors
    prompts: list[Prompt]
    deadline: float
    work: asyncio.Task[Tensors] | None = field(default=None)


class TemplateService:
    """Takes requests of one task, from any thread.

    Args:
        task: turns requests into prompts, and completions into answers.
        generator: answers the prompts.
        max_waiting: requests that may be open at once.
        unloading: asked while requests are open; once it says yes, they fail.
    """

    def __init__(
        self,
        task: TemplateTask,
        generator: Generator,
        max_waiting: int,
        unloading: Callable[[], bool] = lambda: False,
    ) -> None:
        self._unloading = unloading
        self._task = task
        self._generator = generator
        self._max_waiting = max_waiting
        self._lock = threading.Lock()
        self._open: set[_Open] = set()
        self._stopping = False
        self._some_open = asyncio.Event()  # of the loop: while it is not set, nothing wakes the thread
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="templates", daemon=True)
        self._thread.start()

    def submit(self, inputs: Tensors, seconds: float, channel: Channel) -> None:
        """Answer a request.

        Args:
            inputs: the request's tensors.
            seconds: how long it may take.
            channel: gets the answer, or an error that comes later.

        Raises:
            InvalidRequest: a field is empty or malformed.
            Overloaded: too many requests are open, or the model is being unloaded.
        """
        entry = _Open(channel, inputs, self._task.prompts(inputs), time.monotonic() + seconds)
        with self._lock:
            if self._stopping:
                raise Overloaded("the model is being unloaded")
            if len(self._open) >= self._max_waiting:
                raise Overloaded(f"{self._max_waiting} requests are being answered already; try again later")
            self._open.add(entry)
        self._loop.call_soon_threadsafe(self._begin, entry)

    def stop(self) -> None:
        """End the thread; requests that are open fail."""
        with self._lock:
            self._stopping = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        watch = self._loop.create_task(self._watch())
        self._loop.run_forever()
        watch.cancel()
        left = [entry.work for entry in self._open if entry.work is not None]
        for work in left:
            work.cancel()
        self._loop.run_until_complete(asyncio.gather(watch, *left, return_exceptions=True))
        self._loop.run_until_complete(self._generator.close())
        self._loop.close()

    def _begin(self, entry: _Open) -> None:
        self._some_open.set()
        entry.work = self._loop.create_task(self._answer(entry))
        # Not at the end of the coroutine: a task that is cancelled before its first step never enters it.
        entry.work.add_done_callback(lambda work: self._finish(entry, work))

    async def _watch(self) -> None:
        """Cancel the calls of clients that have gone, and all of them once the model is being unloaded."""
        next_question = 0.0
        while True:
            await self._some_open.wait()
            await asyncio.sleep(WATCH_SECONDS)
            if not self._open:
                self._some_open.clear()
            elif time.monotonic() >= next_question:
                next_question = time.monotonic() + UNLOADING_SECONDS
                if self._unloading():
                    self._cancel_all()
            for entry in list(self._open):
                try:
                    if entry.work is not None and entry.channel.is_cancelled():
                        entry.work.cancel()
                except Exception:
                    logger.exception("can't tell whether a client has gone")

    def _cancel_all(self) -> None:
        with self._lock:
            self._stopping = True
        for entry in list(self._open):
            if entry.work is not None:
                entry.work.cancel()

    async def _answer(self, entry: _Open) -> Tensors:
        at_once = asyncio.Semaphore(QUESTIONS_AT_ONCE)
        calls = [self._complete(entry, prompt, at_once) for prompt in entry.prompts]
        return self._task.answer(entry.prompts, await _all(calls))

    def _finish(self, entry: _Open, work: asyncio.Task[Tensors]) -> None:
        with self._lock:
            self._open.discard(entry)
        try:
            if work.cancelled():
                unloaded = Overloaded("the model was unloaded before the answer was complete")
                entry.channel.fail(unloaded if self._stopping else Cancelled("the request was cancelled"))
            elif isinstance(error := work.exception(), Exception):
                entry.channel.fail(error)
            else:
                entry.channel.send(work.result())
        except Exception:
            logger.exception("a response could not be sent")

    async def _complete(self, entry: _Open, prompt: Prompt, at_once: asyncio.Semaphore) -> Completion:
        async with at_once:
            left = entry.deadline - time.monotonic()
            if left <= 0:
                raise DeadlineExceeded("the timeout was over before all was answered")
            return await self._generator.complete(self._task.generator_inputs(entry.inputs, prompt), left)


async def _all(calls: list[Any]) -> list[Completion]:
    """The results of all calls; if one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
