"""A server over gRPC, with calls that block."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import grpc
from numpy.typing import NDArray

from trident_client import _protocol as pb
from trident_client import _wire
from trident_client._errors import InvalidRequestError, TridentError, from_named_code, translated
from trident_client._grpc import ONE_THREAD, STREAM, channel_options, inference, metadata, question
from trident_client._steps import Ask, Tensors


class GrpcServer:
    """One channel.

    Args:
        url: host and port.
        admin_key: see `Client`.
    """

    def __init__(self, url: str, admin_key: str | None) -> None:
        self._url = url
        self._admin_key = admin_key
        self._channel = grpc.insecure_channel(url, options=[*channel_options(url), ONE_THREAD])
        self._stub = pb.Stub(self._channel)
        # Triton's stream may carry many requests; each of our calls sends one.
        self._stream = self._channel.unary_stream(
            STREAM,
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )

    def close(self) -> None:
        """End the channel and all that runs on it."""
        self._channel.close()

    def ask(self, ask: Ask, seconds: float | None) -> Any:
        """The answer to a question."""
        name, request, answer = question(ask)
        with translated():
            keys = metadata(ask, self._url, self._admin_key)
            return answer(getattr(self._stub, name)(request, timeout=seconds, metadata=keys))

    def start(self, model: str, inputs: Tensors, seconds: float | None) -> Any:
        """Send a request that has one response; gives gRPC's future of it."""
        return self._stub.ModelInfer.future(inference(model, inputs, seconds), timeout=seconds)

    def stream(
        self, model: str, inputs: Tensors, seconds: float | None
    ) -> Generator[dict[str, NDArray[Any]], None, None]:
        """The responses to a request, as they come."""
        with translated():
            call = self._stream(inference(model, inputs, seconds), timeout=seconds)
            try:
                for response in call:
                    if response.error_message:
                        raise self._refusal(model, response.error_message, seconds)
                    yield _wire.parse_response(response.infer_response)
            finally:
                call.cancel()

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
        return InvalidRequestError(message)
