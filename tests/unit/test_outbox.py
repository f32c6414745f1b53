"""When the sender sends what."""

from __future__ import annotations

import math
import queue
from typing import Any

from trident_serving.runtime.outbox import Outbox, PendingStreams


def test_streams_that_are_due_soon_go_out_with_the_first() -> None:
    pending = PendingStreams()
    streams: list[Any] = [object() for _ in range(4)]
    for due, stream in zip((1.0, 1.02, 1.05, 1.06), streams, strict=True):
        pending.add(due, stream)
    assert pending.take(0.999, 0.5) == []  # none is due, however soon the others are
    assert pending.first == 1.0
    assert pending.take(1.0, 0.05) == streams[:3]
    assert pending.take(1.0, 0.05) == []
    assert pending.first == 1.06
    assert pending.take(math.inf, 0.0) == streams[3:]
    assert pending.first == math.inf
    assert pending.take(math.inf, 0.0) == []


class Unsendable:
    """A stream, and its channel, of a response that no message can hold."""

    cancelled = pending = False
    last_sent = 0.0
    urgent = True

    def __init__(self) -> None:
        self.channel = self
        self.failures: queue.SimpleQueue[Exception] = queue.SimpleQueue()

    def send_pending(self) -> bool:
        "\ud800".encode()
        return True

    def is_cancelled(self) -> bool:
        return False

    def fail(self, error: Exception) -> None:
        self.failures.put(error)
        raise RuntimeError("Triton takes no error either")


def test_a_response_that_can_not_be_sent_fails_its_request() -> None:
    outbox = Outbox()
    for stream in (Unsendable(), Unsendable()):  # the thread goes on behind the first
        outbox.add(stream)
        assert isinstance(stream.failures.get(timeout=30), UnicodeEncodeError)
        assert stream.cancelled
    outbox.stop()
