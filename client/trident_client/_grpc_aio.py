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
from trident_client._errors import CancelledError, InvalidRequestError, TridentError, from_named_code, translated
from trident_client._grpc import STREAM, channel_options, inference, metadata, question
from trident_client._steps import Ask, Tensors


class AsyncGrpcServer:
    """One channel, of the event loop in which it is made.

    Args:
        url: host and port.
        admin_key: see `Client`.
    """

    def __init__(self, url: str, admin_key: str | None) -> None:
        self._url = url
        self._admin_key = admin_key
        self._closed = False
        self._channel = grpc.aio.insecure_channel(url, options=channel_options(url))
        self._stub = pb.Stub(self._channel)
        self._stream = self._channel.unary_stream(
            STREAM,
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )

    async def close(self) -> None:
        """End the channel and all that runs on it."""
        self._closed = True
        await self._channel.close()

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

    async def ask(self, ask: Ask, seconds: float | None) -> Any:
        """The answer to a question."""
        name, request, answer = question(ask)
        with self._translated():
            keys = metadata(ask, self._url, self._admin_key)
            return answer(await getattr(self._stub, name)(request, timeout=seconds, metadata=keys))

    async def infer(self, model: str, inputs: Tensors, seconds: float | None) -> dict[str, NDArray[Any]]:
        """The response to a request that has one."""
        with self._translated():
            response = await self._stub.ModelInfer(inference(model, inputs, seconds), timeout=seconds)
        return _wire.parse_response(response)

    async def stream(
        self, model: str, inputs: Tensors, seconds: float | None
    ) -> AsyncGenerator[dict[str, NDArray[Any]], None]:
        """The responses to a request, as they come."""
        with self._translated():
            call = self._stream(inference(model, inputs, seconds), timeout=seconds)
            try:
                async for response in call:
                    if response.error_message:
                        raise await self._refusal(model, response.error_message, seconds)
                    yield _wire.parse_response(response.infer_response)
            finally:
                call.cancel()

    async def _refusal(self, model: str, message: str, seconds: float | None) -> TridentError:
        if (error := from_named_code(message)) is not None:
            return error
        try:
            await self.ask(Ask("metadata", model), seconds)
        except TridentError as refusal:
            return refusal
        return InvalidRequestError(message)
