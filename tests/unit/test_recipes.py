"""Recipes as data, and each pass against the same sum in numpy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from trident_export import corpora, models_file, recipes
from trident_export.errors import ModelsFileError
from trident_export.measure.sensitivity import Grouping
from trident_export.passes import CalibrationRuns, Feeds, Pass
from trident_export.passes.base import Keep, ranks
from trident_export.passes.cache import Cache
from trident_export.passes.embedding import Embedding
from trident_export.passes.gptq import GptqGroups, GptqPerChannel
from trident_export.passes.groups import GroupMinima, Groups, pack
from trident_export.passes.per_token import PerToken
from trident_export.passes.smooth import Smooth, behind_norms
from trident_export.passes.spread import Spread
from trident_export.passes.static import Static

RANDOM = np.random.default_rng(7)
INPUTS, INNER, OUTPUTS = 64, 96, 32
FIRST = RANDOM.normal(0, 0.2, (INPUTS, INNER)).astype(np.float32)
SECOND = RANDOM.normal(0, 0.2, (INNER, OUTPUTS)).astype(np.float32)
BIAS = RANDOM.normal(0, 0.5, INNER).astype(np.float32)


def graph(shape: Sequence[str | int] = ("rows", INPUTS)) -> onnx.ModelProto:
    """tanh(x @ FIRST + BIAS) @ SECOND"""
    out = [*shape[:-1], OUTPUTS]
    nodes = [
        helper.make_node("MatMul", ["x", "first_weight"], ["matmuls"], name="first"),
        helper.make_node("Add", ["matmuls", "bias"], ["sums"], name="sum"),
        helper.make_node("Tanh", ["sums"], ["hidden"], name="tanh"),
        helper.make_node("MatMul", ["hidden", "second_weight"], ["y"], name="second"),
    ]
    weights = {"first_weight": FIRST, "second_weight": SECOND, "bias": BIAS}
    made = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def transform(model: onnx.ModelProto, steps: Sequence[Pass], runs: CalibrationRuns | None = None) -> onnx.ModelProto:
    return ir.to_proto(recipes.transform(ir.from_proto(model), steps, runs))


def run(model: onnx.ModelProto, x: NDArray[np.float32]) -> NDArray[np.float32]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {"x": x})[0]
    return result


def exact(x: NDArray[np.float32], first: NDArray[np.float32] = FIRST) -> NDArray[np.float32]:
    result: NDArray[np.float32] = np.tanh(x @ first + BIAS) @ SECOND
    return result


def runs(samples: int, seed: int) -> Feeds:
    """Runs of as many rows as no other."""
    random = np.random.default_rng(seed)
    return iter([{"x": random.normal(0, 1, (rows + 1, INPUTS)).astype(np.float32)} for rows in range(samples)])


def test_four_bits_between_least_and_largest() -> None:
    packed, steps, middles = pack(FIRST, 32)
    assert packed.shape == (INNER, 2, 16)
    levels = np.stack([packed & 15, packed >> 4], axis=-1).reshape(INNER, 2, 32)
    back = ((levels.astype(np.float32) - 8) * steps[..., None] + middles.T[..., None]).reshape(INNER, INPUTS).T
    np.testing.assert_allclose(back, FIRST, atol=float(steps.max()) / 2 + 1e-6)
    groups = FIRST.T.reshape(INNER, 2, 32)
    for extreme in (groups.min(axis=-1), groups.max(axis=-1)):
        assert np.abs(back.T.reshape(INNER, 2, 32) - extreme[..., None]).min(axis=-1).max() < 1e-6


@pytest.mark.parametrize("shape", [("rows", INPUTS), ("batch", "rows", INPUTS)])
def test_group_minima_are_what_numpy_says(shape: Sequence[str | int]) -> None:
    x = RANDOM.normal(0, 1, (5, INPUTS)).astype(np.float32).reshape((1,) * (len(shape) - 2) + (5, INPUTS))
    model = transform(graph(shape), [GroupMinima(nodes="first")])
    assert [node.name for node in model.graph.node if node.op_type == "MatMulNBits"] == ["first"]
    packed, steps, middles = pack(FIRST, 32)
    levels = np.stack([packed & 15, packed >> 4], axis=-1).reshape(INNER, 2, 32).astype(np.float32)
    weight = ((levels - 8) * steps[..., None]).reshape(INNER, INPUTS).T
    # The fast matmul reads its input in eight bits, group by group; the small one as it is.
    groups = x.reshape(-1, 2, 32)
    units = np.abs(groups).max(axis=-1, keepdims=True) / 127
    rounded = (np.rint(groups / units) * units).reshape(-1, INPUTS)
    expected = np.tanh(rounded @ weight + groups.sum(axis=-1) @ middles + BIAS) @ SECOND
    np.testing.assert_allclose(run(model, x).reshape(-1, OUTPUTS), expected, atol=1e-4)


def test_ranks_behind_operators_that_onnx_does_not_know() -> None:
    """RMS norms with the residual are ONNX Runtime's own, and every matmul of a decoder is behind one."""
    model = graph(("batch", "rows", INPUTS))
    scale = numpy_helper.from_array(np.ones(INPUTS, np.float32), "scale")
    norm = helper.make_node(
        "SkipSimplifiedLayerNormalization", ["x", "x", "scale"], ["normed"], name="norm", domain="com.microsoft"
    )
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    model.graph.initializer.append(scale)
    model.graph.node.insert(0, norm)
    model.graph.node[1].input[0] = "normed"
    assert {ranks(ir.from_proto(model))[name] for name in ("normed", "matmuls", "hidden", "y")} == {3}
    _, taken = GroupMinima().apply(ir.from_proto(model), ["first", "second"], None)
    assert taken == {"first", "second"}


