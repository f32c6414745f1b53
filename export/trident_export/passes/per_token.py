"""Matmuls in eight bits with a scale for each row of the activation and each column of the weight.

A row is a token, so an answer does not depend on who shares its batch. Activations are uint8 about 128. Weights are
int8 of seven bits: the AVX2 kernels of machines without VNNI add pairs of products in sixteen bits, 2 x 255 x 63 fits
and 2 x 255 x 127 does not, and a graph is served on other machines than it is exported on.
Operator references: ONNX, QuantizeLinear (axis); onnxruntime docs/ContribOperators.md, MatMulIntegerToFloat.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from trident_export.passes.base import CalibrationRuns, Pass, add_domain, drop_unused, ranks

_PREFIX = "rowwise"
_TOKENS, _SELECTION = "input_ids", "logits_tokens"  # inputs of a decoder's graph
_EVERY_TOKEN = f"{_PREFIX}/every_token"  # of what all of them share
_WEIGHT_LARGEST = 63
ACTIVATION_LARGEST = 127


@dataclass(frozen=True)
class PerToken(Pass):
    """Matmuls of [rows, features] in eight bits, a scale for each row and column.

    Of decoders, whose activations are [1, tokens, features], too; other matmuls are left.
    """

    refused: ClassVar[Mapping[str, str]] = {
        "cuda": "ONNX Runtime has no CUDA kernel for its integer matmuls, which would run on the CPU"
    }

    def apply(
        self, model: onnx.ModelProto, chosen: Sequence[str], runs: CalibrationRuns | None
    ) -> tuple[onnx.ModelProto, set[str]]:
        """See `Pass`."""
        return model, quantize_per_token(model, set(chosen))


def quantize_per_token(model: onnx.ModelProto, chosen: Collection[str]) -> set[str]:
    """Quantize matmuls of rows of activations and a constant weight, in place; returns which.

    Rows are those of [rows, features], and in a graph of packed tokens, [1, tokens], those of [1, tokens, features].

    Args:
        chosen: names of matmuls. Those whose activation has another rank are left.
    """
    graph = model.graph
    known = ranks(model)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    weights = {tensor.name: tensor for tensor in graph.initializer}
    packed = any(value.name == _TOKENS and _is_single(value) for value in graph.input)
    selected = _selected(graph)
    nodes: list[onnx.NodeProto] = []
    quantized: dict[str, tuple[str, str]] = {}  # activation -> its integers and its rows' scales
    taken: set[str] = set()
    counted = False
    for node in graph.node:
        source, rank = node.input[0] if node.input else "", known.get(node.input[0]) if node.input else None
        if node.name not in chosen or rank is None or rank not in ((2, 3) if packed else (2,)):
            nodes.append(node)
            continue
        if not taken:
            _add_constants(graph)
        if source not in quantized:
            path = f"{_PREFIX}/{source}"
            quantized[source] = (f"{path}/integers", f"{path}/scale")
            shared = rank == 3 and source not in selected
            if shared and not counted:
                counted = True
                nodes += _middles(_EVERY_TOKEN, _TOKENS, start=1)
            nodes += _quantize_activation(source, opset, rank - 2, _EVERY_TOKEN if shared else path)
        nodes += _matmul(graph, node, numpy_helper.to_array(weights[node.input[1]]), *quantized[source])
        taken.add(node.name)
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused(graph)
    if taken:
        add_domain(model)
    return taken


def _is_single(value: onnx.ValueInfoProto) -> bool:
    return bool(value.type.tensor_type.shape.dim[0].dim_value == 1)


def _selected(graph: onnx.GraphProto) -> set[str]:
    """Tensors behind the choice of the tokens whose logits are wanted: they have fewer rows than there are tokens."""
    found = {_SELECTION}
    for node in graph.node:
        if found.intersection(node.input):
            found.update(node.output)
    return found


def _add_constants(graph: onnx.GraphProto) -> None:
    values = {
        "largest": np.array(1.0 / ACTIVATION_LARGEST, np.float32),
        "last": np.array([-1], np.int64),
        "unit": np.array(1.0, np.float32),
        "middle": np.array(128, np.uint8),
    }
    graph.initializer.extend(numpy_helper.from_array(value, f"{_PREFIX}/{name}") for name, value in values.items())


def _middles(path: str, counted: str, start: int) -> list[onnx.NodeProto]:
    """The zero point once for each row: `counted` has as many on its axis `start`."""
    return [
        helper.make_node("Shape", [counted], [f"{path}/rows"], name=f"{path}/rows", start=start, end=start + 1),
        helper.make_node("Expand", [f"{_PREFIX}/middle", f"{path}/rows"], [f"{path}/middles"], name=f"{path}/middles"),
    ]


def _quantize_activation(name: str, opset: int, axis: int, middles: str) -> list[onnx.NodeProto]:
    """Float32 to uint8 about 128 and the scales of the rows, which stand on `axis`; the last axis of scales is 1.

    A row of zeros has a scale of zero, with which whatever its integers are comes back as zeros.
    """
    path = f"{_PREFIX}/{name}"

    def node(kind: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [f"{path}/{output}"], name=f"{path}/{output}", **attributes)

    # From opset 18 on the axes are an input.
    absolute = f"{path}/absolute"
    if opset >= 18:
        peak = node("ReduceMax", [absolute, f"{_PREFIX}/last"], "peak", keepdims=1)
    else:
        peak = node("ReduceMax", [absolute], "peak", keepdims=1, axes=[-1])
    return [
        node("Abs", [name], "absolute"),
        peak,
        node("Mul", [f"{path}/peak", f"{_PREFIX}/largest"], "scale"),
        node("Reshape", [f"{path}/scale", f"{_PREFIX}/last"], "scales"),
        *(_middles(path, f"{path}/scales", start=0) if middles == path else []),
        node("QuantizeLinear", [name, f"{path}/scales", f"{middles}/middles"], "integers", axis=axis),
    ]


def _matmul(
    graph: onnx.GraphProto, node: onnx.NodeProto, weight: NDArray[np.float32], integers: str, scale: str
) -> list[onnx.NodeProto]:
    path = f"{_PREFIX}/{node.name}"
    steps = np.maximum(np.abs(weight).max(axis=0) / _WEIGHT_LARGEST, 1e-12).astype(np.float32)
    rounded = np.clip(np.rint(weight / steps), -_WEIGHT_LARGEST, _WEIGHT_LARGEST).astype(np.int8)
    graph.initializer.append(numpy_helper.from_array(rounded, f"{path}/weight"))
    graph.initializer.append(numpy_helper.from_array(steps, f"{path}/steps"))

    def made(kind: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [output], name=output, **attributes)

    return [
        # The operator knows one scale for all of the activation: the rows' own come behind it.
        made(
            "MatMulIntegerToFloat",
            [integers, f"{path}/weight", f"{_PREFIX}/unit", f"{path}/steps", f"{_PREFIX}/middle"],
            f"{path}/columns",
            domain="com.microsoft",
        ),
        made("Mul", [f"{path}/columns", scale], node.output[0]),
    ]
