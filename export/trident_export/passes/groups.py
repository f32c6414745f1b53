"""Weights in groups along the input, with a scale for each group: ONNX Runtime's MatMulNBits.

Accuracy level 4 quantizes the input in groups too, at run time, and multiplies in int8. A group belongs to one row of
a batch, so an answer does not depend on who shares the batch; `quantize_dynamic`, which has one scale for a whole batch
and saturates on AVX2, is no pass here (docs/decisions/0003-int8-by-blocks.md).
Operator reference: onnxruntime docs/ContribOperators.md, com.microsoft.MatMulNBits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from trident_export.errors import UsageError
from trident_export.graphs.editing import add_domain, array, constant, drop_unused, make, replace
from trident_export.passes.base import CalibrationRuns, Pass, matmul_nodes, ranks

ACCURACY_LEVEL = 4
_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Groups(Pass):
    """Weights of 4 or 8 bits in groups.

    Attributes:
        bits: of a weight.
        group: weights in a group, which share a scale.
        zero_points: whether each group has one; without, 0 is in the middle of the range.
    """

    bits: int = 8
    group: int = 32
    zero_points: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_group(self.bits, self.group)

    def apply(self, model: ir.Model, chosen: Sequence[str], runs: CalibrationRuns | None) -> tuple[ir.Model, set[str]]:
        """See `Pass`."""
        from onnxruntime.quantization import matmul_nbits_quantizer as nbits

        config = nbits.DefaultWeightOnlyQuantConfig(self.group, is_symmetric=not self.zero_points, bits=self.bits)
        for matmul in matmul_nodes(model, chosen):
            source, weight = matmul.inputs
            parts = nbits.DefaultWeightOnlyQuantizer(config).qbits_block_quant(array(weight))
            names = (f"{weight.name}_Q{self.bits}", f"{weight.name}_scales", f"{weight.name}_zero_points")
            count = 3 if self.zero_points else 2
            constants = [constant(model.graph, *pair) for pair in zip(names[:count], parts[:count], strict=True)]
            name, output = f"{matmul.name}_Q{self.bits}", matmul.outputs[0].name
            replace(matmul, [make_matmul(name, [source, *constants], output, weight.shape, self.bits, self.group)])
        drop_unused(model)
        add_domain(model)
        return model, set(chosen)


@dataclass(frozen=True)
class GroupMinima(Pass):
    """Weights of 4 bits in groups with a scale and a minimum each.

    MatMulNBits with a zero point that is no integer leaves its fast kernel. So the matmul is symmetric, about eight
    steps above the minimum, and that middle of each group, times the sum of the group's inputs, is a second and
    smaller matmul, in float32. Matmuls whose input is no multiple of a group are left.

    Attributes:
        group: weights in a group.
    """

    group: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group not in _SIZES:
            raise UsageError(f"group must be one of {_SIZES}, found {self.group}")

    def apply(self, model: ir.Model, chosen: Sequence[str], runs: CalibrationRuns | None) -> tuple[ir.Model, set[str]]:
        """See `Pass`."""
        known = ranks(model)
        taken: set[str] = set()
        sums: dict[ir.Value, ir.Value] = {}
        for matmul in matmul_nodes(model, chosen):
            source, weight = matmul.inputs
            if source.name not in known or weight.shape[0] % self.group:
                continue
            if source not in sums:
                made = self._group_sums(model.graph, source, known[source.name], weight.shape[0])
                matmul.prepend(made)
                sums[source] = made[-1].outputs[0]
            replace(matmul, self._matmul(matmul, sums[source]))
            taken.add(matmul.name)
        drop_unused(model)
        add_domain(model)
        return model, taken

    def _group_sums(self, graph: ir.Graph, source: ir.Value, dimensions: int, size: int) -> list[ir.Node]:
        """[..., size] to the sums of its groups, [..., size / group]."""
        path = f"minima/{source.name}"
        sizes = [0] * (dimensions - 1) + [size // self.group, self.group]
        shape = constant(graph, f"{path}/shape", np.array(sizes, np.int64))
        last = constant(graph, "minima/last", np.array([-1], np.int64))
        groups = make("Reshape", [source, shape], f"{path}/blocks")
        return [groups, make("ReduceSum", [*groups.outputs, last], f"{path}/sums", keepdims=0)]

    def _matmul(self, matmul: ir.Node, sums: ir.Value) -> list[ir.Node]:
        path = f"minima/{matmul.name}"
        source, weight = matmul.inputs
        values: list[NDArray[Any]] = [*pack(array(weight), self.group)]
        names = ("weight", "steps", "middles")
        packed, steps, middles = (
            constant(matmul.graph, f"{path}/{name}", value) for name, value in zip(names, values, strict=True)
        )
        about = make_matmul(matmul.name, [source, packed, steps], f"{path}/about", weight.shape, 4, self.group)
        middle = make("MatMul", [sums, middles], f"{path}/middle")
        return [about, middle, make("Add", [*about.outputs, *middle.outputs], f"{path}/sum")]


def check_group(bits: int, group: int) -> None:
    """Refuse what MatMulNBits has no fast kernel for.

    Raises:
        UsageError: so.
    """
    if bits not in (4, 8) or group not in _SIZES:
        raise UsageError(f"bits must be 4 or 8 and group one of {_SIZES}, found {bits} and {group}")


def make_matmul(
    name: str, inputs: Sequence[ir.Value], output: str, shape: Sequence[int], bits: int, group: int
) -> ir.Node:
    """MatMulNBits of an activation, a packed weight of a shape [channels, outputs] and its groups' scales."""
    channels, outputs = shape
    sizes = {"K": channels, "N": outputs, "bits": bits, "block_size": group, "accuracy_level": ACCURACY_LEVEL}
    return make("MatMulNBits", inputs, output, name, "com.microsoft", **sizes)


def pack(weight: NDArray[np.float32], group: int) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """A matrix [inputs, outputs] in groups of 16 levels between each group's least and largest weight.

    Returns:
        The levels as MatMulNBits reads them, uint8 [outputs, groups, group / 2]; the steps between levels,
        float32 [outputs, groups]; and the weight at level 8, float32 [groups, outputs].
    """
    groups = np.ascontiguousarray(weight.T).reshape(weight.shape[1], -1, group)
    least = groups.min(axis=-1)
    steps = np.maximum((groups.max(axis=-1) - least) / 15, 1e-12)
    levels = np.clip(np.rint((groups - least[..., None]) / steps[..., None]), 0, 15).astype(np.uint8)
    packed = levels[..., 0::2] | (levels[..., 1::2] << 4)
    return packed, steps, np.ascontiguousarray((least + 8 * steps).T)