def test_matmuls_that_are_no_multiple_of_a_group_are_left_to_later_passes() -> None:
    _, taken = GroupMinima(group=64).apply(ir.from_proto(graph()), ["first", "second"], None)
    assert taken == {"first"}
    done = transform(graph(), [GroupMinima(group=64), Groups()])
    assert sorted(node.name for node in done.graph.node if node.op_type == "MatMulNBits") == ["first", "second_Q8"]


def normed_graph() -> onnx.ModelProto:
    """A norm, and a matmul of its output that has a channel twenty times as large as the others."""
    scale = np.ones(INPUTS, np.float32)
    scale[5] = 20
    nodes = [
        helper.make_node(
            "SimplifiedLayerNormalization", ["x", "scale"], ["normed"], name="norm", axis=-1, epsilon=1e-5
        ),
        helper.make_node("MatMul", ["normed", "first_weight"], ["y"], name="first"),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", INPUTS]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", INNER])
    weights = [numpy_helper.from_array(scale, "scale"), numpy_helper.from_array(FIRST, "first_weight")]
    made = helper.make_graph(nodes, "normed", inputs, [output], weights)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def test_smoothing_changes_nothing_and_makes_rounding_easier() -> None:
    x = RANDOM.normal(0, 1, (6, INPUTS)).astype(np.float32)
    expected = run(normed_graph(), x)
    smoothed = transform(normed_graph(), [Smooth()], runs)
    np.testing.assert_allclose(run(smoothed, x), expected, atol=2e-4)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in smoothed.graph.initializer}
    # The channel's activations are about 20 times the others', its weights are like theirs: the root goes over.
    others = np.delete(weights["scale"], 5)
    assert weights["scale"][5] / np.median(others) == pytest.approx(np.sqrt(20), rel=0.25)
    rough = transform(normed_graph(), [PerToken()])
    fine = transform(normed_graph(), [Smooth(), PerToken()], runs)
    errors = [float(np.abs(run(model, x) - expected).mean()) for model in (rough, fine)]
    assert errors[1] < 0.8 * errors[0]


