"""What the sender sends when."""

from __future__ import annotations

import math
from typing import Any

from trident_serving.generation.outbox import Paced


def test_streams_that_are_due_soon_go_out_with_the_first() -> None:
    paced = Paced()
    streams: list[Any] = [object() for _ in range(4)]
    for due, stream in zip((1.0, 1.02, 1.05, 1.06), streams, strict=True):
        paced.add(due, stream)
    assert paced.take(0.999, 0.5) == []  # none is due, however soon the others are
    assert paced.first == 1.0
    assert paced.take(1.0, 0.05) == streams[:3]
    assert paced.take(1.0, 0.05) == []
    assert paced.first == 1.06
    assert paced.take(math.inf, 0.0) == streams[3:]
    assert paced.first == math.inf
    assert paced.take(math.inf, 0.0) == []
