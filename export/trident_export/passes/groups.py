"""Weights in groups along the input, with a scale for each group: ONNX Runtime's MatMulNBits.

Accuracy level 4 quantizes the input in groups too, at run time, and multiplies in int8. A group belongs to one row of
a batch, so an answer does not depend on who shares the batch; `quantize_dynamic`, which has one scale for a whole batch
and saturates on AVX2, is no pass here (docs/decisions/0003-int8-by-groups.md).
Operator reference: onnxruntime docs/ContribOperators.md, com.microsoft.MatMulNBits.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from trident_export.errors import UsageError
from trident_export.passes.base import CalibrationRuns, Pass, add_domain, drop_unused, ranks

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

    def apply(
        self, model: onnx.ModelProto, chosen: Sequence[str], runs: CalibrationRuns | None
    ) -> tuple[onnx.ModelProto, set[str]]:
        """See `Pass`."""
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
        taken = set(chosen)
        quantizer = MatMulNBitsQuantizer(
            model,
            bits=self.bits,
            block_size=self.group,
            is_symmetric=not self.zero_points,
            accuracy_level=ACCURACY_LEVEL,
            nodes_to_exclude=[
                node.name for node in model.graph.node if node.op_type == "MatMul" and node.name not in taken
            ],
            op_types_to_quantize=("MatMul",),
        )
        quantizer.process()
        return quantizer.model.model, taken


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

    def apply(
        self, model: onnx.ModelProto, chosen: Sequence[str], runs: CalibrationRuns | None
    ) -> tuple[onnx.ModelProto, set[str]]:
        """See `Pass`."""
        graph = model.graph
        known = ranks(model)
        weights = {tensor.name: tensor for tensor in graph.initializer}
        nodes: list[onnx.NodeProto] = []
        taken: set[str] = set()
        sums: set[str] = set()
        for node in graph.node:
            dimensions = known.get(node.input[0]) if node.name in chosen else None
            if dimensions is None or weights[node.input[1]].dims[0] % self.group:
                nodes.append(node)
                continue
            source = node.input[0]
            if source not in sums:
                nodes += self._group_sums(graph, source, dimensions, weights[node.input[1]].dims[0], first=not sums)
                sums.add(source)
            nodes += self._matmul(graph, node, numpy_helper.to_array(weights[node.input[1]]).astype(np.float32))
            taken.add(node.name)
        del graph.node[:]
        graph.node.extend(nodes)
        drop_unused(graph)
        add_domain(model)
        return model, taken

    def _group_sums(
        self, graph: onnx.GraphProto, source: str, dimensions: int, size: int, *, first: bool
    ) -> list[onnx.NodeProto]:
        """[..., size] to the sums of its groups, [..., size / group]."""
        path = f"minima/{source}"
        shape = [0] * (dimensions - 1) + [size // self.group, self.group]
        graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), f"{path}/shape"))
        if first:
            graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "minima/last"))
        return [
            helper.make_node("Reshape", [source, f"{path}/shape"], [f"{path}/blocks"], name=f"{path}/blocks"),
            helper.make_node(
                "ReduceSum", [f"{path}/blocks", "minima/last"], [f"{path}/sums"], name=f"{path}/sums", keepdims=0
            ),
        ]

    def _matmul(
        self, graph: onnx.GraphProto, node: onnx.NodeProto, weight: NDArray[np.float32]
    ) -> list[onnx.NodeProto]:
        path = f"minima/{node.name}"
        packed, steps, middles = pack(weight, self.group)
        values = {"weight": packed, "steps": steps, "middles": middles}
        graph.initializer.extend(numpy_helper.from_array(value, f"{path}/{name}") for name, value in values.items())
        inputs, outputs = weight.shape
        return [
            make_matmul(
                node.name,
                [node.input[0], f"{path}/weight", f"{path}/steps"],
                f"{path}/about",
                inputs,
                outputs,
                4,
                self.group,
            ),
            helper.make_node(
                "MatMul", [f"minima/{node.input[0]}/sums", f"{path}/middles"], [f"{path}/middle"], name=f"{path}/middle"
            ),
            helper.make_node("Add", [f"{path}/about", f"{path}/middle"], [node.output[0]], name=f"{path}/sum"),
        ]


def check_group(bits: int, group: int) -> None:
    """Refuse what MatMulNBits has no fast kernel for.

    Raises:
        UsageError: so.
    """
    if bits not in (4, 8) or group not in _SIZES:
        raise UsageError(f"bits must be 4 or 8 and group one of {_SIZES}, found {bits} and {group}")


def make_matmul(
    name: str, inputs: Sequence[str], output: str, channels: int, outputs: int, bits: int, group: int
) -> onnx.NodeProto:
    """MatMulNBits of an activation, a packed weight and its groups' scales."""
    return helper.make_node(
        "MatMulNBits",
        inputs,
        [output],
        name=name,
        domain="com.microsoft",
        K=channels,
        N=outputs,
        bits=bits,
        block_size=group,
        accuracy_level=ACCURACY_LEVEL,
    )


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
