"""Where weights are while a graph is edited, and how a node is replaced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from trident_export.graphs import editing

MATRIX = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """y = x @ matrix + bias, in a file."""
    x = ir.val("x", ir.DataType.FLOAT, ["rows", 64])
    y = ir.val("y", ir.DataType.FLOAT, ["rows", 32])
    graph = ir.Graph([x], [y], nodes=[], opset_imports={"": 17}, name="small")
    matrix, bias = (editing.constant(graph, name, value) for name, value in (("matrix", MATRIX), ("bias", MATRIX[0])))
    product = editing.make("MatMul", [x, matrix], "product")
    graph.extend([product, ir.node("Add", [*product.outputs, bias], outputs=[y], name="add")])
    editing.save(ir.Model(graph, ir_version=10), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_matrices_stay_in_their_file(path: Path) -> None:
    model = ir.load(path)
    stored = model.graph.initializers["matrix"].const_value
    assert isinstance(stored, ir.ExternalTensor)
    assert list(editing.infer(model)["product"].shape)[1] == 32
    light, weights = editing.light(model)
    assert [value.name for value in light.graph.input] == ["x", "matrix"]
    assert [tensor.name for tensor in light.graph.initializer] == ["bias"]
    restored = editing.restored(light, weights)
    assert restored.graph.initializers["matrix"].const_value is stored
    assert [value.name for value in restored.graph.inputs] == ["x"]
    whole = {tensor.name: tensor for tensor in editing.message(model).graph.initializer}
    np.testing.assert_array_equal(np.frombuffer(whole["matrix"].raw_data, np.float32), MATRIX.ravel())


def test_what_replaces_a_node_gives_the_same_output(path: Path) -> None:
    model = ir.load(path)
    add = model.graph.node("add")
    editing.replace(add, [editing.make("Sub", list(add.inputs), "other", name="subtract")])
    (output,) = model.graph.outputs
    assert (output.name, output.producer().name, output.dtype) == ("y", "subtract", ir.DataType.FLOAT)
    assert [node.name for node in model.graph] == ["product", "subtract"]
    output.producer().replace_input_with(1, None)
    editing.drop_unused(model)
    assert list(model.graph.initializers) == ["matrix"]
