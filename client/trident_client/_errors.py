"""What a call can raise.

TridentError
├── InvalidRequestError     the request can never succeed: its message names field, value and limit
├── NotFoundError           there is no such model on the server
├── UnavailableError        the server can't be reached, is draining, or has no room: try again later
├── ForbiddenError          the call needs the server's admin key, which is missing or wrong
├── DeadlineExceededError   the answer took longer than `timeout`
├── CancelledError          the call was cancelled
└── ServerError             anything else: a defect of the server
"""

from __future__ import annotations

import re
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


class ForbiddenError(TridentError):
    """The call needs the server's admin key."""


class DeadlineExceededError(TridentError):
    """The answer took longer than the call's timeout."""


class CancelledError(TridentError):
    """The call was cancelled before its answer was complete."""


class ServerError(TridentError):
    """The server failed."""


# Triton uses one code for different errors, which only their texts tell apart. A call without its key is UNAVAILABLE,
# like one that may be sent again. An answer that is lost with its backend process is INTERNAL, like a defect. A model
# that is being loaded again, or goes as the server ends, is NOT_FOUND, like one that never was there.
_RESTRICTED = re.compile(r"This protocol is restricted, expecting header")
_AWAY = re.compile(r"Stub process '.*' is not healthy|has no available versions")

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
        details = error.details() or error.code().name
        if _RESTRICTED.match(details):
            raise ForbiddenError(
                "the server asks for its admin key: set TRIDENT_ADMIN_KEY or give Client(admin_key=...); the client "
                "finds the key of a server that the same user started on this machine"
            ) from error
        kind = UnavailableError if _AWAY.search(details) else _BY_CODE.get(error.code(), ServerError)
        raise kind(details) from error


def from_named_code(message: str) -> TridentError | None:
    """The error of a message that begins with the name of a gRPC code, as "INVALID_ARGUMENT: ...", or that says that a
    model is unavailable for a moment; None for any other message.
    """
    if _AWAY.search(message):
        return UnavailableError(message)
    name, separator, text = message.partition(": ")
    codes = {code.name: code for code in grpc.StatusCode}
    if not separator or name not in codes:
        return None
    return _BY_CODE.get(codes[name], ServerError)(text)
