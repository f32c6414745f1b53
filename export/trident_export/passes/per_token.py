"""Matmuls in eight bits with a scale for each token of the activation and each channel (column) of the weight.

A token's scale depends on that token only, so an answer does not depend on who shares its batch. Activations are uint8
about 128. Weights are int8 of seven bits: the AVX2 kernels of machines without VNNI add pairs of products in sixteen
bits, 2 x 255 x 63 fits and 2 x 255 x 127 does not, and a graph is served on other machines than it is exported on.
Behind `spread`, which has divided every token by its largest number, one scale is left, and weights have almost eight
bits (`pairs`).
Operator references: ONNX, QuantizeLinear (axis); onnxruntime docs/ContribOperators.md, MatMulIntegerToFloat.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from trident_export.graphs.editing import add_domain, array, constant, drop_unused, make, reduced, replace
from trident_export.graphs.unpadding import is_packed
from trident_export.passes import pairs
from trident_export.passes.base import CalibrationRuns, Pass, matmul_nodes, ranks
from trident_export.passes.spread import is_spread

_PREFIX = "rowwise"
_TOKENS, _SELECTION = "input_ids", "logits_tokens"  # inputs of a decoder's graph
_EVERY_TOKEN = f"{_PREFIX}/every_token"  # of what all of them share
_WEIGHT_LARGEST = 63
ACTIVATION_LARGEST = 127


@dataclass(frozen=True)
class PerToken(Pass):
    """Matmuls of [tokens, features] in eight bits, with a scale for each token and each channel.

    Of decoders, whose activations are [1, tokens, features], too; other matmuls are left.
    """

    refused: ClassVar[Mapping[str, str]] = {
        "cuda": "ONNX Runtime has no CUDA kernel for its integer matmuls, which would run on the CPU"
    }

    def apply(self, model: ir.Model, chosen: Sequence[str], runs: CalibrationRuns | None) -> tuple[ir.Model, set[str]]:
        """See `Pass`."""
        return model, quantize_per_token(model, chosen)


def quantize_per_token(model: ir.Model, chosen: Collection[str]) -> set[str]:
    """Quantize matmuls of activations and a constant weight, in place; returns which.

    Activations are [tokens, features], and in a graph of packed tokens, [1, tokens], also [1, tokens, features].

    Args:
        chosen: names of matmuls. Those whose activation has another rank are left.
    """
    graph = model.graph
    known = ranks(model)
    packed = any(value.name == _TOKENS and value.shape[0] == 1 for value in graph.inputs)
    selected = _selected(graph)
    integers: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}  # activation -> its integers and its tokens' scales
    every_token: ir.Value | None = None
    taken: set[str] = set()
    for matmul in matmul_nodes(model, chosen):
        source = matmul.inputs[0]
        if is_spread(source):
            if source not in integers:
                made, scale = _quantize_spread(graph, source)
                matmul.prepend(made)
                integers[source] = (made[-1].outputs[0], scale)
            replace(matmul, _spread_matmul(matmul, *integers[source]))
            taken.add(matmul.name)
            continue
        rank = known.get(source.name)
        if rank != 2 and not (rank == 3 and packed):
            continue
        if source not in integers:
            middles = every_token if is_packed(source.name) else None
            if rank == 3 and source not in selected:
                if every_token is None:
                    ids = next(value for value in graph.inputs if value.name == _TOKENS)
                    made = _middles(graph, _EVERY_TOKEN, ids, start=1)
                    matmul.prepend(made)
                    every_token = made[-1].outputs[0]
                middles = every_token
            made, scale = _quantize_activation(model, source, rank - 2, middles)
            matmul.prepend(made)
            if is_packed(source.name):  # all of them have the same tokens
                every_token = made[-1].inputs[2]
            integers[source] = (made[-1].outputs[0], scale)
        replace(matmul, _matmul(matmul, *integers[source]))
        taken.add(matmul.name)
    drop_unused(model)
    if taken:
        add_domain(model)
    return taken


def _selected(graph: ir.Graph) -> set[ir.Value]:
    """Values behind the choice of the tokens whose logits are wanted: they have fewer rows than there are tokens."""
    found = {value for value in graph.inputs if value.name == _SELECTION}
    for reader in graph:
        if found.intersection(reader.inputs):
            found.update(reader.outputs)
    return found


def _constant(graph: ir.Graph, name: str) -> ir.Value:
    values: dict[str, NDArray[Any]] = {
        "largest": np.array(1.0 / ACTIVATION_LARGEST, np.float32),
        "last": np.array([-1], np.int64),
        "unit": np.array(1.0, np.float32),
        "middle": np.array(128, np.uint8),
    }
    return constant(graph, f"{_PREFIX}/{name}", values[name])


def _middles(graph: ir.Graph, path: str, counted: ir.Value, start: int) -> list[ir.Node]:
    """The zero point once for each token; the tokens are counted on the axis `start` of `counted`."""
    rows = make("Shape", [counted], f"{path}/rows", start=start, end=start + 1)
    return [rows, make("Expand", [_constant(graph, "middle"), *rows.outputs], f"{path}/middles")]


def _quantize_activation(
    model: ir.Model, source: ir.Value, axis: int, middles: ir.Value | None
) -> tuple[list[ir.Node], ir.Value]:
    """Nodes from float32 to uint8 about 128, and the tokens' scales, [..., tokens, 1]; tokens stand on `axis`.

    A token of zeros has a scale of zero, with which whatever its integers are comes back as zeros.
    """
    graph, path = model.graph, f"{_PREFIX}/{source.name}"
    nodes: list[ir.Node] = []

    def add(kind: str, inputs: list[ir.Value], output: str, **attributes: Any) -> ir.Value:
        nodes.append(make(kind, inputs, f"{path}/{output}", **attributes))
        return nodes[-1].outputs[0]

    last = _constant(graph, "last")
    inputs, attributes = reduced(model, add("Abs", [source], "absolute"), last)
    peak = add("ReduceMax", inputs, "peak", keepdims=1, **attributes)
    scale = add("Mul", [peak, _constant(graph, "largest")], "scale")
    scales = add("Reshape", [scale, last], "scales")
    if middles is None:
        nodes += _middles(graph, path, scales, start=0)
        middles = nodes[-1].outputs[0]
    add("QuantizeLinear", [source, scales, middles], "integers", axis=axis)
    return nodes, scale


def _quantize_spread(graph: ir.Graph, source: ir.Value) -> tuple[list[ir.Node], ir.Value]:
    """Nodes from numbers of -1 to 1 to uint8 about 128, and the scale of all tokens."""
    scale = _constant(graph, "largest")
    path = f"{_PREFIX}/{source.name}/integers"
    return [make("QuantizeLinear", [source, scale, _constant(graph, "middle")], path)], scale


def _spread_matmul(matmul: ir.Node, integers: ir.Value, scale: ir.Value) -> list[ir.Node]:
    graph, path = matmul.graph, f"{_PREFIX}/{matmul.name}"
    weight = array(matmul.inputs[1])
    steps = pairs.steps(weight)
    inputs = [
        integers,
        constant(graph, f"{path}/weight", pairs.rounded(weight, steps)),
        scale,
        constant(graph, f"{path}/steps", steps),
        _constant(graph, "middle"),
    ]
    return [make("MatMulIntegerToFloat", inputs, matmul.outputs[0].name, matmul.name, "com.microsoft")]


def _matmul(matmul: ir.Node, integers: ir.Value, scale: ir.Value) -> list[ir.Node]:
    graph, path = matmul.graph, f"{_PREFIX}/{matmul.name}"
    weight = array(matmul.inputs[1])
    steps = np.maximum(np.abs(weight).max(axis=0) / _WEIGHT_LARGEST, 1e-12).astype(np.float32)
    rounded = np.clip(np.rint(weight / steps), -_WEIGHT_LARGEST, _WEIGHT_LARGEST).astype(np.int8)
    inputs = [
        integers,
        constant(graph, f"{path}/weight", rounded),
        _constant(graph, "unit"),
        constant(graph, f"{path}/steps", steps),
        _constant(graph, "middle"),
    ]
    # The operator knows one scale for the whole activation: the tokens' own are multiplied afterwards.
    columns = make("MatMulIntegerToFloat", inputs, f"{path}/columns", domain="com.microsoft")
    output = matmul.outputs[0].name
    return [columns, make("Mul", [*columns.outputs, scale], output)]
