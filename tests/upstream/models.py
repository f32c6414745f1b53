"""Stand-ins for the models of Triton's tests, which NVIDIA generates for backends that this server lacks.

They have the names, tensors and settings of the originals. Graphs are ONNX, so that our stand-in for the ONNX Runtime
backend serves them where there is no native one.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto, helper

IDENTITY = Path(__file__).with_name("identity_model.py")
# Triton's name of a type: ONNX's.
TYPES = {
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "INT32": TensorProto.INT32,
    "INT8": TensorProto.INT8,
    "STRING": TensorProto.STRING,
}
OPSET, IR_VERSION = 17, 8


@dataclass(frozen=True)
class Tensor:
    """A tensor as a config has it.

    Attributes:
        dims: without the batch; -1: any size.
        scalar: the graph has no dimensions, though the config has some.
    """

    name: str
    type: str
    dims: tuple[int, ...]
    scalar: bool = False

    @property
    def entry(self) -> str:
        return f'{{ name: "{self.name}" data_type: TYPE_{self.type} dims: {list(self.dims)} }}'


def config(backend: str, batch: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor], more: str = "") -> str:
    """A config.pbtxt without a name, which is the folder's."""
    parts = [f'backend: "{backend}"', f"max_batch_size: {batch}"]
    parts += [f"{side} [ {', '.join(one.entry for one in each)} ]" for side, each in _sides(inputs, outputs)]
    return "\n".join([*parts, more, ""])


def _sides(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[tuple[str, Sequence[Tensor]], ...]:
    return ("input", inputs), ("output", outputs)


def identity(
    repository: Path,
    name: str,
    type_: str = "FP32",
    dims: tuple[int, ...] = (-1,),
    *,
    batch: int = 8,
    count: int = 1,
    more: str = "",
) -> None:
    """An ONNX model that gives INPUT0 back as OUTPUT0, and so on."""
    inputs = [Tensor(f"INPUT{number}", type_, dims) for number in range(count)]
    outputs = [Tensor(f"OUTPUT{number}", type_, dims) for number in range(count)]
    nodes = [helper.make_node("Identity", [a.name], [b.name]) for a, b in zip(inputs, outputs, strict=True)]
    _write(repository / name, config("onnxruntime", batch, inputs, outputs, more), nodes, inputs, outputs, batch)


def scalar(repository: Path, name: str, dims: tuple[int, ...]) -> None:
    """An ONNX model of scalars, whose config has `dims` in place of none."""
    tensors = Tensor("INPUT", "FP32", dims, scalar=True), Tensor("OUTPUT", "FP32", dims, scalar=True)
    node = helper.make_node("Identity", ["INPUT"], ["OUTPUT"])
    _write(repository / name, config("onnxruntime", 0, tensors[:1], tensors[1:]), [node], tensors[:1], tensors[1:], 0)


def add_sub(repository: Path, name: str, taken: str, given: str, *, batch: int = 8) -> None:
    """An ONNX model of two inputs [16]: OUTPUT0 is their sum, OUTPUT1 their difference."""
    inputs = [Tensor(f"INPUT{number}", taken, (16,)) for number in range(2)]
    outputs = [Tensor(f"OUTPUT{number}", given, (16,)) for number in range(2)]
    nodes = [helper.make_node("Cast", [f"INPUT{n}"], [f"n{n}"], to=TensorProto.INT32) for n in range(2)]
    for number, operator in enumerate(("Add", "Sub")):
        nodes.append(helper.make_node(operator, ["n0", "n1"], [f"r{number}"]))
        nodes.append(helper.make_node("Cast", [f"r{number}"], [f"OUTPUT{number}"], to=TYPES[given]))
    _write(repository / name, config("onnxruntime", batch, inputs, outputs), nodes, inputs, outputs, batch)


def _write(
    folder: Path,
    text: str,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    batch: int,
) -> None:
    def info(tensor: Tensor) -> onnx.ValueInfoProto:
        dims = [size if size >= 0 else f"{tensor.name}_{place}" for place, size in enumerate(tensor.dims)]
        shape = [] if tensor.scalar else [*(["batch"] if batch else []), *dims]
        return helper.make_tensor_value_info(tensor.name, TYPES[tensor.type], shape)

    graph = helper.make_graph(list(nodes), "stand-in", [info(one) for one in inputs], [info(one) for one in outputs])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(text, encoding="utf-8")
    onnx.save(model, folder / "1/model.onnx")


def slow(
    repository: Path, name: str, milliseconds: int, *, type_: str = "FP32", batch: int = 1, more: str = ""
) -> None:
    """A model that gives INPUT0 back after some time, as Triton's backend `identity` does with that setting."""
    one, other = Tensor("INPUT0", type_, (-1,)), Tensor("OUTPUT0", type_, (-1,))
    delay = f'parameters [{{ key: "execute_delay_ms" value: {{ string_value: "{milliseconds}" }} }}]'
    instances = "instance_group [{ count: 1 kind: KIND_CPU }]"
    (repository / name / "1").mkdir(parents=True)
    text = config("python", batch, [one], [other], "\n".join((instances, delay, more)))
    (repository / name / "config.pbtxt").write_text(text, encoding="utf-8")
    shutil.copyfile(IDENTITY, repository / name / "1/model.py")


def copy(folder: Path, repository: Path) -> None:
    """Take a model of the checkout; one of the backend `identity` gets the Python model in its place."""
    made = repository / folder.name
    shutil.copytree(folder, made)
    (made / "1").mkdir(exist_ok=True)
    file = made / "config.pbtxt"
    if file.exists() and 'backend: "identity"' in (text := file.read_text(encoding="utf-8")):
        file.write_text(text.replace('backend: "identity"', 'backend: "python"'), encoding="utf-8")
        shutil.copyfile(IDENTITY, made / "1/model.py")


def twice(repository: Path, name: str, model: str) -> None:
    """An ensemble that runs a model of FP32 twice."""

    def step(taken: str, given: str) -> str:
        maps = f'input_map {{ key: "INPUT0" value: "{taken}" }} output_map {{ key: "OUTPUT0" value: "{given}" }}'
        return f'{{ model_name: "{model}" model_version: -1 {maps} }}'

    sides = (("input", Tensor("INPUT0", "FP32", (-1,))), ("output", Tensor("OUTPUT0", "FP32", (-1,))))
    parts = ['platform: "ensemble"', "max_batch_size: 1", *(f"{side} [ {each.entry} ]" for side, each in sides)]
    parts += [f"ensemble_scheduling {{ step [ {step('INPUT0', 'between')}, {step('between', 'OUTPUT0')} ] }}", ""]
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text("\n".join(parts), encoding="utf-8")
