"""Decoder graphs of many architectures against Hugging Face, with random weights and without a server.

Each graph runs as the engine runs it: several slots at once, chunks, single tokens, drafts, an idle slot. Logits are up
to 20, and the largest difference from Hugging Face was 2e-5; slots one by one and in a batch are compared to the bit.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.conftest import some_slow
from trident_export import recipes
from trident_export.graphs import decoder_passes, editing, rotary
from trident_export.graphs.causal import export_causal_graph, plan_of
from trident_export.graphs.read_rows import compute_read_rows
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.passes import Cache, CalibrationRuns, Feeds, PerToken, calibration
from trident_export.passes.base import matmuls
from trident_export.passes.calibration import moments
from trident_export.passes.gptq import GptqGroups, GptqPerChannel
from trident_export.passes.groups import Groups
from trident_export.passes.rotate import Rotate, has_rotated_heads, is_normed
from trident_export.passes.spread import Spread
from trident_export.tasks.text_generation import inputs_of
from trident_serving.errors import DeviceMissing, DoesNotFit
from trident_serving.generation.batch import SlotTokens
from trident_serving.generation.decoder import OnnxDecoder
from trident_serving.generation.service import plan_memory
from trident_serving.schema.limits import GenerationLimits

VOCABULARY = 128
SHARED: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA: dict[str, Any] = SHARED | {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**LLAMA),
    "llama 3": LlamaConfig(**LLAMA, rope_scaling=LLAMA3_ROPE),
    "llama, dynamic": LlamaConfig(**LLAMA, rope_scaling={"rope_type": "dynamic", "factor": 1.0}),
    "llama, small heads": LlamaConfig(**LLAMA | {"num_attention_heads": 8}),
    "qwen2": Qwen2Config(**LLAMA),
    "qwen3": Qwen3Config(**LLAMA, head_dim=16),
    "mistral": MistralConfig(**LLAMA, sliding_window=8),
    "phi3": Phi3Config(**LLAMA, sliding_window=None),
    "gpt_neox": GPTNeoXConfig(
        **SHARED,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        rotary_pct=0.5,
        max_position_embeddings=64,
    ),
    "gpt2": GPT2Config(**SHARED, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "opt": OPTConfig(
        **SHARED,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    ),
}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    made = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        made[name] = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in made[name].parameters():
                if parameter.ndim > 1:
                    parameter.mul_(6)
                else:  # norms and biases: not the same for every number
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return made


@pytest.fixture(scope="module")
def traced(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {}
    for name, model in models.items():
        paths[name] = tmp_path_factory.mktemp("traced") / "model.onnx"
        editing.save(export_causal_graph(model, positions=64), paths[name])
    return paths


def optimized(traced: dict[str, Path], factory: pytest.TempPathFactory, *, ragged: bool) -> dict[str, Path]:
    paths = {}
    for name, path in traced.items():
        paths[name] = factory.mktemp("graph") / "model.onnx"
        editing.save(decoder_passes.optimize(ir.load(path), ragged=ragged), paths[name])
    return paths


@pytest.fixture(scope="module")
def graphs(traced: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return optimized(traced, tmp_path_factory, ragged=True)


@pytest.fixture(scope="module")
def graphs_for_gpus(traced: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return optimized(traced, tmp_path_factory, ragged=False)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_hugging_face(models: dict[str, Any], graphs: dict[str, Path], name: str) -> None:
    compare_logits(models[name], graphs[name], tolerance=2e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_graph_for_gpus_has_sixteen_inputs_and_the_same_logits(
    models: dict[str, Any], graphs_for_gpus: dict[str, Path], name: str
) -> None:
    graph = onnx.load(str(graphs_for_gpus[name])).graph
    assert "query_seqlens" not in {value.name for value in graph.input}
    attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    assert len(attention) == 2
    assert all(len(node.input) <= 16 for node in attention)
    compare_logits(models[name], graphs_for_gpus[name], tolerance=2e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_rows_of_a_graph_for_gpus_run_together_and_leave_idle_ones_alone(
    models: dict[str, Any], graphs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """With a cache of 8 bits one position suffices on a CPU too, so that slots of one token share runs, as on a GPU."""
    graph = onnx.load(str(graphs[name])).graph

    def runs(samples: int, seed: int) -> Feeds:
        random = np.random.default_rng(seed)
        return iter([inputs_of(graph, random.integers(1, VOCABULARY, 40).tolist()) for _ in range(samples)])

    rounded = recipes.transform(ir.load(graphs[name]), [Cache(samples=32)], runs)
    decoder_passes.drop_query_seqlens(rounded)
    editing.save(rounded, tmp_path / "model.onnx")
    assert compare_logits(models[name], tmp_path / "model.onnx", tolerance=0.2) > 1e-3
    decoder = OnnxDecoder(tmp_path / "model.onnx", slots=3, context=48, longest_run=16, threads=1)
    texts = np.random.default_rng(2).integers(1, VOCABULARY, (3, 20)).tolist()
    expected = [decoder.run([SlotTokens(row, 0, text, 12)]).copy() for row, text in enumerate(texts)]
    for row in range(3):
        decoder.release(row, 0)
    for row, text in enumerate(texts):
        decoder.run([SlotTokens(row, 0, text[:8])])
    # Row 1 is idle between the two others, which write a token each in twelve runs; then it goes on.
    found = [
        decoder.run([SlotTokens(row, at, texts[row][at : at + 1]) for row in (0, 2)]).copy() for at in range(8, 20)
    ]
    np.testing.assert_array_equal(np.stack(found, axis=1), [expected[0], expected[2]])
    np.testing.assert_array_equal(decoder.run([SlotTokens(1, 8, texts[1][8:], 12)]), expected[1])


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_a_token_s_numbers_do_not_depend_on_how_its_prompt_was_cut(graphs: dict[str, Path], name: str) -> None:
    """ONNX Runtime's attention takes 32 positions of these heads at a time: one that is left over must not differ."""
    decoder = OnnxDecoder(graphs[name], slots=1, context=48, longest_run=16, threads=1)
    for seed in range(4):
        text = np.random.default_rng(seed).integers(1, VOCABULARY, 34).tolist()
        for length in (17, 33):
            whole = decoder.run([SlotTokens(0, 0, text[:length])]).copy()
            for cut in (1, 9, length - 2):
                decoder.run([SlotTokens(0, 0, text[:cut])])
                np.testing.assert_array_equal(decoder.run([SlotTokens(0, cut, text[cut:length])]), whole)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox", "llama, per token"])
