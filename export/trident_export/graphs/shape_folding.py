"""Graph passes that turn shapes which never change into constants.

Traced models compute `x.view(*hidden.shape[:2], heads, size)` at every run, five nodes and more for a reshape
that only touches the last dimensions, and look up the size of a head for each rotation. Of the 2,272 nodes of
SmolLM2's decode step 900 did that. ONNX's Reshape says "keep this dimension" with a 0, so its shape can be a
constant; so can a size that shape inference knows.
Operator reference: ONNX, Reshape (allowzero=0).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper, shape_inference

KEPT = 2  # batch and sequence
SMALL = 1024  # bytes of a constant that may be part of a shape


def fold_shapes(model: onnx.ModelProto) -> int:
    """Both passes, in place; returns how many reshapes and sizes became constants.

    A graph with branches or loops is left alone: what their bodies use does not show in the nodes' inputs.
    """
    if any(attribute.HasField("g") for node in model.graph.node for attribute in node.attribute):
        return 0
    changed = fold_reshapes(model) + fold_sizes(model)
    _remove_unused(model.graph)
    return changed


def fold_sizes(model: onnx.ModelProto) -> int:
    """Replace Gather(Shape(x), index), where x has a known size there; returns how many were replaced."""
    graph = model.graph
    shapes = _shapes(model)
    producers = {name: node for node in graph.node for name in node.output}
    constants = _constants(graph)
    sizes: dict[str, NDArray[Any]] = {}
    for node in graph.node:
        shape_of = producers.get(node.input[0]) if node.op_type == "Gather" else None
        index = constants.get(node.input[1]) if shape_of is not None and shape_of.op_type == "Shape" else None
        if shape_of is None or index is None or index.size != 1:
            continue
        shape = shapes.get(shape_of.input[0], [])
        position = int(index.reshape(-1)[0])
        if -len(shape) <= position < len(shape) and shape[position] > 0:
            sizes[node.output[0]] = np.full(index.shape, shape[position], np.int64)
    for name, value in sizes.items():
        producers[name].output[0] = f"{name}_unused"
        graph.initializer.append(numpy_helper.from_array(value, name))
    return len(sizes)


def fold_reshapes(model: onnx.ModelProto) -> int:
    """Give every reshape that keeps batch and sequence a constant shape; returns how many were changed.

    A reshape counts where its shape is put together from the first two sizes of a tensor and constants, and
    its data has three dimensions or more.
    """
    graph = model.graph
    shapes = _shapes(model)
    producers = {name: node for node in graph.node for name in node.output}
    constants = _constants(graph)
    changed = 0
    for node in graph.node:
        if node.op_type != "Reshape" or len(shapes.get(node.input[0], [])) <= KEPT:
            continue
        shape = _kept_shape(node.input[1], producers, constants)
        if shape is not None:
            name = f"{node.output[0]}_shape"
            graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), name))
            node.input[1] = name
            changed += 1
    return changed


def _constants(graph: onnx.GraphProto) -> dict[str, NDArray[Any]]:
    """Small constants by name."""
    small = [tensor for tensor in graph.initializer if len(tensor.raw_data) <= SMALL]
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in small}
    return constants | {
        node.output[0]: numpy_helper.to_array(node.attribute[0].t)
        for node in graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }


def _shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """The shape of every tensor that inference finds, with 0 for sizes that it does not know."""
    return {
        name: [dim.dim_value for dim in tensor.shape.dim]
        for name, tensor in infer_types(model).items()
        if tensor.HasField("shape")
    }


def infer_types(model: onnx.ModelProto) -> dict[str, onnx.TypeProto.Tensor]:
    """Element type and shape of every tensor that inference finds."""
    light = onnx.ModelProto()
    light.CopyFrom(model)
    graph = light.graph
    weights = [tensor for tensor in graph.initializer if len(tensor.raw_data) > SMALL]
    # Their values don't matter here, and copying them about takes seconds.
    graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in weights)
    kept = [tensor for tensor in graph.initializer if len(tensor.raw_data) <= SMALL]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":  # unknown to ONNX, so its output's rank is said here
            anything = [f"{node.output[0]}_{axis}" for axis in range(3)]
            graph.value_info.append(helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, anything))
    inferred = shape_inference.infer_shapes(light).graph
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    return {value.name: value.type.tensor_type for value in values}


def _kept_shape(
    name: str, producers: dict[str, onnx.NodeProto], constants: dict[str, NDArray[Any]]
) -> list[int] | None:
    """The shape as constants with zeros for batch and sequence; None where it is anything else."""
    concat = producers.get(name)
    if concat is None or concat.op_type != "Concat":
        return None
    shape: list[int] = []
    for position, part in enumerate(concat.input):
        if position < KEPT:
            if _size_of(part, producers, constants) != position:
                return None
            shape.append(0)
        elif part in constants:
            shape += [int(size) for size in constants[part].reshape(-1)]
        else:
            return None
    return shape if len(shape) > KEPT and 0 not in shape[KEPT:] else None


def _size_of(name: str, producers: dict[str, onnx.NodeProto], constants: dict[str, NDArray[Any]]) -> int | None:
    """Which dimension of some tensor this is the size of: Unsqueeze(Gather(Shape(x), index))."""
    chain = []
    for wanted in ("Unsqueeze", "Gather", "Shape"):
        node = producers.get(name)
        if node is None or node.op_type != wanted:
            return None
        chain.append(node)
        name = node.input[0]
    index = constants.get(chain[1].input[1])
    return int(index.reshape(-1)[0]) if index is not None and index.size == 1 else None


def _remove_unused(graph: onnx.GraphProto) -> None:
    wanted = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    kept.reverse()
    del graph.node[:]
    graph.node.extend(kept)
    tensors = [tensor for tensor in graph.initializer if tensor.name in wanted]
    del graph.initializer[:]
    graph.initializer.extend(tensors)
