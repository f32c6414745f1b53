"""Decoder graphs of families whose attention, rotation or experts are not Llama's, against Hugging Face.

`make families` does the same with every type; here are those that take a way of their own. As in `test_decoder_graphs`,
slots run in company, in chunks and token by token, over texts of up to 40 tokens: beyond windows and chunks of 8.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    DeepseekV3Config,
    DeepseekV32Config,
    Gemma3TextConfig,
    GPTNeoConfig,
    GptOssConfig,
    JetMoeConfig,
    Llama4TextConfig,
    LlamaConfig,
    MiniMaxConfig,
    MixtralConfig,
    OpenAIGPTConfig,
    PretrainedConfig,
    RoFormerConfig,
    RwkvConfig,
    SmolLM3Config,
)

from tests.conftest import some_slow
from tests.integration.test_decoder_graphs import LLAMA, SHARED, VOCABULARY, compare_logits, random_runs
from trident_export import recipes
from trident_export.errors import ModelsFileError, UnsupportedArchitecture
from trident_export.graphs import decoder_passes, editing, rotary
from trident_export.graphs.causal import export_causal_graph, plan_of
from trident_export.graphs.slot_attention import Slots, window_of
from trident_export.graphs.tracing import running
from trident_export.passes import Cache
from trident_export.passes.base import matmuls
from trident_export.passes.groups import Groups
from trident_serving.generation.batch import SlotTokens
from trident_serving.generation.decoder import OnnxDecoder

EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
CONFIGS: dict[str, PretrainedConfig] = {
    # Four experts in every layer.
    "mixtral": MixtralConfig(**LLAMA, **EXPERTS),
    # A number for each head that its softmax counts, windows in every other layer, biases of experts.
    "gpt_oss": GptOssConfig(**LLAMA, **EXPERTS, head_dim=16, sliding_window=8),
    # Keys of 24 numbers, values of 12: latent attention. One dense layer, one of experts that are chosen in groups.
    "deepseek_v3": DeepseekV3Config(
        **LLAMA | {"num_key_value_heads": 4},
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    # Complex numbers, chunks instead of a window, one expert a token, a layer without rotation.
    "llama4": Llama4TextConfig(
        **LLAMA | EXPERTS | {"num_experts_per_tok": 1},
        head_dim=16,
        attention_chunk_size=8,
        no_rope_layers=[1, 0],
        intermediate_size_mlp=48,
    ),
    # Two kinds of frequencies, one for layers with a window.
    "gemma3": Gemma3TextConfig(
        **LLAMA, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "smollm3": SmolLM3Config(**LLAMA, no_rope_layers=[1, 0]),
    # Rotation of neighbours.
    "cohere2": Cohere2Config(
        **LLAMA, logit_scale=1.0, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "llama, heads of 12": LlamaConfig(**LLAMA, head_dim=12),
    # ALiBi; outside transformers' attention interface.
    "bloom": BloomConfig(**SHARED, hidden_size=32, n_layer=2, n_head=4),
    "gpt_neo": GPTNeoConfig(
        **SHARED,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
    ),
    # Each query attends to the eight keys that another, smaller attention chooses.
    "deepseek_v32": DeepseekV32Config(
        **LLAMA | {"num_key_value_heads": 4},
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        index_topk=8,
        index_n_heads=8,
        index_head_dim=16,
    ),
    # Linear attention in a way of its own, then attention.
    "minimax": MiniMaxConfig(
        **LLAMA | EXPERTS, head_dim=16, layer_types=["linear_attention", "full_attention"], block_size=16
    ),
    # Experts for queries and outputs, too.
    "jetmoe": JetMoeConfig(**LLAMA | EXPERTS, kv_channels=16),
    # It knows no cache.
    "openai-gpt": OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    # Rotation by a table of positions, outside transformers' attention interface.
    "roformer": RoFormerConfig(**LLAMA, embedding_size=32, is_decoder=True),
}
# Of each layer's operator: window, whether it rotates, whether it has sinks. None: plain operators.
OPERATORS: dict[str, list[tuple[int, bool, bool] | None]] = {
    "mixtral": [(-1, True, False)] * 2,
    "gpt_oss": [(8, False, True), (-1, False, True)],
    "deepseek_v3": [None, None],
    "llama4": [None, (-1, False, False)],
    "gemma3": [(8, True, False), (-1, True, False)],
    "smollm3": [(-1, True, False), (-1, False, False)],
    "cohere2": [(8, True, False), (-1, False, False)],
    "llama, heads of 12": [None, None],
    "bloom": [None, None],
    "gpt_neo": [(-1, False, False), (8, False, False)],
    "deepseek_v32": [None, None],
    "minimax": [(-1, True, False), None],
    "jetmoe": [(-1, False, False)] * 2,
    "openai-gpt": [(-1, False, False)] * 2,
    "roformer": [None, None],
}


def make(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def write(model: Any, path: Path, *, ragged: bool = True) -> None:
    editing.save(decoder_passes.optimize(export_causal_graph(model, positions=64), ragged=ragged), path)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: make(config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def graphs(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {}
    for name, model in models.items():
        paths[name] = tmp_path_factory.mktemp("family") / "model.onnx"
        write(model, paths[name])
    return paths


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_hugging_face(models: dict[str, Any], graphs: dict[str, Path], name: str) -> None:
    compare_logits(models[name], graphs[name], tolerance=5e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_operator_does(models: dict[str, Any], graphs: dict[str, Path], name: str) -> None:
    found: dict[int, tuple[int, bool, bool]] = {}
    for node in onnx.load(str(graphs[name]), load_external_data=False).graph.node:
        if node.op_type == "GroupQueryAttention":
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            layer = int(node.input[3].split(".")[1])
            found[layer] = (attributes["local_window_size"], bool(attributes["do_rotary"]), bool(node.input[11]))
            assert attributes["rotary_interleaved"] == (name == "cohere2" and attributes["do_rotary"])
    assert [found.get(layer) for layer in range(2)] == OPERATORS[name]


@pytest.mark.parametrize("name", ["deepseek_v3", "llama4", "bloom", "deepseek_v32"])
def test_the_capacity_of_a_cache_changes_no_bit(graphs: dict[str, Path], name: str) -> None:
    """Attention by plain operators runs over more keys where a slot of the run is longer."""
    text = np.random.default_rng(0).integers(1, VOCABULARY, 40).tolist()
    long = np.random.default_rng(1).integers(1, VOCABULARY, 600).tolist()
    small = OnnxDecoder(graphs[name], slots=2, context=48, longest_run=40, threads=1)
    large = OnnxDecoder(graphs[name], slots=2, context=700, longest_run=600, threads=1)
    assert (small.cache.capacity, large.cache.capacity) == (256, 1536)
    expected = small.run([SlotTokens(0, 0, text[:30], 30)]).copy()
    found = large.run([SlotTokens(0, 0, long, 1), SlotTokens(1, 0, text[:30], 30)])
    np.testing.assert_array_equal(found[1:], expected)
    for at in range(30, 40):
        expected = small.run([SlotTokens(0, at, text[at : at + 1])]).copy()
        found = large.run([SlotTokens(0, at + 570, text[at : at + 1]), SlotTokens(1, at, text[at : at + 1])])
        np.testing.assert_array_equal(found[1:], expected)


def test_a_choice_of_more_keys_than_the_traced_run_has(tmp_path: Path) -> None:
    """300 of the keys that there are: all 256 of a short slot's, 300 of the 512 of a longer one's."""
    config = CONFIGS["deepseek_v32"].to_dict() | {"index_topk": 300, "max_position_embeddings": 512}
    model, path = make(DeepseekV32Config(**config)), tmp_path / "model.onnx"
    editing.save(decoder_passes.optimize(export_causal_graph(model, positions=512)), path)
    decoder = OnnxDecoder(path, slots=2, context=512, longest_run=310, threads=1)
    text = np.random.default_rng(0).integers(1, VOCABULARY, 310).tolist()
    for length in (20, 310):
        found = torch.from_numpy(decoder.run([SlotTokens(0, 0, text[:length], length)]).copy())
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([text[:length]]), use_cache=False).logits[0]
        torch.testing.assert_close(found, expected, atol=5e-4, rtol=0)


@pytest.mark.parametrize(("name", "experts"), [("mixtral", 16), ("gpt_oss", 16), ("deepseek_v3", 8), ("llama4", 16)])
def test_every_expert_is_in_the_graph_and_is_quantized(graphs: dict[str, Path], name: str, experts: int) -> None:
    """Two matmuls an expert, whatever the traced tokens chose, and passes take them as any other."""

    def of_experts(model: ir.Model) -> list[ir.Node]:
        return [
            node
            for node in model.graph
            if "mlp/experts" in node.name.replace("feed_forward", "mlp") and "MatMul" in node.op_type
        ]

    before = of_experts(ir.load(graphs[name]))
    assert len(before) == experts
    assert len({node.inputs[1].name for node in before}) == experts
    quantized = of_experts(recipes.transform(ir.load(graphs[name]), [Groups(bits=4)]))
    assert [node.op_type for node in quantized] == ["MatMulNBits"] * experts


@pytest.mark.parametrize(
    "name", some_slow(["mixtral", "gpt_oss", "deepseek_v3", "llama4"], {"gpt_oss", "deepseek_v3", "llama4"})
)
def test_experts_with_per_channel_weights(
    models: dict[str, Any], graphs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """An expert may get no token of a run, and who chooses the experts is not rounded."""
    graph = ir.load(graphs[name])
    chosen = set(matmuls(graph))
    steps = recipes.load()["int8_channels"].passes[recipes.Kind.DECODER]
    done = recipes.transform(graph, steps, random_runs(graphs[name]))
    kinds = {node.name: node.op_type for node in done.graph}
    floats = {name for name in chosen if kinds.get(name) == "MatMul"}
    assert floats == {name for name in chosen if re.search("router|/gate/", name)} != set()
    assert list(kinds.values()).count("MatMulIntegerToFloat") > len(chosen) / 2
    editing.save(done, tmp_path / "model.onnx")
    # What is rounded before a router can choose another expert for a token, which is no small difference.
    assert compare_logits(models[name], tmp_path / "model.onnx", tolerance=4.0) > 1e-3


def test_a_graph_for_gpus_knows_no_numbers_of_queries(models: dict[str, Any], tmp_path: Path) -> None:
    """Neither the operator's nor the plain operators': slots of a run are then of one width."""
    path = tmp_path / "model.onnx"
    write(models["llama4"], path, ragged=False)
    assert "query_seqlens" not in {value.name for value in ir.load(path).graph.inputs}
    compare_logits(models["llama4"], path, tolerance=5e-4)


def test_a_rounded_cache_is_refused_where_a_layer_lacks_the_operator(graphs: dict[str, Path]) -> None:
    with pytest.raises(ModelsFileError, match="layers whose attention .* leave out variants with the pass 'cache'"):
        recipes.transform(ir.load(graphs["llama4"]), [Cache(samples=1)])


def test_a_model_without_a_cache_is_refused() -> None:
    model = make(RwkvConfig(**SHARED, hidden_size=32, num_hidden_layers=2, context_length=64))
    with pytest.raises(UnsupportedArchitecture, match="RwkvForCausalLM is not supported: .*: choose another model"):
        export_causal_graph(model, positions=64)


def test_experts_that_run_in_a_way_of_their_own_are_refused() -> None:
    class OddExperts(nn.Module):
        pass

    model = make(CONFIGS["smollm3"])
    model.model.layers[0].mlp.experts = OddExperts()
    with pytest.raises(UnsupportedArchitecture, match=r"runs its experts \(OddExperts\)"):
        export_causal_graph(model, positions=64)


def test_a_first_run_finds_a_mistake(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(self: Slots, present: torch.Tensor) -> torch.Tensor:
        return present[:, :, : self.keys].roll(1, 2)

    monkeypatch.setattr(Slots, "seen", shifted)
    with pytest.raises(UnsupportedArchitecture, match="its logits are .* standard deviations off"):
        plan_of(models["smollm3"], positions=64)


def test_experts_and_interfaces_are_as_they_were(models: dict[str, Any], graphs: dict[str, Path]) -> None:
    """An export leaves the model usable: the gate compares with it."""
    for model in models.values():
        assert model.config._attn_implementation == "eager"
        assert not any("forward" in vars(module) for module in model.modules())
    names = {name for name, _ in models["mixtral"].named_parameters()}
    assert not any("each_" in name for name in names)


def test_windows_are_read_from_masks() -> None:
    def chunked(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (key // 8 == query // 8)

    assert window_of(lambda b, h, q, k: k <= q, 64) == -1
    assert window_of(lambda b, h, q, k: (k <= q) & (k > q - 8), 64) == 8
    assert window_of(lambda b, h, q, k: (k <= q) & (k > q - 64), 64) == -1
    assert window_of(lambda b, h, q, k: (k > q - 8) & (k < q + 8), 64) is None
    assert window_of(chunked, 64) is None
    assert window_of(chunked, 8) == -1


def test_frequencies_that_change_with_the_length_have_a_longest_context(tmp_path: Path) -> None:
    """Up to it a Llama of dynamic scaling is exact, in the cache of any slot."""
    rope: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = make(LlamaConfig(**LLAMA, rope_parameters=rope | {"original_max_position_embeddings": 40}))
    assert rotary.longest_context(model) == 40
    path = tmp_path / "model.onnx"
    write(model, path)
    compare_logits(model, path, tolerance=5e-4)  # of 40 tokens at most
    assert rotary.longest_context(make(CONFIGS["smollm3"])) is None


def test_what_a_library_says_is_logged_and_not_said(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UnsupportedArchitecture) as raised, running("a Model"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert str(raised.value) == (
        "a Model can't be traced to a graph: its code does there what Trident does not know (--verbose shows its "
        "library's words): choose another model"
    )
    assert "mat1 and mat2 shapes cannot be multiplied" in caplog.text
