"""Where weights are while a graph is edited, and how a node is replaced."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
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


def test_what_a_pass_makes_lies_in_a_file_and_goes_with_it(path: Path) -> None:
    model = editing.load(path)
    matrix = model.graph.initializers["matrix"]
    large = np.arange(2**19, dtype=np.float32).reshape(512, 1024)
    with editing.scratch():
        editing.store(matrix, large)
        first = Path(matrix.const_value.path)
        np.testing.assert_array_equal(np.fromfile(first, np.float32).reshape(512, 1024), large)
        editing.store(matrix, editing.array(matrix) + 1)
        assert not first.exists()  # the disk holds it once
        other = editing.constant(model.graph, "other", large.T)
        both = editing.side_by_side(model.graph, "both", [other, other], axis=1)
        assert isinstance(other.const_value, ir.ExternalTensor)
        np.testing.assert_array_equal(editing.array(matrix), large + 1)
        np.testing.assert_array_equal(editing.array(both), np.concatenate([large.T, large.T], axis=1))
        assert isinstance(editing.constant(model.graph, "vector", large[:, 0]).const_value, ir.Tensor)
        editing.save(model, path.with_name("edited.onnx"))
    assert not Path(other.const_value.path).exists()
    saved = ir.load(path.with_name("edited.onnx")).graph.initializers
    np.testing.assert_array_equal(saved["matrix"].const_value.numpy(), large + 1)
    np.testing.assert_array_equal(saved["both"].const_value.numpy()[:, 512:], large.T)


def test_a_graph_with_a_second_name_is_read_and_run(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "float32" / "model.onnx"
    editing.link(path, target)
    assert target.with_name("model.onnx.data").stat().st_nlink == 2
    model = editing.load(path)
    np.testing.assert_array_equal(editing.array(model.graph.initializers["matrix"]), MATRIX)
    x = np.ones((1, 64), np.float32)
    session = tmp_path / "session" / "model.onnx"
    session.parent.mkdir()
    editing.save_linked(model, session)
    assert sorted(file.name for file in session.parent.iterdir()) == ["model.onnx", "model.onnx.0"]
    for file in (target, session):
        (y,) = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, {"x": x})
        np.testing.assert_allclose(y, x @ MATRIX + MATRIX[0])
    assert isinstance(model.graph.initializers["matrix"].const_value, ir.ExternalTensor)


def test_a_graph_is_linked_as_a_copy_where_a_disk_has_no_links(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    editing.link(path, tmp_path / "copy" / "model.onnx")
    assert (tmp_path / "copy/model.onnx.data").read_bytes() == path.with_name("model.onnx.data").read_bytes()
