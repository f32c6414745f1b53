"""What a call can raise.

TridentError
├── InvalidRequestError     the request can never succeed: its message names field, value and limit
├── NotFoundError           there is no such model on the server
├── UnavailableError        the server can't be reached, is draining, or has no room: try again later
├── DeadlineExceededError   the answer took longer than `timeout`
├── CancelledError          the call was cancelled
└── ServerError             anything else: a defect of the server
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc


class TridentError(Exception):
    """Base of all errors of this package."""


class InvalidRequestError(TridentError):
    """The server refuses the request; the message says why."""


class NotFoundError(TridentError):
    """There is no such model on the server."""


class UnavailableError(TridentError):
    """The server can't be reached or has no room now."""


class DeadlineExceededError(TridentError):
    """The answer took longer than the call's timeout."""


class CancelledError(TridentError):
    """The call was cancelled before its answer was complete."""


class ServerError(TridentError):
    """The server failed."""


_BY_CODE: dict[grpc.StatusCode, type[TridentError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: CancelledError,
}


@contextmanager
def translated() -> Iterator[None]:
    """Raise gRPC's errors as this package's, by status code."""
    try:
        yield
    except grpc.RpcError as error:
        kind = _BY_CODE.get(error.code(), ServerError)
        raise kind(error.details() or error.code().name) from error


def from_named_code(message: str) -> TridentError | None:
    """The error of a message that begins with the name of a gRPC code, as "INVALID_ARGUMENT: ..."; else None."""
    name, separator, text = message.partition(": ")
    codes = {code.name: code for code in grpc.StatusCode}
    if not separator or name not in codes:
        return None
    return _BY_CODE.get(codes[name], ServerError)(text)
