"""Embedding tables in eight bits: ONNX Runtime's GatherBlockQuantized.

A table is read a row at a time, so this saves memory and not time; of a small model it is the largest matrix.
Operator reference: onnxruntime docs/ContribOperators.md, com.microsoft.GatherBlockQuantized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from trident_export.errors import UsageError
from trident_export.graphs.editing import add_domain, array, constant, drop_unused, make, rank_of_weight, replace
from trident_export.passes.base import CalibrationRuns, Pass

BITS = 8
# Tables of fewer rows (positions, token types) are left.
LEAST_ROWS = 256
_MIDDLE = 128


@dataclass(frozen=True)
class Embedding(Pass):
    """Tables whose rows are a multiple of a group, and which nothing else uses.

    Attributes:
        group: numbers that share a scale.
    """

    group: int = 32
    for_matmuls: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group not in (16, 32, 64, 128):
            raise UsageError(f"group must be 16, 32, 64 or 128, found {self.group}")

    def apply(self, model: ir.Model, chosen: Sequence[str], runs: CalibrationRuns | None) -> tuple[ir.Model, set[str]]:
        """See `Pass`; it takes no matmuls."""
        for gather in list(model.graph):
            if gather.op_type != "Gather" or gather.attributes.get_int("axis", 0) or not self._fits(gather.inputs[0]):
                continue
            table, ids = gather.inputs
            levels, steps = pack(array(table), self.group)
            inputs = [
                constant(model.graph, f"{table.name}/levels", levels),
                ids,
                constant(model.graph, f"{table.name}/steps", steps),
            ]
            options = {"bits": BITS, "block_size": self.group, "gather_axis": 0, "quantize_axis": 1}
            name, output = gather.name, gather.outputs[0].name
            replace(gather, [make("GatherBlockQuantized", inputs, output, name, "com.microsoft", **options)])
            add_domain(model)
        drop_unused(model)
        return model, set()

    def _fits(self, table: ir.Value) -> bool:
        if rank_of_weight(table) != 2 or table.dtype != ir.DataType.FLOAT or len(table.uses()) != 1:
            return False
        rows, columns = table.shape
        return bool(rows >= LEAST_ROWS and columns % self.group == 0)


def pack(table: NDArray[np.float32], group: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """A table [rows, columns] as levels about 128, uint8 of its shape, and steps, float32 [rows, columns / group]."""
    groups = table.reshape(len(table), -1, group)
    steps = np.maximum(np.abs(groups).max(axis=-1) / (_MIDDLE - 1), 1e-12).astype(np.float32)
    levels = (np.rint(groups / steps[..., None]) + _MIDDLE).astype(np.uint8)
    return levels.reshape(table.shape), steps
