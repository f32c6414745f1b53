"""What can go wrong with a request, by what the caller should do about it.

    ServingError
    ├── InvalidRequest     the request can never succeed: Triton's INVALID_ARGUMENT
    ├── Overloaded         it may succeed later: Triton's UNAVAILABLE
    ├── DeadlineExceeded   it took longer than its `timeout`, or the model's: gRPC's DEADLINE_EXCEEDED
    └── Cancelled          nobody waits for it any more: gRPC's CANCELLED

Anything else that is raised is a defect of the server: Triton's INTERNAL.
"""

from __future__ import annotations


class ServingError(Exception):
    """A request failed for a reason that its sender should read."""


class InvalidRequest(ServingError, ValueError):
    """The request names something impossible; the message says which field, value and limit."""


class Overloaded(ServingError):
    """The server has no room for the request now."""


class DeadlineExceeded(ServingError):
    """The request's time is over; the message says where it was by then."""


class Cancelled(ServingError):
    """The client has gone, or has cancelled the request."""
