"""A graph pass for encoders: no matmul is computed for padding.

A batch of texts is padded to one length, and on a CPU the padding costs as much as the texts. What an encoder does with
each token alone (matmuls with weights, biases, activations, norms, residuals) is computed for the real tokens, one
after another; they are spread over the batch again only where tokens meet, in the attention. The graph's inputs and
outputs stay as they were. Behind a text's last token its outputs repeat that token's.

Which nodes those are is found from the matmuls: a matmul of a three-dimensional activation with a two-dimensional
weight works on [batch, sequence, features], and from there the region grows over operators that leave tokens alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import helper, numpy_helper

from trident_export.graphs.shape_folding import infer_types

_ELEMENTWISE = frozenset(
    ("Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Erf", "Tanh", "Relu", "Sigmoid", "Gelu", "Softplus", "Identity", "Neg")
)
_LAST_AXIS = frozenset(("LayerNormalization", "TopK", "ReduceLogSumExp", "ReduceMean", "Softmax"))
_PREFIX = "unpadded"


def unpad(model: onnx.ModelProto, mask: str = "attention_mask") -> int:
    """Apply the pass in place; returns how many nodes work on real tokens alone."""
    graph = model.graph
    types = infer_types(model)
    constants = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = len(numpy_helper.to_array(node.attribute[0].t).shape)
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in constants:  # a weight that two layers share
            constants[node.output[0]] = constants[node.input[0]]
    data = _depends_on(graph.node, "input_ids")

    def rank(name: str) -> int | None:
        found = types.get(name)
        return len(found.shape.dim) if found is not None and found.HasField("shape") else None

    def is_matmul(node: onnx.NodeProto) -> bool:
        if node.op_type != "MatMul":
            return False
        return node.input[0] in data and rank(node.input[0]) == 3 and constants.get(node.input[1]) == 2

    region = {index for index, node in enumerate(graph.node) if is_matmul(node)}
    tokens = {graph.node[index].input[0] for index in region}  # known to be [batch, sequence, ...]
    made = {name for index in region for name in graph.node[index].output}
    grown = True
    while grown:
        grown = False
        for index, node in enumerate(graph.node):
            if index in region or not _leaves_tokens_alone(node, constants, made | tokens):
                continue
            region.add(index)
            made.update(node.output)
            grown = True
    if region:
        _rewrite(graph, region, set(constants), mask)
    return len(region)


def _leaves_tokens_alone(node: onnx.NodeProto, constants: dict[str, int], known: set[str]) -> bool:
    if node.op_type in _LAST_AXIS:
        axes = [value for a in node.attribute if a.name in ("axis", "axes") for value in (a.ints or [a.i])]
        # An axis that is an input, of later opsets, is -1 wherever this exporter writes one.
        return node.input[0] in known and all(value == -1 for value in axes) and _keeps_tokens(node)
    if node.op_type not in _ELEMENTWISE:
        return False
    inputs = [name for name in node.input if name]
    return any(name in known for name in inputs) and all(
        name in known or constants.get(name, 2) <= 1 for name in inputs
    )


def _keeps_tokens(node: onnx.NodeProto) -> bool:
    return node.op_type != "ReduceMean" or all(a.i == 1 for a in node.attribute if a.name == "keepdims")


def _depends_on(nodes: Iterable[onnx.NodeProto], source: str) -> set[str]:
    """Names of all values that depend on the numbers of an input, not on its shape alone."""
    found = {source}
    for node in nodes:
        if node.op_type != "Shape" and any(name in found for name in node.input):
            found.update(node.output)
    return found


def _rewrite(graph: onnx.GraphProto, region: set[int], constants: set[str], mask: str) -> None:
    inside = {name for index in region for name in graph.node[index].output}
    outputs = {output.name for output in graph.output}
    read_outside = {name for i, node in enumerate(graph.node) if i not in region for name in node.input} | outputs
    nodes = _indices(graph, mask)
    packed: set[str] = set()
    for index, node in enumerate(graph.node):
        if index not in region:
            nodes.append(node)
            continue
        for place, name in enumerate(node.input):
            if not name or name in constants:
                continue
            if name not in inside and name not in packed:
                nodes += _pack(name)
                packed.add(name)
            node.input[place] = _packed(name)
        given = list(node.output)
        for place, name in enumerate(given):
            node.output[place] = _packed(name)
        nodes.append(node)
        for name in given:
            if name in read_outside:
                nodes += _spread(name)
    del graph.node[:]
    graph.node.extend(nodes)
    # What shape inference said of the values that are now packed is wrong.
    kept = [value for value in graph.value_info if value.name not in inside]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def _packed(name: str) -> str:
    return f"{_PREFIX}/{name}"


def is_packed(name: str) -> bool:
    """Whether a value of a graph after the pass holds real tokens alone, [tokens, features]."""
    return name.startswith(f"{_PREFIX}/")


def _indices(graph: onnx.GraphProto, mask: str) -> list[onnx.NodeProto]:
    """Where the real tokens are in the batch, and which of them each place of the batch shows."""
    for name, values in (("all", [-1]), ("one", [1]), ("zero", [0])):
        graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), f"{_PREFIX}/{name}"))
    scalar = numpy_helper.from_array(np.array(0, np.int64), f"{_PREFIX}/axis")
    graph.initializer.append(scalar)

    def node(kind: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
        names = [name if name == mask else f"{_PREFIX}/{name}" for name in inputs]
        return helper.make_node(kind, names, [f"{_PREFIX}/{output}"], name=f"{_PREFIX}/{output}", **attributes)

    return [
        node("Reshape", [mask, "all"], "flat_mask"),
        node("NonZero", ["flat_mask"], "places"),
        node("Reshape", ["places", "all"], "token_places"),
        node("CumSum", ["flat_mask", "axis"], "counts"),
        node("Sub", ["counts", "one"], "last_tokens"),
        node("Max", ["last_tokens", "zero"], "place_tokens"),
        node("Shape", [mask], "batch_shape"),
    ]


def _pack(name: str) -> list[onnx.NodeProto]:
    """[batch, sequence, ...] to [tokens, ...]."""
    path = _packed(name)
    return [
        helper.make_node("Shape", [name], [f"{path}/shape"], name=f"{path}/shape", start=2),
        helper.make_node("Concat", [f"{_PREFIX}/all", f"{path}/shape"], [f"{path}/rows"], name=f"{path}/rows", axis=0),
        helper.make_node("Reshape", [name, f"{path}/rows"], [f"{path}/flat"], name=f"{path}/flat"),
        helper.make_node("Gather", [f"{path}/flat", f"{_PREFIX}/token_places"], [path], name=f"{path}/pack", axis=0),
    ]


def _spread(name: str) -> list[onnx.NodeProto]:
    """[tokens, ...] to [batch, sequence, ...]."""
    path = _packed(name)
    return [
        helper.make_node(
            "Gather", [path, f"{_PREFIX}/place_tokens"], [f"{path}/spread"], name=f"{path}/spread", axis=0
        ),
        helper.make_node("Shape", [path], [f"{path}/features"], name=f"{path}/features", start=1),
        helper.make_node(
            "Concat", [f"{_PREFIX}/batch_shape", f"{path}/features"], [f"{path}/whole"], name=f"{path}/whole", axis=0
        ),
        helper.make_node("Reshape", [f"{path}/spread", f"{path}/whole"], [name], name=f"{path}/batch"),
    ]
