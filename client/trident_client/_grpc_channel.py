"""A server over gRPC, with calls that block."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator
from typing import Any

import grpc
from numpy.typing import NDArray

from trident_client import _protocol as pb
from trident_client import _wire
from trident_client._connections import Connections
from trident_client._errors import (
    DeadlineExceededError,
    TridentError,
    UnavailableError,
    from_named_code,
    refused,
    translated,
)
from trident_client._grpc import (
    END_SECONDS,
    ONE_THREAD,
    OWN_CONNECTION,
    STREAM,
    channel_options,
    credentials,
    inference,
    metadata,
    question,
)
from trident_client._settings import Address, Settings
from trident_client._steps import Ask, Tensors
from trident_client._watch import Watch


class _Channel:
    """A channel with the calls over it."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.stub = pb.Stub(channel)
        # Triton's stream may carry many requests; each of our calls sends one.
        self.stream = channel.unary_stream(
            STREAM,
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )


class GrpcServer:
    """One channel, and those before it that hung.

    Args:
        address: of the server.
        settings: see `Client`.
        watch: ends streams that are silent.
    """

    def __init__(self, address: Address, settings: Settings, watch: Watch) -> None:
        self._url = address.target
        self._secure = address.secure
        self._settings = settings
        self._watch = watch
        self._connections = Connections(self._connect)

    def _connect(self, again: bool) -> _Channel:
        options = [*channel_options(self._url, self._settings), ONE_THREAD, *([OWN_CONNECTION] * again)]
        if self._secure:
            return _Channel(grpc.secure_channel(self._url, credentials(self._settings), options=options))
        return _Channel(grpc.insecure_channel(self._url, options=options))

    def close(self) -> None:
        """End the channels and all that runs on them."""
        for each in self._connections.all():
            each.channel.close()

    def renew(self, since: float) -> None:
        """Send further requests over a new connection, because the present one hangs.

        Requests that others have sent over it go on.

        Args:
            since: see `Connections.renew`.
        """
        for each in self._connections.renew(since):
            each.channel.close()

    def ask(self, ask: Ask, seconds: float | None) -> Any:
        """The answer to a question.

        Args:
            seconds: it may take; None: no limit.
        """
        name, request, answer = question(ask)
        keys = metadata(self._settings, ask, self._url)
        with translated(), self._connections.using() as connection:
            return answer(getattr(connection.stub, name)(request, timeout=seconds, metadata=keys))

    def start(self, model: str, inputs: Tensors, seconds: float | None) -> GrpcCall:
        """Send a request that has one response."""
        request, keys = inference(model, inputs, seconds), metadata(self._settings)
        connection, end = self._connections.begin()
        try:
            future = connection.stub.ModelInfer.future(request, timeout=seconds, metadata=keys)
        except BaseException:
            end()
            raise
        future.add_done_callback(lambda _: end())
        return GrpcCall(future)

    def stream(
        self, model: str, inputs: Tensors, seconds: float | None, silence: float | None
    ) -> Generator[dict[str, NDArray[Any]], None, None]:
        """The responses to a request, as they come.

        Args:
            seconds: until the last of them; None: no limit.
            silence: seconds without a response, as long as somebody waits for it; None: no limit.
        """
        request, keys = inference(model, inputs, seconds), metadata(self._settings)
        with translated(), self._connections.using() as connection:
            call = connection.stream(request, timeout=seconds, metadata=keys)
            try:
                for response in self._watched(call, silence):
                    if response.error_message:
                        self._await_end(call)
                        raise self._refusal(model, response.error_message, seconds or silence)
                    yield _wire.parse_response(response.infer_response)
            finally:
                call.cancel()

    def _await_end(self, call: Any) -> None:
        """Read what follows an error, which is the end of the stream."""
        until, ended = time.monotonic() + END_SECONDS, contextlib.suppress(grpc.RpcError)
        with ended, self._watch.over(call.cancel) as wait, wait.limited(until):
            for _ in call:
                pass

    def _watched(self, call: Any, silence: float | None) -> Generator[Any, None, None]:
        """The messages of a call."""
        if silence is None:
            yield from call
            return
        with self._watch.over(call.cancel) as wait:
            try:
                while True:
                    with wait.limited(time.monotonic() + silence):
                        response = next(call, None)
                    if response is None:
                        return
                    yield response
            except grpc.RpcError as error:
                if wait.ended:
                    raise DeadlineExceededError(f"there was no response for {silence:g} s") from error
                raise

    def _refusal(self, model: str, message: str, seconds: float | None) -> TridentError:
        """The error behind a message of a stream, which carries no status code.

        Trident's generator begins its messages with the code's name. Messages of Triton itself have none: either the
        model is unknown, which the server is asked, or the request does not fit the model.
        """
        if (error := from_named_code(message)) is not None:
            return error
        try:
            self.ask(Ask("metadata", model), seconds)
        except TridentError as refusal:
            return refusal
        return refused(message)


class GrpcCall:
    """A request under way; `send_all` waits for it."""

    def __init__(self, future: Any) -> None:
        self._future = future

    def add_done_callback(self, callback: Callable[[Any], Any]) -> None:
        """Have a function called with this call once it has ended."""
        self._future.add_done_callback(lambda _: callback(self))

    def code(self) -> grpc.StatusCode:
        """How it ended."""
        return grpc.StatusCode.UNAVAILABLE if isinstance(self.error(), UnavailableError) else self._future.code()

    def details(self) -> str:
        """What the server said of an error."""
        return self._future.details() or ""

    def error(self) -> TridentError | None:
        """Its error, None if it has a response."""
        try:
            with translated():
                self._future.result()
        except TridentError as error:
            return error
        return None

    def cancel(self) -> None:
        """Cancel it."""
        self._future.cancel()

    def result(self) -> dict[str, NDArray[Any]]:
        """The tensors of the response."""
        with translated():
            return _wire.parse_response(self._future.result())
