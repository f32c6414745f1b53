"""LayerNorms that become root-mean-square norms, on graphs of few layers, against the graph before."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from trident_export.passes.base import matmuls
from trident_export.passes.layer_norms import centre
from trident_export.passes.rotate import Rotate

WIDTH, INNER, ROWS, OUTPUTS = 24, 40, 50, 9
RANDOM = np.random.default_rng(3)


def graph(kind: str) -> ir.Model:
    """Two or three layers of a norm, a matmul, a bias and a tanh, and a matmul back to the sum; then a head.

    Args:
        kind: before: the norms stand before the layers; behind: their output is the sum that goes on; given: before,
            of a sum that begins with numbers that no weight gives.
    """
    weights: dict[str, NDArray[np.float32]] = {
        "words": RANDOM.normal(1, 1, (ROWS, WIDTH)).astype(np.float32),
        "places": RANDOM.normal(0, 1, (7, WIDTH)).astype(np.float32),
        "head": RANDOM.normal(0, 0.3, (WIDTH, OUTPUTS)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["word"], name="words"),
        helper.make_node("Gather", ["places", "positions"], ["place"], name="places"),
        helper.make_node("Add", ["given" if kind == "given" else "word", "place"], ["sum_0"], name="start"),
    ]

    def norm(name: str, source: str) -> str:
        weights[f"{name}_scale"] = RANDOM.normal(1, 0.3, WIDTH).astype(np.float32)
        weights[f"{name}_bias"] = RANDOM.normal(0, 0.3, WIDTH).astype(np.float32)
        inputs = [source, f"{name}_scale", f"{name}_bias"]
        nodes.append(helper.make_node("LayerNormalization", inputs, [name], name=name, axis=-1, epsilon=1e-5))
        return name

    total = "sum_0"
    for layer in range(3 if kind == "behind" else 2):
        source = total if kind == "behind" else norm(f"norm_{layer}", total)
        for name, shape in (("up", (WIDTH, INNER)), ("down", (INNER, WIDTH))):
            weights[f"{name}_{layer}"] = RANDOM.normal(0, 0.3, shape).astype(np.float32)
            weights[f"{name}_bias_{layer}"] = RANDOM.normal(0, 0.3, shape[1]).astype(np.float32)
        nodes += [
            helper.make_node("MatMul", [source, f"up_{layer}"], [f"up_{layer}_out"], name=f"up_{layer}"),
            helper.make_node("Add", [f"up_{layer}_out", f"up_bias_{layer}"], [f"up_{layer}_sum"]),
            helper.make_node("Tanh", [f"up_{layer}_sum"], [f"hidden_{layer}"]),
            helper.make_node(
                "MatMul", [f"hidden_{layer}", f"down_{layer}"], [f"down_{layer}_out"], name=f"down_{layer}"
            ),
            helper.make_node("Add", [f"down_{layer}_out", f"down_bias_{layer}"], [f"down_{layer}_sum"]),
            helper.make_node("Add", [total, f"down_{layer}_sum"], [f"sum_{layer + 1}"]),
        ]
        total = f"sum_{layer + 1}"
        total = norm(f"norm_{layer}", total) if kind == "behind" else total
    last = total if kind == "behind" else norm("norm_last", total)
    nodes.append(helper.make_node("MatMul", [last, "head"], ["y"], name="head"))
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["n"]) for name in ("input_ids", "positions")]
    inputs.append(helper.make_tensor_value_info("given", TensorProto.FLOAT, ["n", WIDTH]))
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", OUTPUTS])
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    made = helper.make_graph(nodes, kind, inputs, [output], tensors)
    return ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=10))


def run(model: ir.Model) -> NDArray[np.float32]:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # about inputs that nothing reads
    random = np.random.default_rng(5)
    feeds = {
        "input_ids": random.integers(0, ROWS, 6),
        "positions": np.arange(6),
        "given": random.normal(2, 1, (6, WIDTH)).astype(np.float32),
    }
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    known = {value.name for value in session.get_inputs()}
    found: NDArray[np.float32] = session.run(None, {name: value for name, value in feeds.items() if name in known})[0]
    return found


def kinds(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize(("kind", "more"), [("before", 0), ("given", 1)])
def test_norms_before_layers_lose_their_mean_and_their_bias(kind: str, more: int) -> None:
    model = graph(kind)
    expected, before = run(model), kinds(model)
    names = set(matmuls(model))
    assert centre(model, names) is not None
    after = kinds(model)
    assert (before["LayerNormalization"], after["LayerNormalization"]) == (3, 0)
    assert after["SimplifiedLayerNormalization"] == 3
    # Biases go to those of the layers; the head has none, and gets an addition.
    assert after["Add"] == before["Add"] + 1
    assert after["MatMul"] == before["MatMul"] + more
    np.testing.assert_allclose(run(model), expected, atol=1e-4)
    means = [
        value.const_value.numpy().mean(axis=-1) for name, value in model.graph.initializers.items() if "down" in name
    ]
    assert len(means) == 4
    np.testing.assert_allclose(np.concatenate([mean.reshape(-1) for mean in means]), 0, atol=1e-6)


@pytest.mark.parametrize("kind", ["before", "given"])
def test_such_a_graph_is_rotated(kind: str) -> None:
    model = graph(kind)
    expected = run(model)
    rotated, taken = Rotate(layer_norms=True).apply(model, matmuls(model), None)
    assert taken == set()
    assert "rotate/ones" in rotated.graph.initializers
    np.testing.assert_allclose(run(rotated), expected, atol=1e-4)
    left = graph(kind)
    before = ir.to_proto(left)
    assert ir.to_proto(Rotate().apply(left, matmuls(left), None)[0]) == before


def test_norms_behind_layers_stay() -> None:
    """Their output is added to, and a scale of each channel does not rotate."""
    model = graph("behind")
    names, before = set(matmuls(model)), ir.to_proto(model)
    assert centre(model, names) is None
    assert ir.to_proto(Rotate(layer_norms=True).apply(model, list(names), None)[0]) == before


@pytest.mark.parametrize("damage", ["shared", "read"])
def test_a_sum_that_something_else_reads_stays(damage: str) -> None:
    message = ir.to_proto(graph("before"))
    if damage == "read":
        message.graph.node.append(helper.make_node("Relu", ["sum_1"], ["z"], name="other"))
    else:
        message.graph.node.append(helper.make_node("Mul", ["y", "down_1"], ["z"], name="other"))
    message.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    model = ir.from_proto(message)
    assert centre(model, set(matmuls(model))) is None
    assert ir.to_proto(model) == message


def test_graphs_that_this_file_makes_are_sound() -> None:
    for kind in ("before", "behind", "given"):
        onnx.checker.check_model(ir.to_proto(graph(kind)))