def test_a_norm_that_something_else_reads_is_left() -> None:
    model = normed_graph()
    model.graph.node.append(helper.make_node("Relu", ["normed"], ["z"], name="other"))
    assert behind_norms(ir.from_proto(model), {"first"}) == {}
    assert list(behind_norms(ir.from_proto(normed_graph()), {"first"})) == ["normed"]
    assert behind_norms(ir.from_proto(normed_graph()), set()) == {}
    with pytest.raises(ValueError, match="the pass smooth needs calibration text"):
        transform(normed_graph(), [Smooth()])


def test_rows_of_a_decoders_tokens() -> None:
    """[1, tokens, features], as no other kind of graph has them."""
    model = graph((1, "tokens", INPUTS))
    model.graph.input[0].name = model.graph.node[0].input[0] = "input_ids"
    x = RANDOM.normal(0, 1, (1, 5, INPUTS)).astype(np.float32)
    done = transform(model, [PerToken()])
    assert [node.op_type for node in done.graph.node].count("MatMulIntegerToFloat") == 2
    session = ort.InferenceSession(done.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"input_ids": x})[0]
    assert found.shape == (1, 5, OUTPUTS)
    np.testing.assert_allclose(found, exact(x), atol=0.1)
    np.testing.assert_array_equal(session.run(None, {"input_ids": x[:, :1]})[0], found[:, :1])
    x[0, 2] = 0
    nothing = session.run(None, {"input_ids": x})[0]
    np.testing.assert_allclose(nothing[:, 2], exact(x)[:, 2], atol=0.1)  # a token of zeros has a scale of zero
    np.testing.assert_array_equal(np.delete(nothing, 2, axis=1), np.delete(found, 2, axis=1))


def test_rows_of_chosen_tokens() -> None:
    """Behind the choice of the tokens whose logits are wanted there are fewer rows."""
    model = graph((1, "tokens", INPUTS))
    model.graph.input[0].name = "input_ids"
    model.graph.input.append(helper.make_tensor_value_info("logits_tokens", TensorProto.INT64, ["kept"]))
    model.graph.node[0].input[0] = "kept"
    choice = helper.make_node("Gather", ["input_ids", "logits_tokens"], ["kept"], name="choice", axis=1)
    model.graph.node.insert(0, choice)
    x = RANDOM.normal(0, 1, (1, 5, INPUTS)).astype(np.float32)
    done = transform(model, [PerToken()])
    session = ort.InferenceSession(done.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"input_ids": x, "logits_tokens": np.array([4, 1])})[0]
    assert [node.op_type for node in done.graph.node].count("MatMulIntegerToFloat") == 2
    np.testing.assert_allclose(found, exact(x[:, [4, 1]]), atol=0.1)


def test_embedding_tables_in_eight_bits() -> None:
    table = RANDOM.normal(0, 1, (300, 64)).astype(np.float32)
    small = RANDOM.normal(0, 1, (2, 64)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["words", "ids"], ["a"], name="words"),
        helper.make_node("Gather", ["kinds", "kind"], ["b"], name="kinds"),
        helper.make_node("Add", ["a", "b"], ["y"], name="sum"),
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "s"]) for name in ("ids", "kind")]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "s", 64])
    weights = [numpy_helper.from_array(table, "words"), numpy_helper.from_array(small, "kinds")]
    made = helper.make_graph(nodes, "tables", inputs, [output], weights)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    model = transform(model, [Embedding()])
    assert [node.op_type for node in model.graph.node] == ["GatherBlockQuantized", "Gather", "Add"]
    assert {t.name for t in model.graph.initializer} == {"kinds", "words/levels", "words/steps"}
    ids, kind = np.array([[0, 299, 7]]), np.array([[1, 0, 1]])
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"ids": ids, "kind": kind})[0]
    groups = table.reshape(300, 2, 32)
    steps = np.abs(groups).max(axis=-1, keepdims=True) / 127
    rounded = (np.rint(groups / steps) * steps).reshape(300, 64)
    np.testing.assert_allclose(found, rounded[ids] + small[kind], atol=1e-6)


