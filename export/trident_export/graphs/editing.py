"""What all passes over a graph share. Graphs are `onnx_ir` models, edited in place.

Weights stay in the file or message that they were read from until a pass asks for their numbers; `infer` and `light`
work without the large ones. Functions of ONNX Runtime that want a protobuf get one from `light` or `message`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass

SMALL = 1024  # bytes of a constant that shape inference may look at


def take(path: Path) -> ir.Model:
    """Read a traced graph and remove its file, so that the disk never holds it twice when it is written again."""
    model = ir.load(path)
    path.unlink()
    return model


def save(model: ir.Model, path: Path) -> None:
    """Write a graph to `path`, its weights to `<path>.data`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.with_name(path.name + ".data")
    ir.save(model, path, external_data=data.name, size_threshold_bytes=SMALL - 1)
    if data.exists():
        data.chmod(0o644)  # onnx_ir makes it private to this user, and the server may be another


def make(
    kind: str, inputs: Sequence[ir.Value | None], output: str, name: str = "", domain: str = "", **attributes: Any
) -> ir.Node:
    """A node with one output, and the output's name unless it is given another."""
    return ir.node(kind, inputs, attributes, domain=domain, outputs=[ir.Value(name=output)], name=name or output)


def constant(graph: ir.Graph, name: str, value: NDArray[Any]) -> ir.Value:
    """The initializer of a name, which is added where there is none."""
    if name not in graph.initializers:
        tensor = ir.Tensor(value, name=name)
        graph.initializers[name] = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
        )
    return graph.initializers[name]


def array(value: ir.Value) -> NDArray[Any]:
    """An initializer's numbers."""
    found: NDArray[Any] = value.const_value.numpy()
    return found


def reduced(model: ir.Model, value: ir.Value, axis: ir.Value) -> tuple[list[ir.Value], dict[str, Any]]:
    """Inputs and attributes of a reduction over a constant axis: ONNX has it among the inputs from opset 18 on."""
    return ([value, axis], {}) if model.opset_imports[""] >= 18 else ([value], {"axes": array(axis).tolist()})


def numbers(value: ir.Value | None) -> NDArray[Any] | None:
    """A constant's numbers, of an initializer or a Constant node; None for anything else."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def rank_of_weight(value: ir.Value | None) -> int | None:
    """Number of dimensions of an initializer; None for anything else."""
    return len(value.shape) if value is not None and value.is_initializer() else None


def store(value: ir.Value, new: NDArray[Any]) -> None:
    """Give an initializer other numbers of its shape."""
    value.const_value = ir.Tensor(np.ascontiguousarray(new), name=value.name)


def set_inputs(node: ir.Node, inputs: Sequence[ir.Value | None]) -> None:
    """Replace all inputs of a node."""
    node.resize_inputs(len(inputs))
    for position, value in enumerate(inputs):
        node.replace_input_with(position, value)


def replace(old: ir.Node, new: Sequence[ir.Node]) -> None:
    """Put nodes in the place of one; the last of them gives what it gave, under the same name."""
    values = [[last.outputs[0]] for last in (old, new[-1])]
    ir.convenience.replace_nodes_and_values(old.graph, old, [old], new, *values)


def drop_unused(model: ir.Model, *, inputs: bool = False) -> None:
    """Remove nodes and weights that no output depends on.

    Args:
        inputs: remove such inputs of the graph, too.
    """
    RemoveUnusedNodesPass()(model)
    if inputs:
        unused = [value for value in model.graph.inputs if not value.uses()]
        for value in unused:
            model.graph.inputs.remove(value)


def add_domain(model: ir.Model) -> None:
    """Declare ONNX Runtime's own operators."""
    model.opset_imports.setdefault("com.microsoft", 1)


def infer(model: ir.Model) -> dict[str, ir.Value]:
    """Values by name, with the types and shapes that inference finds; a size that it does not know is no int."""
    message, _ = light(model)
    for made in message.graph.node:
        if made.op_type == "GroupQueryAttention":  # unknown to ONNX: its output has three dimensions
            sizes = [f"{made.output[0]}_{axis}" for axis in range(3)]
            message.graph.value_info.append(
                helper.make_tensor_value_info(made.output[0], onnx.TensorProto.FLOAT, sizes)
            )
    inferred: dict[str, ir.Value] = ir.convenience.create_value_mapping(
        ir.from_proto(onnx.shape_inference.infer_shapes(message)).graph
    )
    return inferred


def light(model: ir.Model) -> tuple[onnx.ModelProto, list[ir.Value]]:
    """The model as a protobuf that has large matrices as inputs, and these."""
    graph = model.graph
    constants = graph.initializers.values()
    weights = [value for value in constants if len(value.shape) > 1 and value.const_value.nbytes > SMALL]
    view = ir.GraphView(
        [*graph.inputs, *weights],
        graph.outputs,
        nodes=graph,
        initializers=[value for value in constants if value not in weights],
        opset_imports=graph.opset_imports,
        name=graph.name,
    )
    return ir.to_proto(ir.Model(view, ir_version=model.ir_version)), weights


def restored(message: onnx.ModelProto, weights: Sequence[ir.Value]) -> ir.Model:
    """The model of a protobuf that `light` gave, with its matrices as weights again."""
    model = ir.from_proto(message)
    for weight in weights:
        for value in [value for value in model.graph.inputs if value.name == weight.name]:
            model.graph.inputs.remove(value)
            value.const_value = weight.const_value
            model.graph.register_initializer(value)
    return model


def message(model: ir.Model) -> onnx.ModelProto:
    """The model as a protobuf that holds all of its weights."""
    made = ir.to_proto(model)
    for tensor in made.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.CopyFrom(numpy_helper.from_array(array(model.graph.initializers[tensor.name]), tensor.name))
    return made
