"""Graph passes for encoders, on small graphs against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from trident_export.graphs import encoder as encoder_graph
from trident_export.graphs import unpadding
from trident_export.passes import pairs
from trident_export.passes.base import matmuls
from trident_export.passes.per_token import quantize_per_token
from trident_export.passes.rotate import rotation
from trident_export.passes.spread import Spread
from trident_serving.encoders.pooling import Pooling, pool

GENERATOR = np.random.default_rng(3)
WIDTH = 16
BLOCK = 4  # of channels that are rotated together
WEIGHTS = {
    "words": GENERATOR.normal(size=(30, WIDTH)).astype(np.float32),
    "first": GENERATOR.normal(size=(WIDTH, 24)).astype(np.float32),
    "bias": GENERATOR.normal(size=24).astype(np.float32),
    "second": GENERATOR.normal(size=(24, WIDTH)).astype(np.float32),
}


def graph() -> ir.Model:
    """Embedding, two matmuls with an activation and a residual, then something that mixes tokens."""
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["embedded"], name="embed"),
        helper.make_node("MatMul", ["embedded", "first"], ["a"], name="first"),
        helper.make_node("Add", ["bias", "a"], ["b"], name="bias"),
        helper.make_node("Tanh", ["b"], ["c"], name="tanh"),
        helper.make_node("MatMul", ["c", "second"], ["d"], name="second"),
        helper.make_node("Add", ["d", "embedded"], ["last_hidden_state"], name="residual"),
    ]
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, ["b", "s"]) for n in ("input_ids", "attention_mask")]
    output = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["b", "s", WIDTH])
    initializers = [numpy_helper.from_array(value, name) for name, value in WEIGHTS.items()]
    made = helper.make_graph(nodes, "small", inputs, [output], initializers)
    return ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


def run(model: ir.Model, feeds: dict[str, NDArray[Any]], output: str = "last_hidden_state") -> NDArray[Any]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: NDArray[Any] = session.run([output], {node.name: feeds[node.name] for node in session.get_inputs()})[0]
    return result


def batch() -> dict[str, NDArray[Any]]:
    ids = GENERATOR.integers(0, 30, (3, 6)).astype(np.int64)
    mask = np.array([[1, 1, 1, 1, 0, 0], [1] * 6, [1, 0, 0, 0, 0, 0]], np.int64)
    return {"input_ids": ids, "attention_mask": mask}


def test_matmuls_see_real_tokens_alone() -> None:
    feeds = batch()
    model = graph()
    expected = run(model, feeds)
    assert unpadding.unpad(model) == 6
    found = run(model, feeds)
    real = feeds["attention_mask"] > 0
    np.testing.assert_allclose(found[real], expected[real], atol=1e-5)
    # Behind a text its last token is repeated: nothing of another text shows.
    np.testing.assert_array_equal(found[0, 4:], np.repeat(found[0, 3:4], 2, axis=0))
    np.testing.assert_array_equal(found[2, 1:], np.repeat(found[2, :1], 5, axis=0))
    assert run_shape(model, model.graph.node("first").inputs[0].name, feeds) == (11, WIDTH)


def run_shape(model: ir.Model, name: str, feeds: dict[str, NDArray[Any]]) -> tuple[int, ...]:
    shown = ir.to_proto(model)
    shown.graph.output.append(helper.make_empty_tensor_value_info(name))
    return run(ir.from_proto(shown), feeds, name).shape


def test_vectors_of_positions_are_added_to_real_tokens() -> None:
    """[1, sequence, features], which all texts share."""
    made = ir.to_proto(graph())
    made.graph.initializer.append(numpy_helper.from_array(np.arange(6, dtype=np.int64)[None], "positions"))
    made.graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "zero"))
    made.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "one"))
    more = [
        helper.make_node("Shape", ["input_ids"], ["width"], start=1, end=2),
        helper.make_node("Slice", ["positions", "zero", "width", "one"], ["places"]),
        helper.make_node("Gather", ["words", "places"], ["placed"], name="placed"),
        helper.make_node("Add", ["embedded", "placed"], ["both"], name="both"),
    ]
    made.graph.node[1].input[0] = "both"
    for node in reversed(more):
        made.graph.node.insert(1, node)
    model, feeds = ir.from_proto(made), batch()
    expected = run(model, feeds)
    assert unpadding.unpad(model) == 7
    real = feeds["attention_mask"] > 0
    np.testing.assert_allclose(run(model, feeds)[real], expected[real], atol=1e-5)
    assert run_shape(model, model.graph.node("both").inputs[1].name, feeds) == (11, WIDTH)


def test_a_weight_that_depends_on_no_token_is_left_alone() -> None:
    """Embeddings of positions that go through a matmul are no tokens, whatever their rank."""
    model = ir.to_proto(graph())
    extra = [
        helper.make_node("MatMul", ["positions", "first"], ["projected"], name="positions"),
        helper.make_node("ReduceSum", ["projected"], ["sum"], name="sum"),
    ]
    model.graph.node.extend(extra)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1, 9, WIDTH), np.float32), "positions"))
    changed = ir.from_proto(model)
    assert unpadding.unpad(changed) == 6
    assert changed.graph.node("positions").inputs[0].name == "positions"


def quantized(activation: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same sum in numpy."""
    scale = np.maximum(np.abs(activation).max(axis=1, keepdims=True) / 127, 1e-10)
    integers = np.clip(np.rint(activation / scale) + 128, 0, 255) - 128
    steps = np.abs(weight).max(axis=0) / 63
    result: NDArray[np.float32] = (integers @ np.rint(weight / steps)) * steps * scale
    return result