def test_a_table_that_is_also_a_head_is_left() -> None:
    """Its float32 weights would stay, and the eight bits come on top."""
    table = RANDOM.normal(0, 1, (300, 64)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["words", "ids"], ["a"], name="words"),
        helper.make_node("Transpose", ["words"], ["t"], name="turn", perm=[1, 0]),
        helper.make_node("MatMul", ["a", "t"], ["y"], name="head"),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", "s"])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "s", 300])
    made = helper.make_graph(nodes, "tied", [ids], [output], [numpy_helper.from_array(table, "words")])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    assert transform(model, [Embedding()]).graph.node[0].op_type == "Gather"


@pytest.mark.parametrize("shape", [("rows", INPUTS), (1, "rows", INPUTS)])
def test_spreading_changes_nothing_and_gives_tokens_one_scale(shape: Sequence[str | int]) -> None:
    """Tokens of any size, with a wide channel, of no size at all; and a run of no tokens, as a rare expert has."""
    x = RANDOM.normal(0, 1, (6, INPUTS)).astype(np.float32)
    x[:, 3] *= 50
    x *= np.array([1e-3, 1, 1e3, 1, 1, 0], np.float32)[:, None]
    x = x.reshape((1,) * (len(shape) - 2) + x.shape)
    model = graph(shape)
    model.graph.node.append(helper.make_node("MatMul", ["x", "first_weight_too"], ["z"], name="third"))
    model.graph.initializer.append(numpy_helper.from_array(-FIRST, "first_weight_too"))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [*shape[:-1], INNER]))
    names = ["spread/x/tokens", "spread/x/scale"]
    done = transform(model, [Spread(nodes="first|third", block=32)])
    kinds = [node.op_type for node in done.graph.node]
    assert [kinds.count(kind) for kind in ("ReduceMax", "Div", "MatMul", "Mul")] == [1, 1, 4, 2]
    for name in names:
        done.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = ort.InferenceSession(done.SerializeToString(), providers=["CPUExecutionProvider"])
    y, z, tokens, scale = session.run(["y", "z", *names], {"x": x})
    np.testing.assert_allclose(y, exact(x), atol=2e-3)
    sizes = np.abs(x @ FIRST).max(axis=-1, keepdims=True) + 1e-9
    np.testing.assert_allclose(z / sizes, -x @ FIRST / sizes, atol=1e-4)
    rows = tokens.reshape(6, INPUTS)
    np.testing.assert_allclose(np.abs(rows[:5]).max(axis=-1), 1, rtol=1e-6)
    assert np.square(rows[:5]).mean(axis=-1).min() > 1 / 16  # of a wide channel alone 1 / 64
    assert not rows[5].any()
    sizes = np.square(rows * scale.reshape(6, 1)).sum(axis=-1)
    np.testing.assert_allclose(sizes, np.square(x).sum(axis=-1).ravel(), rtol=1e-4)
    nothing = session.run(["y"], {"x": x[..., :0, :]})[0]
    assert nothing.shape == (*x.shape[:-2], 0, OUTPUTS)


def test_blocks_are_the_largest_that_the_channels_allow() -> None:
    x = RANDOM.normal(0, 1, (3, INPUTS)).astype(np.float32)
    plain = transform(graph(), [Spread(block=1)])
    assert [node.op_type for node in plain.graph.node].count("Reshape") == 0
    np.testing.assert_allclose(run(plain, x), exact(x), atol=1e-4)
    blocks = transform(graph(), [Spread(block=64)])  # 64 and 96 channels
    sizes = {tuple(t.dims) for t in blocks.graph.initializer if t.name.startswith("spread/rotation")}
    assert sizes == {(64, 64), (32, 32)}
    np.testing.assert_allclose(run(blocks, x), exact(x), atol=1e-4)


def test_matmuls_with_a_loud_token_are_left_to_later_passes() -> None:
    """One token of calibration text is 100 times the others."""

    def texts(samples: int, seed: int) -> Feeds:
        x = RANDOM.normal(0, 1, (64, INPUTS)).astype(np.float32)
        x[7] *= 100
        return iter([{"x": x}])

    def spread(loudest: float) -> set[str]:
        done = transform(graph(), [Spread(nodes="first", loudest=loudest)], texts)
        return {node.name for node in done.graph.node if node.op_type == "Div"}

    assert spread(50.0) == set()
    assert len(spread(400.0)) == 1
    with pytest.raises(ModelsFileError, match="a recipe with the pass spread needs calibration text"):
        transform(graph(), [Spread(loudest=50.0)])


