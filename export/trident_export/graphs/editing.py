"""What all passes over a graph share. Graphs are `onnx_ir` models, edited in place.

Memory holds one large weight at a time: weights stay where they lie, in a file or in the model that was traced, until a
pass asks for their numbers (`array`), and what a pass makes of them goes to a file again (`scratch`). `infer` and
`light` work without the large ones. Functions of ONNX Runtime that want a protobuf get one from `light` or `message`.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from onnx_ir.passes.common import RemoveUnusedNodesPass

SMALL = 1024  # bytes of a constant that shape inference may look at
LARGE = 2**20  # bytes of a matrix that memory does not hold longer than it must

_PARTS = "parts"
_SCRATCH: ContextVar[Path | None] = ContextVar("scratch", default=None)
_NUMBERS = count()


@contextmanager
def scratch() -> Iterator[None]:
    """While this holds, large matrices that passes make lie in files, which are gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        token = _SCRATCH.set(Path(folder))
        try:
            yield
        finally:
            _SCRATCH.reset(token)


def load(path: Path) -> ir.Model:
    """Read a graph; its weights stay in their file, which may have a second name (`link`)."""
    model = ir.load(path)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = _in_file(value.const_value, Path(value.const_value.path).absolute())
    return model


def save(model: ir.Model, path: Path) -> None:
    """Write a graph to `path`, its weights to `<path>.data`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.with_name(path.name + ".data")
    ir.save(model, path, external_data=data.name, size_threshold_bytes=SMALL - 1)
    if data.exists():
        data.chmod(0o644)  # onnx_ir makes it private to this user, and the server may be another


def link(path: Path, target: Path) -> None:
    """Give a graph that `save` wrote a second name, so that the disk holds it once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for ending in ("", ".data"):
        if (file := path.with_name(path.name + ending)).exists():
            _link(file, target.with_name(target.name + ending))


def save_beside(model: ir.Model, path: Path, target: Path) -> None:
    """Write a graph that `load` read from `path`, and whose large weights are still the same: the disk holds them once.

    Args:
        path: of a graph that `save` wrote.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    data, linked = (file.with_name(file.name + ".data") for file in (path, target))
    if data.exists():
        _link(data, linked)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = _in_file(value.const_value, linked, base=target.parent)
    ir.save(model, target)


def save_linked(model: ir.Model, path: Path) -> None:
    """Write a graph for a session that is to be opened right now: weights in files are linked and not copied."""
    links: dict[str, Path] = {}
    before = [(value, value.const_value) for value in model.graph.initializers.values()]
    try:
        for value, tensor in before:
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            if tensor.path not in links:
                links[tensor.path] = path.with_name(f"{path.name}.{len(links)}")
                _link(Path(tensor.path), links[tensor.path])
            value.const_value = _in_file(tensor, links[tensor.path], base=path.parent)
        ir.save(model, path)
    finally:
        for value, tensor in before:
            value.const_value = tensor


def share_weights(path: Path, other: Path) -> int:
    """Let a graph read large weights from the file of another in its folder that has the same; returns their bytes.

    ONNX Runtime maps these files, so memory holds such weights once, too, where it does not rearrange them.

    Args:
        path, other: graphs that `save` wrote; the second is written again.
    """
    first, second = (onnx.load(str(file), load_external_data=False) for file in (path, other))
    if any(attribute.HasField("g") for node in second.graph.node for attribute in node.attribute):
        return 0  # whose weights are not looked for
    held = {_contents(tensor, path): tensor for tensor in first.graph.initializer if _is_large(tensor)}
    own, shared = [], 0
    for tensor in second.graph.initializer:
        same = held.get(_contents(tensor, other)) if _is_large(tensor) else None
        if same is not None:
            del tensor.external_data[:]
            tensor.external_data.extend(same.external_data)
            shared += ExternalDataInfo(tensor).length
        elif uses_external_data(tensor):
            own.append(tensor)
    if not shared:
        return 0
    data, part = (other.with_name(f"{other.name}.{ending}") for ending in ("data", "part"))
    with part.open("wb") as stream:
        for tensor in own:
            stream.seek(-(-stream.tell() // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY)
            offset, numbers = stream.tell(), _bytes(tensor, other)
            stream.write(numbers)
            del tensor.external_data[:]
            for key, value in (("location", data.name), ("offset", offset), ("length", len(numbers))):
                tensor.external_data.add(key=key, value=str(value))
    part.chmod(0o644)
    part.replace(data)
    part.write_bytes(second.SerializeToString())
    part.replace(other)  # and not written to: the file may have other names
    return shared


def _is_large(tensor: onnx.TensorProto) -> bool:
    return bool(uses_external_data(tensor) and ExternalDataInfo(tensor).length >= LARGE)


def _contents(tensor: onnx.TensorProto, path: Path) -> tuple[int, tuple[int, ...], bytes]:
    return tensor.data_type, tuple(tensor.dims), hashlib.sha256(_bytes(tensor, path)).digest()


def _bytes(tensor: onnx.TensorProto, path: Path) -> memoryview:
    """Of a tensor that lies in a file beside the graph at `path`."""
    where = ExternalDataInfo(tensor)
    return np.memmap(path.with_name(where.location), np.uint8, "r", where.offset or 0, (where.length,)).data


def _link(file: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(file, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(file, target)


def _in_file(tensor: ir.ExternalTensor, file: Path, base: Path = Path()) -> ir.ExternalTensor:
    """The same numbers in another file; without a base folder onnx_ir takes any path, and files with several names."""
    where = file.name if base != Path() else str(file)
    return ir.ExternalTensor(
        where,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
        base_dir=base if base != Path() else "",
    )


def make(
    kind: str, inputs: Sequence[ir.Value | None], output: str, name: str = "", domain: str = "", **attributes: Any
) -> ir.Node:
    """A node with one output, and the output's name unless it is given another."""
    return ir.node(kind, inputs, attributes, domain=domain, outputs=[ir.Value(name=output)], name=name or output)


