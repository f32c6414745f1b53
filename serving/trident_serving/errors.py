"""What can go wrong with a request, by what the caller should do about it.

    ServingError
    ├── InvalidRequest   the request can never succeed: Triton's INVALID_ARGUMENT
    └── Overloaded       it may succeed later: Triton's UNAVAILABLE

Anything else that is raised is a defect of the server: Triton's INTERNAL.
"""

from __future__ import annotations


class ServingError(Exception):
    """A request failed for a reason that its sender should read."""


class InvalidRequest(ServingError, ValueError):
    """The request names something impossible; the message says which field, value and limit."""


class Overloaded(ServingError):
    """The server has no room for the request now."""
