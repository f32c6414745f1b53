"""The keys and values of every running sequence: one buffer a tensor, one row a sequence.

The decoder's attention operator reads and writes these buffers in place (see `decoder`), so nothing is
copied while a sequence runs; a row is copied once, when a hole before it is closed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from trident_serving.generation.scheduler import RowMove


class KVCache:
    """Buffers [slots, kv_heads, capacity, head_dim], float32, by the name of the graph's input.

    Memory is taken from the system when a position is first written, not when the cache is made.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], slots: int, capacity: int) -> None:
        self.slots = slots
        self.capacity = capacity
        self.buffers: dict[str, NDArray[np.float32]] = {
            name: np.zeros((slots, kv_heads, capacity, head_dim), np.float32)
            for name, (kv_heads, head_dim) in shapes.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def move(self, moves: Sequence[RowMove]) -> None:
        """Copy rows, as the scheduler asks."""
        for move in moves:
            for buffer in self.buffers.values():
                buffer[move.target, :, : move.length] = buffer[move.source, :, : move.length]
