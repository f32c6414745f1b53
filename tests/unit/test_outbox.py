"""What the sender sends when."""

from __future__ import annotations

import math
from typing import Any

from trident_serving.runtime.outbox import PendingStreams


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