def constant(graph: ir.Graph, name: str, value: NDArray[Any]) -> ir.Value:
    """The initializer of a name, which is added where there is none."""
    return graph.initializers[name] if name in graph.initializers else _initializer(graph, _tensor(name, value))


def side_by_side(graph: ir.Graph, name: str, parts: Sequence[ir.Value], axis: int) -> ir.Value:
    """The initializer of a name: the numbers of others side by side, which are put together when they are asked for."""
    tensors = [part.const_value for part in parts]
    shape = list(tensors[0].shape)
    shape[axis] = sum(tensor.shape[axis] for tensor in tensors)

    def read() -> ir.Tensor:
        return ir.Tensor(np.concatenate([_read(tensor) for tensor in tensors], axis=axis), name=name)

    return _initializer(graph, ir.LazyTensor(read, tensors[0].dtype, ir.Shape(shape), name=name))


def parts_of(matmul: ir.Node) -> list[tuple[str, int]]:
    """What stands side by side in a matmul's weight: layers or matmuls that it was, with the columns of each."""
    return list(matmul.meta.get(_PARTS, [(matmul.name, matmul.inputs[1].shape[-1])]))


def set_parts(matmul: ir.Node, parts: Sequence[tuple[str, int]]) -> None:
    """Note what stands side by side in a matmul's weight; until the graph is written."""
    matmul.meta[_PARTS] = list(parts)


def _initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.initializers[value.name] = value
    return value


def _tensor(name: str | None, numbers: NDArray[Any]) -> ir.TensorProtocol:
    """Numbers in memory, or in a file where they are many."""
    folder = _SCRATCH.get()
    if folder is None or numbers.ndim < 2 or numbers.nbytes < LARGE:
        return ir.Tensor(np.ascontiguousarray(numbers) if numbers.ndim else numbers, name=name)
    file = folder / f"{next(_NUMBERS)}"
    with file.open("wb") as stream:
        stream.write(np.ascontiguousarray(numbers).data)
    kind = ir.DataType.from_numpy(numbers.dtype)
    return ir.ExternalTensor(str(file), 0, numbers.nbytes, kind, shape=ir.Shape(numbers.shape), name=name or "")


def array(value: ir.Value) -> NDArray[Any]:
    """An initializer's numbers; of a file, they are in memory as long as this array is."""
    return _read(value.const_value)


def _read(tensor: ir.TensorProtocol) -> NDArray[Any]:
    if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes >= SMALL:
        shape = tensor.shape.numpy()
        return np.memmap(tensor.path, tensor.dtype.numpy(), "r", tensor.offset or 0, shape).view(np.ndarray)
    found: NDArray[Any] = tensor.numpy()
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
    old, folder = value.const_value, _SCRATCH.get()
    value.const_value = _tensor(value.name, new)
    if isinstance(old, ir.ExternalTensor) and folder is not None and Path(old.path).parent == folder:
        Path(old.path).unlink()  # of an earlier pass


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
    same = {"ir_version": model.ir_version, "metadata_props": model.metadata_props}
    return ir.to_proto(ir.Model(view, **same)), weights


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
