"""A server over gRPC, with calls that are awaited; see `_grpc_channel`, which has the same methods."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import grpc
import grpc.aio
from numpy.typing import NDArray

from trident_client import _protocol as pb
from trident_client import _wire
from trident_client._connections import Connections
from trident_client._errors import (
    CancelledError,
    DeadlineExceededError,
    TridentError,
    from_named_code,
    refused,
    translated,
)
from trident_client._grpc import (
    END_SECONDS,
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
from trident_client._watch import Alarm


class _Channel:
    """A channel with the calls over it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.stub = pb.Stub(channel)
        self.stream = channel.unary_stream(
            STREAM,
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )


class AsyncGrpcServer:
    """One channel and those before it that hung, of the event loop in which it is made.

    Args:
        address: of the server.
        settings: see `Client`.
    """

    def __init__(self, address: Address, settings: Settings) -> None:
        self._url = address.target
        self._secure = address.secure
        self._settings = settings
        self._closed = False
        self._connections = Connections(self._connect)

    def _connect(self, again: bool) -> _Channel:
        options = [*channel_options(self._url, self._settings), *([OWN_CONNECTION] * again)]
        if self._secure:
            return _Channel(grpc.aio.secure_channel(self._url, credentials(self._settings), options=options))
        return _Channel(grpc.aio.insecure_channel(self._url, options=options))

    async def close(self) -> None:
        """End the channels and all that runs on them."""
        self._closed = True
        for each in self._connections.all():
            await each.channel.close()

    async def renew(self, since: float) -> None:
        """See `GrpcServer.renew`."""
        for each in self._connections.renew(since):
            await each.channel.close()

    async def ask(self, ask: Ask, seconds: float | None) -> Any:
        """The answer to a question."""
        name, request, answer = question(ask)
        keys = metadata(self._settings, ask, self._url)
        with self._translated(), self._connections.using() as connection:
            return answer(await getattr(connection.stub, name)(request, timeout=seconds, metadata=keys))

    async def infer(self, model: str, inputs: Tensors, seconds: float | None) -> dict[str, NDArray[Any]]:
        """The response to a request that has one."""
        request, keys = inference(model, inputs, seconds), metadata(self._settings)
        with self._translated(), self._connections.using() as connection:
            response = await connection.stub.ModelInfer(request, timeout=seconds, metadata=keys)
        return _wire.parse_response(response)

    async def stream(
        self, model: str, inputs: Tensors, seconds: float | None, silence: float | None
    ) -> AsyncGenerator[dict[str, NDArray[Any]], None]:
        """The responses to a request, as they come."""
        request, keys = inference(model, inputs, seconds), metadata(self._settings)
        with self._translated(), self._connections.using() as connection:
            call = connection.stream(request, timeout=seconds, metadata=keys)
            try:
                while True:
                    with Alarm(silence, f"there was no response for {silence} s"):
                        response = await call.read()
                    if response is grpc.aio.EOF:
                        return
                    if response.error_message:
                        await self._await_end(call)
                        raise await self._refusal(model, response.error_message, seconds or silence)
                    yield _wire.parse_response(response.infer_response)
            finally:
                call.cancel()

    async def _await_end(self, call: Any) -> None:
        """Read what follows an error, which is the end of the stream."""
        ended = contextlib.suppress(grpc.RpcError, DeadlineExceededError)
        with ended, Alarm(END_SECONDS, "the stream did not end"):
            while await call.read() is not grpc.aio.EOF:
                pass

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise gRPC's errors as this package's. It cancels the task that waits for a call whose channel is closed."""
        try:
            with translated():
                yield
        except asyncio.CancelledError:
            if self._closed:
                raise CancelledError("the client was closed") from None
            raise

    async def _refusal(self, model: str, message: str, seconds: float | None) -> TridentError:
        if (error := from_named_code(message)) is not None:
            return error
        try:
            await self.ask(Ask("metadata", model), seconds)
        except TridentError as refusal:
            return refusal
        return refused(message)