def test_behind_the_last_attention_only_wanted_tokens_are_computed(
    graphs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """To the last bit what the whole graph gives, whatever is wanted: nothing, one token, all."""
    whole = ir.load(graphs[name.partition(",")[0]])
    if "per token" in name:
        recipes.transform(whole, [PerToken()])
    editing.save(whole, tmp_path / "whole.onnx")
    less = ir.load(tmp_path / "whole.onnx")
    assert compute_read_rows(less) >= 6  # norms, residuals, activation and matmuls
    editing.save(less, tmp_path / "less.onnx")
    decoders = [
        OnnxDecoder(tmp_path / f"{kind}.onnx", slots=3, context=48, longest_run=16, threads=1)
        for kind in ("whole", "less")
    ]
    texts = np.random.default_rng(3).integers(1, VOCABULARY, (3, 30)).tolist()
    runs = [
        [SlotTokens(0, 0, texts[0][:16], 0), SlotTokens(1, 0, texts[1][:9], 0)],
        [SlotTokens(0, 16, texts[0][16:24], 1), SlotTokens(1, 9, texts[1][9:10], 0), SlotTokens(2, 0, texts[2][:5], 5)],
        [SlotTokens(row, at, texts[row][at : at + 1]) for row, at in enumerate((24, 10, 5))],
    ]
    for items in runs:
        expected, found = (decoder.run(items).copy() for decoder in decoders)
        np.testing.assert_array_equal(found, expected)
        assert len(found) == sum(item.wanted for item in items)
    *_, down, _ = (node for node in less.graph if node.op_type in ("MatMul", "Gemm", "MatMulIntegerToFloat"))
    feed = inputs_of(onnx.load(str(tmp_path / "less.onnx")).graph, texts[0])
    (values,) = calibration.watch(less, [down.outputs[0].name], iter([feed]))
    assert values[down.outputs[0].name].shape[-2] == 1  # of 30 tokens one is wanted


def test_a_graph_whose_wanted_tokens_are_chosen_elsewhere_stays_as_it_is(graphs: dict[str, Path]) -> None:
    model = ir.load(graphs["llama"])
    chosen = next(value for value in model.graph.inputs if value.name == "logits_tokens")
    (choice,) = chosen.consumers()
    choice.attributes["axis"] = ir.AttrInt64("axis", 0)
    nodes = [node.name for node in model.graph]
    assert compute_read_rows(model) == 0
    assert [node.name for node in model.graph] == nodes


def compare_logits(model: Any, graph: Path, tolerance: float) -> float:
    """The largest difference from Hugging Face; a token has the numbers that it has alone, whatever runs with it."""
    random = np.random.default_rng(0)
    lengths = [17, 40, 9]
    texts = [random.integers(1, VOCABULARY, length).tolist() for length in lengths]
    decoder = OnnxDecoder(graph, slots=5, context=48, longest_run=16, threads=1)
    largest = 0.0
    found = [[] for _ in texts]  # type: ignore[var-annotated]
    position = [0, 0, 0]
    # Rows 0, 1 and 4 with pieces of different sizes; rows 2 and 3 are idle.
    while any(position[i] < lengths[i] for i in range(3)):
        items = []
        for index, row in enumerate((4, 0, 1)):
            piece = texts[index][position[index] :][: random.choice([1, 1, 2, 5, 16])]
            if piece:
                items.append(SlotTokens(row, position[index], piece, len(piece)))
                position[index] += len(piece)
        logits, begin = decoder.run(items), 0
        for item in items:
            index = (4, 0, 1).index(item.slot)
            found[index].append(logits[begin : begin + item.wanted].copy())
            begin += item.wanted
    for index, text in enumerate(texts):
        with torch.inference_mode():
            expected = model(torch.tensor([text])).logits[0].numpy()
        assert np.abs(expected).max() > 1.0
        largest = max(largest, float(np.abs(np.concatenate(found[index]) - expected).max()))
        alone = decoder.run([SlotTokens(3, 0, text[:16], len(text[:16]))])
        np.testing.assert_array_equal(np.concatenate(found[index])[: len(alone)], alone)
    assert largest < tolerance
    return largest


@pytest.mark.parametrize("name", ["llama", "llama, small heads", "qwen3", "mistral", "gpt2"])
def test_a_cache_of_eight_bits(models: dict[str, Any], graphs: dict[str, Path], tmp_path: Path, name: str) -> None:
    """One position for a token is enough for the same numbers, and a quarter of the memory."""
    graph = onnx.load(str(graphs[name]), load_external_data=False).graph
    asked = []

    def runs(samples: int, seed: int) -> Feeds:
        random = np.random.default_rng(seed)
        asked.append(samples)
        return iter([inputs_of(graph, random.integers(1, VOCABULARY, 40).tolist()) for _ in range(samples)])

    editing.save(recipes.transform(ir.load(graphs[name]), [Cache(samples=32)], runs), tmp_path / "model.onnx")
    assert asked == [32]
    before, after = (
        OnnxDecoder(path, slots=2, context=48, longest_run=16, threads=1)
        for path in (graphs[name], tmp_path / "model.onnx")
    )
    assert before.cache.bytes_per_token == 4 * after.cache.bytes_per_token
    difference = compare_logits(models[name], tmp_path / "model.onnx", tolerance=0.2)
    assert difference > 1e-3


def test_a_cache_that_clips_is_far_off(models: dict[str, Any], graphs: dict[str, Path], tmp_path: Path) -> None:
    graph = onnx.load(str(graphs["llama"]), load_external_data=False).graph

    def runs(samples: int, seed: int) -> Feeds:
        return iter([inputs_of(graph, list(range(1, 41)))] * samples)

    clipped = recipes.transform(ir.load(graphs["llama"]), [Cache(margin=0.1, samples=1)], runs)
    editing.save(clipped, tmp_path / "model.onnx")
    with pytest.raises(AssertionError, match="< 0.2"):
        compare_logits(models["llama"], tmp_path / "model.onnx", tolerance=0.2)


EVEN = [Rotate(heads=True), Spread(block=16, norms=True)]
EVERY_MATMUL = ["llama", "qwen2", "qwen3", "gpt2", "opt", "gpt_neox"]
# Those whose values are the last columns of a matmul, or all of one.
ROTATED_HEADS = {"llama", "llama 3", "llama, dynamic", "llama, small heads", "qwen2", "qwen3", "mistral"}


@pytest.mark.parametrize("name", some_slow(CONFIGS, CONFIGS.keys() - {"llama", "qwen3", "gpt2"}))
def test_every_family_with_even_inputs_computes_the_same(
    models: dict[str, Any], graphs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Where norms can't be folded, too; what is rotated when the graph runs is what no weight can be rotated for."""
    before = ir.load(graphs[name])
    chosen = matmuls(before)
    even = recipes.transform(before, EVEN)
    rotated = [node for node in even.graph if has_rotated_heads(node)]
    assert len(rotated) == (2 if name in ROTATED_HEADS else 0)
    kinds = Counter(node.op_type for node in even.graph if node.name.startswith("spread/"))
    inputs = {node.inputs[0] for node in even.graph if node.name in chosen}
    divided = [node for node in even.graph if node.name.startswith("spread/") and node.op_type == "Div"]
    normed = [node for node in divided if is_normed(node.inputs[0])]
    assert kinds["MatMul"] + len(normed) + len(rotated) == len(divided) == len(inputs)
    assert bool(normed) == ("rotate/ones" in even.graph.initializers)
    editing.save(even, tmp_path / "model.onnx")
    compare_logits(models[name], tmp_path / "model.onnx", tolerance=2e-4)


@pytest.mark.parametrize("name", some_slow(EVERY_MATMUL, {"qwen2", "qwen3", "opt", "gpt_neox"}))
def test_every_matmul_with_per_channel_weights(
    models: dict[str, Any], graphs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """And a token has the numbers that it has alone, to the last bit."""
    graph = ir.load(graphs[name])
    count = len(matmuls(graph))
    passes = [*EVEN, GptqPerChannel(samples=32)]
    done = recipes.transform(graph, passes, random_runs(graphs[name]))
    kinds = Counter(node.op_type for node in done.graph)
    assert kinds["MatMulIntegerToFloat"] == count
    assert kinds["QuantizeLinear"] == len({n.inputs[0] for n in done.graph if n.op_type == "MatMulIntegerToFloat"})
    for node in done.graph:
        if node.op_type == "MatMulIntegerToFloat":  # pairs that AVX2 adds in sixteen bits
            weight = editing.array(node.inputs[1]).astype(np.int32)
            pairs = np.pad(weight, ((0, len(weight) % 2), (0, 0))).reshape(-1, 2, weight.shape[1])
            assert np.abs(pairs.sum(axis=1)).max() <= 128
    editing.save(done, tmp_path / "model.onnx")
    assert compare_logits(models[name], tmp_path / "model.onnx", tolerance=0.5) > 1e-3


def random_runs(path: Path) -> CalibrationRuns:
    graph = onnx.load(str(path), load_external_data=False).graph

    def runs(samples: int, seed: int) -> Feeds:
        random = np.random.default_rng(seed)
        texts = random.integers(1, VOCABULARY, (samples, 40)).tolist()
        return iter([inputs_of(graph, *texts[start : start + 4]) for start in range(0, samples, 4)])

    return runs


def with_wide_channel(model: ir.Model) -> ir.Model:
    """The graph with one channel that is five hundred times as large as the others in the residual stream."""
    table = next(node.inputs[0] for node in model.graph if node.op_type == "Gather")
    value = editing.array(table).copy()
    value[:, 5] *= 500
    editing.store(table, value)
    return model


@pytest.mark.parametrize("name", ["llama", "llama 3", "qwen2", "qwen3", "mistral", "phi3"])
def test_a_rotated_graph_computes_the_same(
    models: dict[str, Any], graphs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    before = ir.load(graphs[name])
    weights = {weight: value.const_value.tobytes() for weight, value in before.graph.initializers.items()}
    rotated = recipes.transform(before, [Rotate()])
    after = rotated.graph.initializers.values()
    same = [value for value in after if weights.get(value.name) == value.const_value.tobytes()]
    assert not any(len(value.shape) == 2 and VOCABULARY in value.shape for value in same)  # table and head
    editing.save(rotated, tmp_path / "model.onnx")
    compare_logits(models[name], tmp_path / "model.onnx", tolerance=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox"])
def test_a_graph_that_does_not_turn_is_left(graphs: dict[str, Path], name: str) -> None:
    before = ir.load(graphs[name])
    matmuls(before)
    expected = editing.message(before)
    assert editing.message(recipes.transform(before, [Rotate()])) == expected


def test_a_rotation_spreads_a_wide_channel(graphs: dict[str, Path]) -> None:
    def peak_to_rms(model: ir.Model) -> float:
        runs = random_runs(graphs["llama"])
        return max(seen.peak / seen.root_mean_square for _, seen in moments(model, norms(model), lambda: runs(8, 0)))

    wide = with_wide_channel(ir.load(graphs["llama"]))
    assert peak_to_rms(wide) > 7.5
    assert peak_to_rms(recipes.transform(wide, [Rotate()])) < 5


def norms(model: ir.Model) -> dict[str, int]:
    """Outputs of all norms, with the number of channels."""
    return {node.outputs[0].name: 64 for node in model.graph if "LayerNormalization" in node.op_type}


def test_moments_do_not_depend_on_how_many_fit_into_memory(
    graphs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ir.load(graphs["llama"])
    channels = norms(model)
    runs = random_runs(graphs["llama"])
    together = dict(moments(model, channels, lambda: runs(8, 0)))
    monkeypatch.setattr(calibration, "_GRAM_BYTES", 2 * 4 * 64**2)  # two of five at once
    apart = dict(moments(model, channels, lambda: runs(8, 0)))
    assert list(apart) == list(together) == list(channels)
    for name, seen in together.items():
        np.testing.assert_array_equal(apart[name].gram, seen.gram)
        assert (apart[name].rows, apart[name].peak) == (seen.rows, seen.peak)
        assert seen.rows == 8 * 40


def test_rows_with_one_scale_are_for_narrow_activations(
    models: dict[str, Any], graphs: dict[str, Path], tmp_path: Path
) -> None:
    """Those behind a norm of a wide channel are left to the next pass; of a rotated graph they are taken, and close."""

    def kinds(model: ir.Model) -> Counter[str]:
        return Counter(node.op_type for node in model.graph)

    matmuls = GptqPerChannel(nodes="gate_up_proj|lm_head", samples=32)
    graph = ir.load(graphs["llama"])
    runs = random_runs(graphs["llama"])
    left = kinds(recipes.transform(with_wide_channel(graph), [matmuls, Groups(group=16)], runs))
    assert left["MatMulIntegerToFloat"] == 0
    assert left["MatMulNBits"] == 9
    taken = recipes.transform(ir.load(graphs["llama"]), [Rotate(), matmuls, Groups(group=16)], runs)
    assert kinds(taken)["MatMulIntegerToFloat"] == kinds(taken)["QuantizeLinear"] == 3
    assert kinds(taken)["MatMulNBits"] == 6
    editing.save(taken, tmp_path / "model.onnx")
    assert compare_logits(models["llama"], tmp_path / "model.onnx", tolerance=0.5) > 1e-3


def test_rows_with_one_scale_that_clip_are_far_off(
    models: dict[str, Any], graphs: dict[str, Path], tmp_path: Path
) -> None:
    graph = ir.load(graphs["llama"])
    passes = [Rotate(), GptqPerChannel(nodes="gate_up_proj|lm_head", samples=32, margin=0.1)]
    editing.save(recipes.transform(graph, passes, random_runs(graphs["llama"])), tmp_path / "model.onnx")
    with pytest.raises(AssertionError, match="< 0.5"):
        compare_logits(models["llama"], tmp_path / "model.onnx", tolerance=0.5)


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.3), (4, 4.0)])
def test_groups_rounded_by_gptq(
    models: dict[str, Any], graphs: dict[str, Path], tmp_path: Path, bits: int, tolerance: float
) -> None:
    """`down_proj` has 48 channels, which are no whole number of groups of 32."""
    graph = ir.load(graphs["llama"])
    runs = random_runs(graphs["llama"])
    editing.save(recipes.transform(graph, [GptqGroups(bits=bits, samples=32)], runs), tmp_path / "model.onnx")
    difference = compare_logits(models["llama"], tmp_path / "model.onnx", tolerance=tolerance)
    editing.save(recipes.transform(ir.load(graphs["llama"]), [Groups(bits=bits)]), tmp_path / "plain.onnx")
    plain = compare_logits(models["llama"], tmp_path / "plain.onnx", tolerance=2 * tolerance)
    assert 1e-3 < difference < 1.5 * plain


FUSED_ROTARY = {"llama", "llama 3", "llama, dynamic", "qwen2", "qwen3", "mistral", "phi3", "gpt_neox"}
PACKED = {"llama", "llama 3", "llama, dynamic", "qwen2", "mistral"}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_fused(graphs: dict[str, Path], name: str) -> None:
    graph = onnx.load(str(graphs[name])).graph
    attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    assert len(attention) == 2
    for node in attention:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        assert attributes["do_rotary"] == (name in FUSED_ROTARY)
        assert (node.input[1] == "") == (name in PACKED)
        assert node.input[16] == "query_seqlens"
    if name in PACKED:
        counts = Counter(node.op_type for node in graph.node)
        # Queries, keys and values; output; gate and up; down; the head.
        assert counts["MatMul"] == 2 * 4 + 1
        assert counts["SkipSimplifiedLayerNormalization"] + counts["SimplifiedLayerNormalization"] == 5
        assert counts["Cast"] == counts["Transpose"] == 0


@pytest.mark.parametrize("generation", [4, 5])
@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_folders_of_both_generations_of_transformers(tmp_path: Path, generation: int, factor: float) -> None:
    """Version 5 writes base and scaling as `rope_parameters`; the graph's tables are those of the formula."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        config.pop(key, None)
    scaling = {"rope_type": "linear", "factor": factor} if factor > 1 else None
    if generation == 5:
        config |= {"transformers_version": "5.3.0", "dtype": "float32"}
        config["rope_parameters"] = {"rope_type": "default", **(scaling or {}), "rope_theta": 500000.0}
    else:
        config |= {"transformers_version": "4.57.6", "torch_dtype": "float32", "rope_theta": 500000.0}
        config["rope_scaling"] = scaling
    file.write_text(json.dumps(config))
    graph = export_causal_graph(HuggingFaceFolder(tmp_path).load(AutoModelForCausalLM), positions=64).graph
    steps = np.arange(0, 16, 2) / 16
    angles = np.arange(64)[:, None] / factor * 500000.0 ** -steps[None]
    np.testing.assert_allclose(editing.array(graph.initializers["cos_cache"])[:64], np.cos(angles), atol=2e-6)
    np.testing.assert_allclose(editing.array(graph.initializers["sin_cache"])[:64], np.sin(angles), atol=2e-6)


def test_a_rotation_of_another_kind_is_left_in_the_graph(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.models.llama.modeling_llama as module

    def interleaved(query, key, cos, sin, position_ids=None, unsqueeze_dim=1):  # type: ignore[no-untyped-def]
        def turned(x):  # type: ignore[no-untyped-def]
            return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return query * cos + turned(query) * sin, key * cos + turned(key) * sin

    model = models["llama"]
    original = module.apply_rotary_pos_emb
    rotations = [layer.operator.rotation for layer in plan_of(model, 64).layers if layer.operator]
    assert [(r.cos.shape, r.interleaved) for r in rotations if r] == [((64, 8), False)] * 2
    assert module.apply_rotary_pos_emb is original
    places = torch.arange(4)
    with rotary.left_to_operator(model, {0}):
        assert module.apply_rotary_pos_emb is not original
        model(places[None])  # in each run the first layer's call, and no other, hands on what it gets
        heads = torch.ones(1, 1, 4, 16)
        assert module.apply_rotary_pos_emb(heads, heads, heads[0] * 2, heads[0])[0] is not heads
    assert module.apply_rotary_pos_emb is original
    monkeypatch.setattr(module, "apply_rotary_pos_emb", interleaved)
    assert [layer.operator.rotation for layer in plan_of(model, 64).layers if layer.operator] == [None, None]
    assert module.apply_rotary_pos_emb is interleaved


HAS_CUDA = "CUDAExecutionProvider" in ort.get_available_providers()


@pytest.fixture(scope="module")
def half(graphs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("half") / "model.onnx"
    recipes.apply(recipes.load()["fp16"], recipes.Kind.DECODER, graphs["llama"], path)
    return path


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_CUDA, reason="no GPU"))]
)
def test_half_precision(models: dict[str, Any], half: Path, device: str) -> None:
    """The logits are up to 20, and float16 keeps 11 bits of every number on the way."""
    decoder = OnnxDecoder(half, slots=3, context=48, longest_run=16, threads=1, device=device)
    assert decoder.cache.dtype == np.float16
    text = np.random.default_rng(1).integers(1, VOCABULARY, 20).tolist()
    first = decoder.run([SlotTokens(0, 0, text[:16], 16)]).copy()
    rest = [decoder.run([SlotTokens(0, start, text[start : start + 1])])[0].copy() for start in range(16, 20)]
    with torch.inference_mode():
        expected = models["llama"](torch.tensor([text])).logits[0].numpy()
    np.testing.assert_allclose(np.concatenate([first, rest]), expected, atol=0.2)
    assert first.dtype == np.float32


@pytest.mark.skipif(HAS_CUDA, reason="this machine has the provider")
def test_a_device_that_is_missing_is_named(half: Path) -> None:
    with pytest.raises(DeviceMissing, match="device is 'cuda', but this onnxruntime .* install onnxruntime-gpu"):
        OnnxDecoder(half, slots=2, context=32, longest_run=16, threads=1, device="cuda")


def settings(**more: Any) -> GenerationLimits:
    values: dict[str, Any] = {
        "context": 48,
        "slots": 4,
        "kv_cache_mib": 0,
        "prefill_chunk": 16,
        "max_waiting": 4,
        "timeout": 60,
    }
    values |= {"default_max_tokens": 8, "prefix_reuse": True, "prompt_lookup": True, "threads": 1, "device": "cpu"}
    return GenerationLimits(**values | more)


def test_memory_is_planned(graphs: dict[str, Path]) -> None:
    decoder = OnnxDecoder(graphs["llama"], slots=4, context=48, longest_run=16, threads=1)
    each = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, numbers, bytes
    needs = plan_memory(settings(), decoder, weights=3 * 2**20, available=2**30)
    assert (needs.bytes_per_token, needs.cache_tokens, needs.cache) == (each, 4 * 48, each * 4 * 48)
    assert str(needs) == f"3 MiB of weights + 0 MiB of KV cache (192 tokens of {each} bytes) + 0 MiB of logits = 3 MiB"
    long = OnnxDecoder(graphs["llama"], slots=64, context=32768, longest_run=16, threads=1)
    wide = settings(slots=64, context=32768)
    assert plan_memory(wide, long, 0, 2**31).cache == 2**30
    assert plan_memory(settings(slots=64, context=32768, kv_cache_mib=32), long, 0, 2**31).cache_tokens == 65536
    with pytest.raises(DoesNotFit, match=r"1024 MiB of KV cache .* the 512 MiB that are available: set kv_cache_mib"):
        plan_memory(wide, long, 0, 2**29)
    with pytest.raises(DoesNotFit, match="kv_cache_mib is 8, but one context of 32768 tokens takes 16 MiB"):
        plan_memory(settings(slots=64, context=32768, kv_cache_mib=8), long, 0, 2**31)
