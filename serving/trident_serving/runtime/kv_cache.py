"""The keys and values of every sequence: one buffer for each tensor, one slot for each sequence.

The decoder's attention operator reads and writes these buffers in place (see `decoder`), so nothing is
copied while a sequence runs. Memory is taken from the system when a position is first written and goes back
with `release`, so what is resident is what slots hold, not what they could hold.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import DTypeLike, NDArray

PAGE = mmap.PAGESIZE

# Graphs that attend by plain operators look at so many positions at a time: `trident_export.graphs.slot_attention`.
KEYS = 256


class Cache(Protocol):
    """What the decoder binds, and what the engine does to slots."""

    can_copy: bool
    device: str
    capacity: int
    dtype: np.dtype[Any]

    @property
    def names(self) -> list[str]:
        """The graph's inputs."""
        ...

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one position of one slot, in all tensors."""
        ...

    def window(self, name: str, first_slot: int, slots: int) -> tuple[tuple[int, ...], int]:
        """Shape and address of a tensor's slots."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` positions of slot `target` become those of slot `source`."""
        ...

    def release(self, slot: int, start: int = 0) -> None:
        """The slot's positions from `start` on are not needed any more."""
        ...


class KVCache:
    """In this machine's memory: buffers [slots, kv_heads, capacity, head_dim] by the name of the graph's input.

    Args:
        shapes: key-value heads and numbers per head of each tensor.
        slots: sequences that it can hold.
        capacity: positions of a slot.
        dtype: of the tensors, float32, float16 or int8.
    """

    can_copy = True
    device = "cpu"

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], slots: int, capacity: int, dtype: DTypeLike = np.float32
    ) -> None:
        self.capacity = capacity
        self.dtype = np.dtype(dtype)
        self._maps: dict[str, mmap.mmap] = {}
        self.buffers: dict[str, NDArray[Any]] = {}
        for name, (kv_heads, head_dim) in shapes.items():
            shape = (slots, kv_heads, capacity, head_dim)
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_NOHUGEPAGE)  # a huge page would keep the positions of several heads resident
            self._maps[name] = memory
            self.buffers[name] = np.frombuffer(memory, dtype).reshape(shape)

    @property
    def names(self) -> list[str]:
        """See `Cache.names`."""
        return list(self.buffers)

    def window(self, name: str, first_slot: int, slots: int) -> tuple[tuple[int, ...], int]:
        """See `Cache.window`."""
        view = self.buffers[name][first_slot : first_slot + slots]
        return view.shape, view.ctypes.data

    @property
    def bytes_per_token(self) -> int:
        """See `Cache.bytes_per_token`."""
        return sum(buffer[0, :, 0].nbytes for buffer in self.buffers.values())

    def copy(self, source: int, target: int, length: int) -> None:
        """See `Cache.copy`."""
        for buffer in self.buffers.values():
            buffer[target, :, :length] = buffer[source, :, :length]

    def copy_parts(self, parts: Sequence[tuple[int, int, int]], length: int) -> None:
        """Copy positions up to `length` of several slots to others; no target is a source.

        Args:
            parts: source, target, and the first position that is copied.
        """
        for buffer in self.buffers.values():
            for source, target, start in parts:
                buffer[target, :, start:length] = buffer[source, :, start:length]

    def release(self, slot: int, start: int = 0) -> None:
        """Give the memory of the slot's positions from `start` on back; they read as zeros then."""
        for name, buffer in self.buffers.items():
            strides = buffer.strides
            heads = range(buffer.shape[1]) if start else (0,)
            length = (self.capacity - start) * strides[2] if start else strides[0]
            for head in heads:
                first = slot * strides[0] + head * strides[1] + start * strides[2]
                aligned = -(-first // PAGE) * PAGE
                size = (first + length) // PAGE * PAGE - aligned
                if size > 0:
                    self._maps[name].madvise(mmap.MADV_DONTNEED, aligned, size)


class DeviceKVCache:
    """On a GPU, taken as a whole when it is made; slots can't be copied there, so prefixes are reused in place.

    Args:
        device_id: which GPU.
    """

    can_copy = False
    device = "cuda"

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], slots: int, capacity: int, dtype: DTypeLike, device_id: int = 0
    ) -> None:
        self.capacity = capacity
        self.dtype = np.dtype(dtype)
        self._values = {
            name: ort.OrtValue.ortvalue_from_shape_and_type(
                [slots, kv_heads, capacity, head_dim], dtype, self.device, device_id
            )
            for name, (kv_heads, head_dim) in shapes.items()
        }

    @property
    def names(self) -> list[str]:
        """See `Cache.names`."""
        return list(self._values)

    @property
    def bytes_per_token(self) -> int:
        """See `Cache.bytes_per_token`."""
        numbers: int = sum(shape[1] * shape[3] for shape in (value.shape() for value in self._values.values()))
        return numbers * self.dtype.itemsize

    def window(self, name: str, first_slot: int, slots: int) -> tuple[tuple[int, ...], int]:
        """See `Cache.window`."""
        value = self._values[name]
        shape = value.shape()
        slot_bytes = int(np.prod(shape[1:])) * self.dtype.itemsize
        return (slots, *shape[1:]), value.data_ptr() + first_slot * slot_bytes

    def copy(self, source: int, target: int, length: int) -> None:
        """Not possible; the engine does not ask for it where `can_copy` is false."""
        raise NotImplementedError

    def release(self, slot: int, start: int = 0) -> None:
        """Nothing to do: the memory was taken as a whole."""
