"""What can go wrong with a request, by what the caller should do about it.

    ServingError
    ├── InvalidRequest     the request can never succeed: Triton's INVALID_ARGUMENT
    ├── Overloaded         it may succeed later: Triton's UNAVAILABLE
    └── DeadlineExceeded   it took longer than its own `timeout`: gRPC's DEADLINE_EXCEEDED

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
    """The request's own time is over; the message says where it was by then."""
