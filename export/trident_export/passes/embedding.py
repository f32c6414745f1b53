"""Embedding tables in eight bits: ONNX Runtime's GatherBlockQuantized.

A table is read a row at a time, so this saves memory and not time; of a small model it is the largest matrix.
Operator reference: onnxruntime docs/ContribOperators.md, com.microsoft.GatherBlockQuantized.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from trident_export.errors import UsageError
from trident_export.passes.base import CalibrationRuns, Pass, add_domain, drop_unused

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

    def apply(
        self, model: onnx.ModelProto, chosen: Sequence[str], runs: CalibrationRuns | None
    ) -> tuple[onnx.ModelProto, set[str]]:
        """See `Pass`; it takes no matmuls."""
        graph = model.graph
        users = Counter(name for node in graph.node for name in node.input)
        tables = {
            tensor.name: tensor
            for tensor in graph.initializer
            if len(tensor.dims) == 2
            and tensor.data_type == onnx.TensorProto.FLOAT
            and tensor.dims[0] >= LEAST_ROWS
            and tensor.dims[1] % self.group == 0
            and users[tensor.name] == 1
        }
        for node in graph.node:
            table = tables.get(node.input[0]) if node.op_type == "Gather" else None
            if table is None or any(attribute.name == "axis" and attribute.i for attribute in node.attribute):
                continue
            levels, steps = pack(numpy_helper.to_array(table), self.group)
            graph.initializer.append(numpy_helper.from_array(levels, f"{table.name}/levels"))
            graph.initializer.append(numpy_helper.from_array(steps, f"{table.name}/steps"))
            node.CopyFrom(
                helper.make_node(
                    "GatherBlockQuantized",
                    [f"{table.name}/levels", node.input[1], f"{table.name}/steps"],
                    list(node.output),
                    name=node.name,
                    domain="com.microsoft",
                    bits=BITS,
                    block_size=self.group,
                    gather_axis=0,
                    quantize_axis=1,
                )
            )
            add_domain(model)
        drop_unused(graph)
        return model, set()


def pack(table: NDArray[np.float32], group: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """A table [rows, columns] as levels about 128, uint8 of its shape, and steps, float32 [rows, columns / group]."""
    groups = table.reshape(len(table), -1, group)
    steps = np.maximum(np.abs(groups).max(axis=-1) / (_MIDDLE - 1), 1e-12).astype(np.float32)
    levels = (np.rint(groups / steps[..., None]) + _MIDDLE).astype(np.uint8)
    return levels.reshape(table.shape), steps
