"""What a call can raise.

TridentError
├── InvalidRequestError     the request can never succeed: its message names field, value and limit
├── NotFoundError           there is no such model on the server
├── UnavailableError        the server can't be reached, is draining, or has no room: try again later
│   └── OverloadedError     it has no room: its queue is full
├── ForbiddenError          the call needs a key, which is missing or wrong
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


class OverloadedError(UnavailableError):
    """The server's queue is full; nothing of the request was done."""


class ForbiddenError(TridentError):
    """The call needs a key, which is missing or wrong."""


class DeadlineExceededError(TridentError):
    """The answer took longer than the call's timeout."""


class CancelledError(TridentError):
    """The call was cancelled before its answer was complete."""


class ServerError(TridentError):
    """The server failed."""


# Triton uses one code for different errors, which only their texts tell apart. A call without its key is UNAVAILABLE,
# like one that may be sent again. An answer that is lost with its backend process is INTERNAL, like a defect. A model
# that is being loaded again, or goes as the server ends, is NOT_FOUND, like one that never was there. gRPC's code for
# messages beyond a limit is also a proxy's for too many requests. A generator that is asked for one response, as other
# tasks give it, is a missing feature to Triton. It has no code for a time that is over: such an answer is UNAVAILABLE.
_RESTRICTED = re.compile(r"This (protocol|API) is restricted, expecting header")
_AWAY = re.compile(r"Stub process '.*' is not healthy|has no available versions")
_FULL = re.compile(r"queue is full|requests are being answered already")
_OVER = re.compile(r"^the timeout (of \S+ s )?was over ")
_DECOUPLED = re.compile(r"doesn't support models with decoupled transaction policy")
_TOO_LARGE = re.compile(r"larger than max")
# Over HTTP, a field that is no input is a parameter, which is no list.
_NO_IMAGES = re.compile(r"unexpected inference input 'images' for model '([^']*)'|^parameter 'images' has invalid type")
_FORBIDDEN = (
    "the server asks for its admin key: set TRIDENT_ADMIN_KEY or give Client(admin_key=...); over gRPC, the client "
    "finds the key of a server that the same user started on this machine"
)

_BY_CODE: dict[grpc.StatusCode, type[TridentError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: UnavailableError,
    grpc.StatusCode.UNAUTHENTICATED: ForbiddenError,
    grpc.StatusCode.PERMISSION_DENIED: ForbiddenError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: CancelledError,
}
_BY_STATUS: dict[int, type[TridentError]] = {
    400: InvalidRequestError,
    401: ForbiddenError,
    403: ForbiddenError,
    404: NotFoundError,
    413: InvalidRequestError,
    422: InvalidRequestError,
    429: UnavailableError,
    499: CancelledError,
    502: UnavailableError,
    503: UnavailableError,
    504: DeadlineExceededError,
}


@contextmanager
def translated() -> Iterator[None]:
    """Raise gRPC's errors as this package's, by status code."""
    try:
        yield
    except grpc.RpcError as error:
        details = error.details() or error.code().name
        if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE.search(details):
            raise InvalidRequestError(details) from error
        raise _known(details, _BY_CODE.get(error.code(), ServerError)) from error


def from_status(status: int, message: str) -> TridentError:
    """The error of an HTTP status, whose message may name a more exact code."""
    named = from_named_code(message)
    return named or _known(message or f"the server answered with status {status}", _BY_STATUS.get(status, ServerError))


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
    return _known(text, _BY_CODE.get(codes[name], ServerError))


def refused(message: str) -> InvalidRequestError:
    """The error of a message about a request that does not fit its model.

    Triton itself refuses what is no input of the model, before a backend sees it, and tells no more than its name.
    """
    if (found := _NO_IMAGES.search(message)) is None:
        return InvalidRequestError(message)
    name = f"the model {found[1]!r}" if found[1] else "this model"
    return InvalidRequestError(
        f"{name} reads no images: leave them out, or ask a vision-language model (SmolVLM, "
        "Idefics3, Qwen2-VL or Qwen2.5-VL) whose table sets limits.images"
    )


def _known(message: str, kind: type[TridentError]) -> TridentError:
    """The error of a message and what its code says of it."""
    if _RESTRICTED.search(message):
        return ForbiddenError(_FORBIDDEN)
    if _DECOUPLED.search(message):
        return InvalidRequestError("the model generates text or transcribes speech, and this call is for another task")
    if _OVER.search(message):
        kind = DeadlineExceededError
    if _AWAY.search(message):
        kind = UnavailableError
    if kind is UnavailableError and says_full(message):
        kind = OverloadedError
    return refused(message) if kind is InvalidRequestError else kind(message)


def says_full(message: str) -> bool:
    """Whether the message of an UnavailableError says that the server had no room."""
    return bool(_FULL.search(message))