def test_row_quantization_is_what_numpy_says() -> None:
    feeds = batch()
    model = graph()
    unpadding.unpad(model)
    assert len(quantize_per_token(model, matmuls(model))) == 2
    found = run(model, feeds)
    real = feeds["attention_mask"] > 0
    embedded = WEIGHTS["words"][feeds["input_ids"][real]]
    hidden = np.tanh(quantized(embedded, WEIGHTS["first"]) + WEIGHTS["bias"])
    expected = quantized(hidden, WEIGHTS["second"]) + embedded
    np.testing.assert_allclose(found[real], expected, atol=2e-3 * np.abs(expected).max())
    # Company changes nothing, to the last bit.
    alone = {name: value[:1] for name, value in feeds.items()}
    np.testing.assert_array_equal(run(model, alone)[0], found[0])


def test_weights_of_seven_bits_never_saturate_sixteen() -> None:
    model = graph()
    unpadding.unpad(model)
    quantize_per_token(model, {"first"})
    weights = [v.const_value.numpy() for n, v in model.graph.initializers.items() if n.endswith("/weight")]
    assert [weight.shape for weight in weights] == [(WIDTH, 24)]
    assert np.abs(weights[0].astype(int)).max() == 63
    assert 2 * 255 * 63 < 2**15


def spread_and_quantized(activation: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same sum in numpy: blocks of channels rotated, a scale for each token, weights in pairs."""
    turn = rotation(BLOCK, 0)
    turned = (activation.reshape(len(activation), -1, BLOCK) @ turn).reshape(activation.shape)
    largest = np.abs(turned).max(axis=1, keepdims=True)
    integers = np.rint(turned / largest * 127)
    against = (turn.T @ weight.reshape(-1, BLOCK, weight.shape[1])).reshape(weight.shape)
    steps = pairs.steps(against)
    result: NDArray[np.float32] = (integers @ pairs.rounded(against, steps)) * steps * largest / 127
    return result


def test_behind_spread_one_scale_is_left_and_weights_have_almost_eight_bits() -> None:
    feeds = batch()
    model = graph()
    unpadding.unpad(model)
    model, _ = Spread(block=BLOCK).apply(model, matmuls(model), None)
    assert len(quantize_per_token(model, matmuls(model))) == 2
    assert sum(node.op_type == "MatMulIntegerToFloat" for node in model.graph) == 2
    found = run(model, feeds)
    real = feeds["attention_mask"] > 0
    embedded = WEIGHTS["words"][feeds["input_ids"][real]]
    hidden = np.tanh(spread_and_quantized(embedded, WEIGHTS["first"]) + WEIGHTS["bias"])
    expected = spread_and_quantized(hidden, WEIGHTS["second"]) + embedded
    np.testing.assert_allclose(found[real], expected, atol=2e-3 * np.abs(expected).max())
    weights = [v.const_value.numpy() for n, v in model.graph.initializers.items() if n.endswith("/weight")]
    assert max(np.abs(weight.astype(int)).max() for weight in weights) > 63
    alone = {name: value[:1] for name, value in feeds.items()}
    np.testing.assert_array_equal(run(model, alone)[0], found[0])


@pytest.mark.parametrize("pooling", list(Pooling))
def test_pooling_in_the_graph_is_that_of_the_runtime(pooling: Pooling) -> None:
    feeds = batch()
    model = graph()
    encoder_graph.with_pooling(model, pooling)
    expected = pool(run(graph(), feeds), feeds["attention_mask"], pooling)
    np.testing.assert_allclose(run(model, feeds, "pooled"), expected, atol=1e-6)
