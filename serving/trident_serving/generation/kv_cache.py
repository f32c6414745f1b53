"""The keys and values of every sequence: one buffer a tensor, one row a sequence.

The decoder's attention operator reads and writes these buffers in place (see `decoder`), so nothing is
copied while a sequence runs. Memory is taken from the system when a position is first written and goes back
with `release`, so what is resident is what rows hold, not what they could hold.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

PAGE = mmap.PAGESIZE


class KVCache:
    """Buffers [rows, kv_heads, capacity, head_dim] by the name of the graph's input.

    Args:
        shapes: key-value heads and numbers per head of each tensor.
        rows: sequences that it can hold.
        capacity: positions of a row.
        dtype: of the tensors, float32 or float16.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], rows: int, capacity: int, dtype: DTypeLike = np.float32
    ) -> None:
        self.rows = rows
        self.capacity = capacity
        self._maps: dict[str, mmap.mmap] = {}
        self.buffers: dict[str, NDArray[Any]] = {}
        for name, (kv_heads, head_dim) in shapes.items():
            shape = (rows, kv_heads, capacity, head_dim)
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_NOHUGEPAGE)  # a huge page would keep the positions of several heads resident
            self._maps[name] = memory
            self.buffers[name] = np.frombuffer(memory, dtype).reshape(shape)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one position of one row, in all tensors."""
        return sum(buffer[0, :, 0].nbytes for buffer in self.buffers.values())

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` positions of row `target` become those of row `source`."""
        for buffer in self.buffers.values():
            buffer[target, :, :length] = buffer[source, :, :length]

    def release(self, row: int, start: int = 0) -> None:
        """Give the memory of the row's positions from `start` on back; they read as zeros then."""
        for name, buffer in self.buffers.items():
            strides = buffer.strides
            heads = range(buffer.shape[1]) if start else (0,)
            length = (self.capacity - start) * strides[2] if start else strides[0]
            for head in heads:
                first = row * strides[0] + head * strides[1] + start * strides[2]
                aligned = -(-first // PAGE) * PAGE
                size = (first + length) // PAGE * PAGE - aligned
                if size > 0:
                    self._maps[name].madvise(mmap.MADV_DONTNEED, aligned, size)