def test_an_expert_that_no_text_chose_is_left_to_later_passes() -> None:
    def few(samples: int, seed: int) -> Feeds:
        return iter([{"x": RANDOM.normal(0, 1, (rows, INPUTS)).astype(np.float32)} for rows in (0, 20, 0, 11)])

    left = transform(graph(), [GptqPerChannel(), Groups()], few)
    assert [node.op_type for node in left.graph.node].count("MatMulNBits") == 2
    enough = transform(graph(), [GptqPerChannel(samples=9), Groups()], runs)
    assert [node.op_type for node in enough.graph.node].count("MatMulIntegerToFloat") == 2


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_calibrated_scales_are_close_and_reproducible(method: str) -> None:
    x = np.concatenate([feed["x"] for feed in runs(9, seed=3)])
    models = [transform(graph(), [Static(method=method)], runs) for _ in range(2)]
    assert models[0].SerializeToString() == models[1].SerializeToString()
    assert [node.op_type for node in models[0].graph.node].count("QuantizeLinear") == 2
    found = run(models[0], x)
    np.testing.assert_allclose(found, exact(x), atol=0.2)
    assert np.abs(found - exact(x)).max() > 1e-4
    np.testing.assert_array_equal(run(models[0], x[:1]), found[:1])
    other = transform(graph(), [Static(method=method, seed=5)], runs)
    assert other.SerializeToString() != models[0].SerializeToString()


def test_the_range_of_an_input_is_what_calibration_saw() -> None:
    model = transform(graph(), [Static(samples=8)], runs)
    scales = {t.name: float(numpy_helper.to_array(t)) for t in model.graph.initializer if t.name == "x_scale"}
    seen = np.concatenate([feed["x"].ravel() for feed in runs(8, 0)])
    assert scales["x_scale"] == pytest.approx((seen.max() - seen.min()) / 255, rel=1e-5)


def test_static_needs_calibration_text() -> None:
    with pytest.raises(ValueError, match="needs calibration text"):
        transform(graph(), [Static()])


def test_the_first_pass_that_matches_takes_a_matmul() -> None:
    model = transform(graph(), [Keep(nodes="second"), Groups(bits=8)])
    assert [node.name for node in model.graph.node if node.op_type == "MatMul"] == ["second"]
    x = RANDOM.normal(0, 1, (3, INPUTS)).astype(np.float32)
    assert 0 < np.abs(run(model, x) - exact(x)).max() < 0.05


@pytest.mark.parametrize("steps", [[Groups(nodes="no such")], [Keep(nodes="no"), GroupMinima(nodes="third")]])
def test_a_recipe_that_fits_no_matmul_is_refused(steps: list[Pass]) -> None:
    with pytest.raises(ValueError, match=r"fits no matmul of this architecture; its matmuls are first, second"):
        transform(graph(), steps)


def test_passes_can_be_written_as_they_are_read() -> None:
    steps = [
        Keep(nodes=r"^/a\.0/(b|c)$"),
        Groups(bits=4, zero_points=True),
        Static(method="percentile", percentile=99.5),
    ]
    (recipe,) = recipes.parse(f'[x]\nprecision = "int8"\nencoder = {recipes.as_toml(steps)}\n', "x").values()
    assert list(recipe.passes[recipes.Kind.ENCODER]) == steps
    for built_in in recipes.load().values():
        for kind, passes in built_in.passes.items():
            (again,) = recipes.parse(f"[x]\n{kind} = {recipes.as_toml(passes)}\n", "x").values()
            assert again.passes[kind] == passes


