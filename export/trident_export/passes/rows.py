"""Products in eight bits with a scale for each row of the activation and each column of the weight.

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

from trident_export.passes.base import Feeder, Pass, add_domain, drop_unused, ranks

_PREFIX = "rowwise"
_WEIGHT_LARGEST = 63
_ACTIVATION_LARGEST = 127


@dataclass(frozen=True)
class Rows(Pass):
    """Products of [rows, features] in eight bits, a scale for each row and column.

    Of decoders, whose activations are [1, tokens, features], too; other products are left.
    """

    refused: ClassVar[Mapping[str, str]] = {
        "cuda": "ONNX Runtime has no CUDA kernel for its integer products, which would run on the CPU"
    }

    def apply(
        self, model: onnx.ModelProto, chosen: Sequence[str], feeder: Feeder | None
    ) -> tuple[onnx.ModelProto, set[str]]:
        """See `Pass`."""
        flatten(model, set(chosen))
        return model, quantize_rows(model, set(chosen))


def flatten(model: onnx.ModelProto, chosen: Collection[str]) -> None:
    """Give products of [1, tokens, features] their activation as [tokens, features], in place."""
    graph = model.graph
    if not any(value.name == "input_ids" and _is_single(value) for value in graph.input):
        return
    known = ranks(model)
    weights = {tensor.name: tensor.dims for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    flat: set[str] = set()
    for node in graph.node:
        if node.name not in chosen or known.get(node.input[0]) != 3:
            nodes.append(node)
            continue
        source, path = node.input[0], f"{_PREFIX}/{node.name}"
        if source not in flat:
            flat.add(source)
            nodes.append(_reshape(graph, source, f"{_PREFIX}/{source}/flat", (-1, weights[node.input[1]][0])))
        back = _reshape(graph, f"{path}/flat", node.output[0], (1, -1, weights[node.input[1]][1]))
        node.input[0], node.output[0] = f"{_PREFIX}/{source}/flat", f"{path}/flat"
        nodes += [node, back]
    del graph.node[:]
    graph.node.extend(nodes)


def _is_single(value: onnx.ValueInfoProto) -> bool:
    return bool(value.type.tensor_type.shape.dim[0].dim_value == 1)


def _reshape(graph: onnx.GraphProto, source: str, target: str, shape: tuple[int, ...]) -> onnx.NodeProto:
    graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), f"{target}/shape"))
    return helper.make_node("Reshape", [source, f"{target}/shape"], [target], name=f"{target}/reshape")


def quantize_rows(model: onnx.ModelProto, chosen: Collection[str]) -> set[str]:
    """Quantize products of rows of activations, [rows, features], and a constant weight, in place; returns which.

    Args:
        chosen: names of products. Those whose activation has another rank are left.
    """
    graph = model.graph
    known = ranks(model)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    quantized: dict[str, tuple[str, str]] = {}  # activation -> its integers and its rows' scales
    taken: set[str] = set()
    for node in graph.node:
        if node.name not in chosen or known.get(node.input[0]) != 2:
            nodes.append(node)
            continue
        if not taken:
            _add_constants(graph)
        if node.input[0] not in quantized:
            quantized[node.input[0]] = (f"{_PREFIX}/{node.input[0]}/integers", f"{_PREFIX}/{node.input[0]}/scale")
            nodes += _quantize_activation(node.input[0], opset)
        nodes += _product(graph, node, numpy_helper.to_array(weights[node.input[1]]), *quantized[node.input[0]])
        taken.add(node.name)
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused(graph)
    if taken:
        add_domain(model)
    return taken


def _add_constants(graph: onnx.GraphProto) -> None:
    values = {
        "largest": np.array(1.0 / _ACTIVATION_LARGEST, np.float32),
        "least": np.array(1e-10, np.float32),  # a row of zeros has a scale too
        "last": np.array([-1], np.int64),
        "unit": np.array(1.0, np.float32),
        "middle": np.array(128, np.uint8),
    }
    graph.initializer.extend(numpy_helper.from_array(value, f"{_PREFIX}/{name}") for name, value in values.items())


def _quantize_activation(name: str, opset: int) -> list[onnx.NodeProto]:
    """[rows, features] to uint8 about 128 and float32 [rows, 1]."""
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
        node("Mul", [f"{path}/peak", f"{_PREFIX}/largest"], "step"),
        node("Max", [f"{path}/step", f"{_PREFIX}/least"], "scale"),
        node("Reshape", [f"{path}/scale", f"{_PREFIX}/last"], "scales"),
        node("Shape", [f"{path}/scales"], "rows"),
        node("Expand", [f"{_PREFIX}/middle", f"{path}/rows"], "middles"),
        node("QuantizeLinear", [name, f"{path}/scales", f"{path}/middles"], "integers", axis=0),
    ]


def _product(
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
