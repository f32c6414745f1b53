"""Everything that this package raises on purpose, by who should read it.

    ServingError            a request failed: its sender reads the message
    ├── InvalidRequest      it can never succeed: Triton's INVALID_ARGUMENT
    ├── Overloaded          it may succeed later: Triton's UNAVAILABLE
    ├── DeadlineExceeded    it took longer than its `timeout`, or the model's: gRPC's DEADLINE_EXCEEDED
    └── Cancelled           its sender does not wait any more: gRPC's CANCELLED
    ModelError              a model can't be served: its owner reads the message in the server's log
    ├── ReadingError        a table, or a parameter of its config, has an impossible value
    ├── LoadError           its graph and its config disagree
    ├── DoesNotFit          it takes more memory than there is
    ├── DeviceMissing       the device that it is for is not there
    ├── KeyUnusable         the keys that its signature is checked with can't be used
    └── BrokenModel         it gives logits that are no numbers
    LauncherError           the server can't start or go on: the person who started it reads the message
    ├── StartError          it can't start
    ├── ServerDied          tritonserver ended, or can't go on
    └── ControlError        tritonserver does not do what the launcher asks for, or does not answer
        └── Refused         it answers that it can't

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
    """The request's time is over; the message says how far it had come."""


class Cancelled(ServingError):
    """The client has gone, or has cancelled the request."""


class ModelError(ValueError):
    """A model can't be served for a reason that its owner can do something about."""


class ReadingError(ModelError):
    """A table or text does not fit its dataclass; the message names table, key, value and what is allowed."""


class LoadError(ModelError):
    """The model can't be served as its config says."""


class DoesNotFit(ModelError):
    """The model's limits need more memory than there is; the message gives the sum and says which limit to change."""


class DeviceMissing(ModelError):
    """The device that the configuration asks for is not there; the message says what is and what to install."""


class KeyUnusable(ModelError):
    """The keys of signatures can't be used; the message says why."""


class BrokenModel(ModelError):
    """The model gave logits that are no numbers."""

    def __init__(self) -> None:
        super().__init__("the model gave logits that are not numbers")


class LauncherError(RuntimeError):
    """The server can't start, or can't go on."""


class StartError(LauncherError):
    """The server can't start; the message says why and what to do."""


class ServerDied(LauncherError):
    """tritonserver ended or can't go on; the message says how."""


class ControlError(LauncherError):
    """The server does not do what the launcher asks for, or does not answer."""


class Refused(ControlError):
    """The server answers that it can't do it."""