def test_translation_is_made_by_its_own_passes_or_those_for_decoders() -> None:
    own = recipes.parse('[x]\ndecoder = [{ pass = "groups" }]\nseq2seq = []\n', "x")["x"]
    assert own.passes == {recipes.Kind.DECODER: (Groups(),), recipes.Kind.SEQ2SEQ: ()}
    shared = recipes.parse('[x]\ndecoder = [{ pass = "groups" }]\n', "x")["x"]
    assert shared.passes[recipes.Kind.SEQ2SEQ] == (Groups(),)
    assert recipes.Kind.SEQ2SEQ not in recipes.parse("[x]\nencoder = []\n", "x")["x"].passes


def test_a_graph_without_a_cache_stays_as_it_is() -> None:
    before = ir.to_proto(ir.from_proto(graph()))
    assert transform(graph(), [Cache()], None) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('pass = "blocks", block = 64', Groups(group=64)),
        ('pass = "block_minima", block = 16', GroupMinima(group=16)),
        ('pass = "rows"', PerToken()),
        ('pass = "gptq_rows", crest = 5.0', GptqPerChannel(peak_to_rms=5.0)),
        ('pass = "gptq_blocks", block = 64', GptqGroups(group=64)),
        ('pass = "embedding", block = 64', Embedding(group=64)),
    ],
)
def test_names_of_the_last_release_are_known_and_warned_of(
    old: str, new: Pass, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipes.parse(f"[x]\nencoder = [{{ {old} }}]\n", "recipes.toml")["x"]
    assert recipe.passes[recipes.Kind.ENCODER] == (new,)
    warnings = capsys.readouterr().err.splitlines()
    renamed = [*re.findall('"(.*)"', old)][new.__class__ is Embedding :] + re.findall(r"(\w+) = [\d.]", old)
    assert [line.split(": ")[2].split()[0] for line in warnings] == renamed
    assert all(line.endswith(" now, the old name goes away") for line in warnings)


def test_by_product_is_an_alias(capsys: pytest.CaptureFixture[str]) -> None:
    assert Grouping("product") is Grouping.MATMUL
    assert capsys.readouterr().err == (
        "trident-export: --by product is called --by matmul now, the old name goes away\n"
    )
    with pytest.raises(ValueError, match="nonsense"):
        Grouping("nonsense")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]\nencoder = 5", "encoder must be a list of passes, found 5"),
        ("[a]\nencoder = [{ pass = [] }]", "pass must be one of "),
        ("x = 1", r"\[x\] must be a table"),
        ("[x]\nsize = 0.5", "with decoder or seq2seq or encoder among them"),
        ("[x]\nencoder = []\nspeed = 1", "must be a table of precision, size, processors, decoder, seq2seq, encoder"),
        ("[X]\nencoder = []", "lower-case letters"),
        ("[x]\nencoder = []\nsize = 2.0", "size must be a number up to 1.0"),
        ('[x]\nencoder = [{ pass = "magic" }]', r"encoder\[0\]: pass must be one of keep, groups, .*found .*magic"),
        ('[x]\nencoder = [{ pass = "groups", bit = 8 }]', "unknown key bit; known are nodes, bits, group, zero_points"),
        ('[x]\nencoder = [{ pass = "groups", block = 8, group = 8 }]', "unknown key block"),
        ('[x]\nencoder = [{ pass = "groups", bits = "8" }]', "bits must be int, found '8'"),
        ('[x]\nencoder = [{ pass = "groups", bits = 3 }]', "bits must be 4 or 8"),
        ('[x]\nencoder = [{ pass = "static", method = "best" }]', "method must be one of minmax, entropy, percentile"),
        ('[x]\nencoder = [{ pass = "per_token", nodes = "(" }]', r"encoder\[0\]: "),
        ('[x]\ndecoder = [{ pass = "cache" }, { pass = "smooth" }]', "cache must be the last pass"),
        ('[x]\ndecoder = [{ pass = "smooth" }, { pass = "rotate" }]', "rotate must be the first pass"),
        ('[x]\ndecoder = [{ pass = "rotate", nodes = "attn" }]', "rotate is for all matmuls"),
        ('[x]\ndecoder = [{ pass = "gptq_per_channel", margin = 0.0 }]', "margin and peak_to_rms must be more than 0"),
        ('[x]\ndecoder = [{ pass = "gptq_groups", group = 24 }]', "group one of .*24"),
        ('[x]\ndecoder = [{ pass = "gptq_groups", damp = 0.0 }]', "damp must be more than 0"),
        ('[x]\ndecoder = [{ pass = "spread", block = 48 }]', "block must be a power of two, found 48"),
        ('[x]\ndecoder = [{ pass = "spread", loudest = 1.0 }]', "loudest must be more than 1, found 1"),
        ('[x]\ndecoder = [{ pass = "cache", margin = 0.0 }]', "margin must be more than 0"),
        ("[x", "is not TOML"),
        ("x = " + "[" * 100_000, "is not TOML"),
    ],
)
def test_impossible_recipes(text: str, message: str) -> None:
    with pytest.raises(ModelsFileError, match=message):
        recipes.parse(text, "recipes.toml")


