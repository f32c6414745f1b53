"""What the layers of a hybrid model keep of a text beside keys and values: states of one size, whatever its length.

A state stands for all tokens that a slot holds. So it can't be cut back to the first of them, and a slot that is
used for another text begins with zeros. A run of the decoder reads and writes the states in place.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray


class SlotStates:
    """In this machine's memory: float32 buffers [slots, ...] by the name of the graph's input.

    Args:
        shapes: of one slot's state.
        slots: texts that it can hold.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], slots: int) -> None:
        self.buffers: dict[str, NDArray[np.float32]] = {
            name: np.zeros((slots, *shape), np.float32) for name, shape in shapes.items()
        }

    def __bool__(self) -> bool:
        return bool(self.buffers)

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of the states of one slot."""
        return sum(buffer[0].nbytes for buffer in self.buffers.values())

    def window(self, name: str, first_slot: int, slots: int) -> tuple[tuple[int, ...], int]:
        """Shape and address of a tensor's slots."""
        view = self.buffers[name][first_slot : first_slot + slots]
        return view.shape, view.ctypes.data

    def reset(self, slot: int) -> None:
        """The slot's states are those of no text."""
        for buffer in self.buffers.values():
            buffer[slot] = 0

    def copy(self, source: int, target: int) -> None:
        """The states of slot `target` become those of slot `source`."""
        for buffer in self.buffers.values():
            buffer[target] = buffer[source]
