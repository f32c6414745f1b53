"""Weights in blocks along the input, with a scale for each block: ONNX Runtime's MatMulNBits.

Accuracy level 4 quantizes the input in blocks too, at run time, and multiplies in int8. A block belongs to one row of
a batch, so an answer does not depend on who shares the batch; `quantize_dynamic`, which has one scale for a whole batch
and saturates on AVX2, is no pass here (docs/decisions/0003-int8-by-blocks.md).
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
from trident_export.passes.base import Feeder, Pass, add_domain, drop_unused, ranks

ACCURACY_LEVEL = 4
_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Blocks(Pass):
    """Weights of 4 or 8 bits in blocks.

    Attributes:
        bits: of a weight.
        block: weights in a block, which share a scale.
        zero_points: whether each block has one; without, 0 is in the middle of the range.
    """

    bits: int = 8
    block: int = 32
    zero_points: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_blocks(self.bits, self.block)

    def apply(
        self, model: onnx.ModelProto, chosen: Sequence[str], feeder: Feeder | None
    ) -> tuple[onnx.ModelProto, set[str]]:
        """See `Pass`."""
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
        taken = set(chosen)
        quantizer = MatMulNBitsQuantizer(
            model,
            bits=self.bits,
            block_size=self.block,
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
class BlockMinima(Pass):
    """Weights of 4 bits in blocks with a scale and a minimum each.

    MatMulNBits with a zero point that is no integer leaves its fast kernel. So the product is symmetric, about eight
    steps above the minimum, and that middle of each block, times the sum of the block's inputs, is a second and
    smaller product, in float32. Products whose input is no multiple of a block are left.

    Attributes:
        block: weights in a block.
    """

    block: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block not in _SIZES:
            raise UsageError(f"block must be one of {_SIZES}, found {self.block}")

    def apply(
        self, model: onnx.ModelProto, chosen: Sequence[str], feeder: Feeder | None
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
            if dimensions is None or weights[node.input[1]].dims[0] % self.block:
                nodes.append(node)
                continue
            source = node.input[0]
            if source not in sums:
                nodes += self._block_sums(graph, source, dimensions, weights[node.input[1]].dims[0], first=not sums)
                sums.add(source)
            nodes += self._product(graph, node, numpy_helper.to_array(weights[node.input[1]]).astype(np.float32))
            taken.add(node.name)
        del graph.node[:]
        graph.node.extend(nodes)
        drop_unused(graph)
        add_domain(model)
        return model, taken

    def _block_sums(
        self, graph: onnx.GraphProto, source: str, dimensions: int, size: int, *, first: bool
    ) -> list[onnx.NodeProto]:
        """[..., size] to the sums of its blocks, [..., size / block]."""
        path = f"minima/{source}"
        shape = [0] * (dimensions - 1) + [size // self.block, self.block]
        graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), f"{path}/shape"))
        if first:
            graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "minima/last"))
        return [
            helper.make_node("Reshape", [source, f"{path}/shape"], [f"{path}/blocks"], name=f"{path}/blocks"),
            helper.make_node(
                "ReduceSum", [f"{path}/blocks", "minima/last"], [f"{path}/sums"], name=f"{path}/sums", keepdims=0
            ),
        ]

    def _product(
        self, graph: onnx.GraphProto, node: onnx.NodeProto, weight: NDArray[np.float32]
    ) -> list[onnx.NodeProto]:
        path = f"minima/{node.name}"
        packed, steps, middles = pack(weight, self.block)
        values = {"weight": packed, "steps": steps, "middles": middles}
        graph.initializer.extend(numpy_helper.from_array(value, f"{path}/{name}") for name, value in values.items())
        inputs, outputs = weight.shape
        return [
            make_product(
                node.name,
                [node.input[0], f"{path}/weight", f"{path}/steps"],
                f"{path}/about",
                inputs,
                outputs,
                4,
                self.block,
            ),
            helper.make_node(
                "MatMul", [f"minima/{node.input[0]}/sums", f"{path}/middles"], [f"{path}/middle"], name=f"{path}/middle"
            ),
            helper.make_node("Add", [f"{path}/about", f"{path}/middle"], [node.output[0]], name=f"{path}/sum"),
        ]


def check_blocks(bits: int, block: int) -> None:
    """Refuse what MatMulNBits has no fast kernel for.

    Raises:
        UsageError: so.
    """
    if bits not in (4, 8) or block not in _SIZES:
        raise UsageError(f"bits must be 4 or 8 and block one of {_SIZES}, found {bits} and {block}")


def make_product(
    name: str, inputs: Sequence[str], output: str, channels: int, outputs: int, bits: int, block: int
) -> onnx.NodeProto:
    """MatMulNBits of an activation, a packed weight and its blocks' scales."""
    return helper.make_node(
        "MatMulNBits",
        inputs,
        [output],
        name=name,
        domain="com.microsoft",
        K=channels,
        N=outputs,
        bits=bits,
        block_size=block,
        accuracy_level=ACCURACY_LEVEL,
    )


def pack(weight: NDArray[np.float32], block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """A matrix [inputs, outputs] in blocks of 16 levels between each block's least and largest weight.

    Returns:
        The levels as MatMulNBits reads them, uint8 [outputs, blocks, block / 2]; the steps between levels,
        float32 [outputs, blocks]; and the weight at level 8, float32 [blocks, outputs].
    """
    blocks = np.ascontiguousarray(weight.T).reshape(weight.shape[1], -1, block)
    least = blocks.min(axis=-1)
    steps = np.maximum((blocks.max(axis=-1) - least) / 15, 1e-12)
    levels = np.clip(np.rint((blocks - least[..., None]) / steps[..., None]), 0, 15).astype(np.uint8)
    packed = levels[..., 0::2] | (levels[..., 1::2] << 4)
    return packed, steps, np.ascontiguousarray((least + 8 * steps).T)