def test_recipes_beside_the_models_file_are_known_to_it(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(
        '[e]\ntask = "feature-extraction"\nsource = { path = "x" }\nvariants = ["fp32", "mine"]\n'
        'limits = { dimensions = 8 }\ncalibration = "own.txt"\n'
    )
    built_in = "fp32, fp16, int8, int8_cache, int8_mixed, int8_channels, int8_streams, int4"
    with pytest.raises(ModelsFileError, match=f"must be different ones of {built_in}"):
        models_file.load(tmp_path / "models.toml")
    (tmp_path / "recipes.toml").write_text('[mine]\nprecision = "int8"\nencoder = [{ pass = "per_token" }]\n')
    (spec,) = models_file.load(tmp_path / "models.toml")
    assert spec.recipes["mine"].precision == "int8"
    assert spec.calibration == str(tmp_path / "own.txt")
    # Another recipe of the same name is another model.
    before = spec.as_dict()
    (tmp_path / "recipes.toml").write_text('[mine]\nprecision = "int8"\nencoder = [{ pass = "keep" }]\n')
    assert models_file.load(tmp_path / "models.toml")[0].as_dict() != before


@pytest.mark.parametrize(
    ("task", "variant", "limits", "message"),
    [
        ("text-generation", "fp16", {}, "fp16 makes no sense on device cpu: a CPU would compute it in float32"),
        ("feature-extraction", "fp16", {"dimensions": 8}, "fp16 is for decoder and seq2seq models, this is encoder"),
        ("text-generation", "int8_static", {}, "int8_static is for encoder models, this is decoder"),
        ("text-generation", "dynamic", {"device": "cuda"}, "dynamic makes no sense on device cuda: .* no CUDA kernel"),
    ],
)
def test_nonsense_pairs_are_refused_with_the_reason(
    task: str, variant: str, limits: dict[str, object], message: str
) -> None:
    known = recipes.load() | recipes.parse('[dynamic]\ndecoder = [{ pass = "per_token" }]', "x")
    table = {"task": task, "source": {"path": "x"}, "variants": [variant], "limits": limits}
    with pytest.raises(ModelsFileError, match=rf"\[m\]: variant {message}"):
        models_file.parse("m", table, known)


def test_calibration_texts_are_drawn_by_seed_and_never_those_of_the_gate(tmp_path: Path) -> None:
    packaged = corpora.calibration("", 1000, 0)
    assert len(packaged) > 25
    assert not set(packaged) & set(corpora.held_out())
    assert corpora.calibration("", 8, 3) == corpora.calibration("", 8, 3) != corpora.calibration("", 8, 4)
    own = tmp_path / "own.txt"
    own.write_text("one\nline\n\n\n\ntwo\n")
    assert sorted(corpora.calibration(str(own), 5, 0)) == ["one\nline", "two"]
    own.write_text(" \n\n")
    with pytest.raises(ValueError, match=r"own.txt has no text"):
        corpora.calibration(str(own), 5, 0)
    own.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        corpora.calibration(str(own), 5, 0)
