"""Models whose layers keep states beside keys and values, against Hugging Face's eager code: random weights, no server.

Each runs as the engine runs it: several slots at once, chunks, single tokens, idle slots, slots that are used again.
Logits are up to 5, and the largest difference from Hugging Face was 5e-5; in company and alone they are compared to the
bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, RecurrentGemmaConfig

from tests.tiny_models import HYBRIDS, hybrid_config
from trident_export import recipes
from trident_export.errors import ModelsFileError, UnsupportedArchitecture
from trident_export.graphs import decoder_passes, editing
from trident_export.graphs.causal import export_causal_graph
from trident_export.graphs.states import EXAMPLE, Places, States
from trident_export.passes import Feeds
from trident_export.tasks.text_generation import check_device, inputs_of
from trident_serving.errors import DeviceMissing, DoesNotFit
from trident_serving.generation.batch import SlotTokens
from trident_serving.generation.decoder import OnnxDecoder, StatesLost, run_each
from trident_serving.generation.service import plan_memory
from trident_serving.schema.limits import GenerationLimits

VOCABULARY = 128


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    made = {}
    for name in HYBRIDS:
        torch.manual_seed(0)
        config = hybrid_config(name, vocabulary=VOCABULARY, context=64)
        made[name] = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter_name, parameter in made[name].named_parameters():
                if parameter_name.endswith("A_log"):
                    continue
                if parameter.ndim > 1:
                    parameter.mul_(4)
                else:  # norms and biases: not the same for every number
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return made


@pytest.fixture(scope="module")
def graphs(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {}
    for name, model in models.items():
        paths[name] = tmp_path_factory.mktemp("graph") / "model.onnx"
        editing.save(decoder_passes.optimize(export_causal_graph(model, positions=64)), paths[name])
    return paths


def decoder_of(graph: Path, slots: int = 5) -> OnnxDecoder:
    return OnnxDecoder(graph, slots=slots, context=48, longest_run=16, threads=1)


def texts(*lengths: int) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(1, VOCABULARY, length).tolist() for length in lengths]


def whole(decoder: OnnxDecoder, slot: int, text: list[int]) -> NDArray[np.float32]:
    return decoder.run([SlotTokens(slot, 0, text, len(text))]).copy()


def in_company(decoder: OnnxDecoder, slots: Sequence[int], of: list[list[int]]) -> list[NDArray[np.float32]]:
    """Logits of texts that run together in pieces of different sizes; a slot is idle now and then."""
    random = np.random.default_rng(1)
    found: list[list[NDArray[np.float32]]] = [[] for _ in of]
    position = [0 for _ in of]
    while any(at < len(text) for at, text in zip(position, of, strict=True)):
        items = []
        for index, (slot, text) in enumerate(zip(slots, of, strict=True)):
            piece = text[position[index] :][: random.choice([0, 1, 1, 2, 5, 16])]
            if piece:
                items.append(SlotTokens(slot, position[index], piece, len(piece)))
                position[index] += len(piece)
        logits, begin = decoder.run(items), 0
        for item in items:
            found[list(slots).index(item.slot)].append(logits[begin : begin + item.wanted].copy())
            begin += item.wanted
    return [np.concatenate(parts) for parts in found]


def log_probs(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    return torch.log_softmax(torch.from_numpy(logits), dim=-1).numpy()


@pytest.mark.parametrize("name", HYBRIDS)
def test_log_probabilities_equal_hugging_face_in_any_company(
    models: dict[str, Any], graphs: dict[str, Path], name: str
) -> None:
    decoder = decoder_of(graphs[name])
    drawn = texts(17, 40, 9)
    found = in_company(decoder, (4, 0, 1), drawn)
    for text, logits in zip(drawn, found, strict=True):
        with torch.inference_mode():
            expected = models[name](torch.tensor([text])).logits[0].numpy()
        assert expected.std() > 0.5
        np.testing.assert_allclose(log_probs(logits), log_probs(expected), atol=5e-4)
        np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))
        np.testing.assert_array_equal(whole(decoder, 3, text), logits)  # a slot that held another text


@pytest.mark.parametrize("name", ["qwen35", "mamba2"])
def test_greedy_tokens_are_those_of_generate(models: dict[str, Any], graphs: dict[str, Path], name: str) -> None:
    (prompt,) = texts(12)
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected = models[name].generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
    decoder = decoder_of(graphs[name])
    tokens = [int(decoder.run([SlotTokens(2, 0, prompt)])[0].argmax())]
    while len(tokens) < 20:
        at = len(prompt) + len(tokens) - 1
        logits = decoder.run([SlotTokens(2, at, tokens[-1:])])[0].copy()
        logits[0] = -np.inf  # the end, which `min_new_tokens` forbids
        tokens.append(int(logits.argmax()))
    assert tokens == expected


@pytest.mark.parametrize("name", ["qwen35", "lfm2", "falcon_h1"])
def test_idle_slots_and_copies_keep_their_states(graphs: dict[str, Path], name: str) -> None:
    decoder = decoder_of(graphs[name])
    first, other = texts(20, 16)
    expected = whole(decoder, 0, first)
    decoder.run([SlotTokens(1, 0, first[:11])])
    before = {key: buffer[1].copy() for key, buffer in decoder.states.buffers.items()}
    assert all(np.abs(state).max() > 0 for state in before.values())
    decoder.run([SlotTokens(0, 0, other[:3]), SlotTokens(2, 0, other)])  # slot 1 is in their window
    for key, buffer in decoder.states.buffers.items():
        np.testing.assert_array_equal(buffer[1], before[key])
        assert not buffer[3:].any()
    decoder.copy(1, 4, 11)
    for slot in (4, 1):
        np.testing.assert_array_equal(decoder.run([SlotTokens(slot, 11, first[11:], 9)]), expected[11:])


def test_a_state_is_not_cut_back(graphs: dict[str, Path]) -> None:
    decoder = decoder_of(graphs["lfm2"])
    (text,) = texts(12)
    decoder.run([SlotTokens(0, 0, text[:8])])
    with pytest.raises(ValueError, match="slot 0 holds the states of 8 tokens, not 6"):
        decoder.run([SlotTokens(0, 6, text[6:])])
    with pytest.raises(ValueError, match="slot 0 holds the states of 8 tokens, not 6"):
        decoder.copy(0, 1, 6)
    decoder.release(0, 6)  # what is left is no beginning of a text
    with pytest.raises(ValueError, match="slot 0 holds the states of 0 tokens, not 6"):
        decoder.run([SlotTokens(0, 6, text[6:])])


def test_a_run_that_fails_is_not_made_again(graphs: dict[str, Path]) -> None:
    """It may have written some of the states; so every text of it ends, and the next one begins from zeros."""
    decoder = decoder_of(graphs["falcon_h1"])
    good, bad = texts(9)[0], [VOCABULARY + 1000]
    expected = whole(decoder, 0, good)
    decoder.run([SlotTokens(0, 0, good[:4])])
    found = run_each(decoder, [SlotTokens(0, 4, good[4:], 5), SlotTokens(1, 0, bad)])
    assert [type(each) for each in found] == [StatesLost, StatesLost]
    with pytest.raises(ValueError, match="holds the states of 0 tokens"):
        decoder.run([SlotTokens(0, 4, good[4:])])
    np.testing.assert_array_equal(whole(decoder, 0, good), expected)


@pytest.mark.parametrize("name", ["qwen35", "granite", "lfm2"])
@pytest.mark.parametrize(("recipe", "tolerance"), [("int8", 0.3), ("int4_mixed", 3.0)])
def test_matmuls_of_mixers_are_quantized(
    models: dict[str, Any], graphs: dict[str, Path], tmp_path: Path, name: str, recipe: str, tolerance: float
) -> None:
    graph = onnx.load(str(graphs[name])).graph
    matmuls = sum(node.op_type == "MatMul" for node in graph.node)

    def runs(samples: int, seed: int) -> Feeds:
        random = np.random.default_rng(seed)
        drawn = [[random.integers(1, VOCABULARY, size).tolist() for size in (40, 17)] for _ in range(samples)]
        return iter([inputs_of(graph, *pair) for pair in drawn])

    steps = recipes.load()[recipe].passes[recipes.Kind.DECODER]
    editing.save(recipes.transform(ir.load(graphs[name]), steps, runs), tmp_path / "model.onnx")
    counts = Counter(node.op_type for node in onnx.load(str(tmp_path / "model.onnx")).graph.node)
    assert counts["MatMulNBits"] == matmuls
    decoder = decoder_of(tmp_path / "model.onnx")
    assert all(buffer.dtype == np.float32 for buffer in decoder.states.buffers.values())
    drawn = texts(17, 30)
    for text, logits in zip(drawn, in_company(decoder, (0, 2), drawn), strict=True):
        with torch.inference_mode():
            expected = models[name](torch.tensor([text])).logits[0].numpy()
        assert 1e-4 < np.abs(logits - expected).max() < tolerance
        np.testing.assert_array_equal(whole(decoder, 4, text), logits)


def limits(**more: Any) -> GenerationLimits:
    values: dict[str, Any] = {"context": 48, "slots": 4, "kv_cache_mib": 0, "prefill_chunk": 16, "max_waiting": 4}
    values |= {"timeout": 60, "default_max_tokens": 8, "prefix_reuse": True, "prompt_lookup": True, "threads": 1}
    return GenerationLimits(**values | {"device": "cpu"} | more)


def test_memory_counts_the_states(graphs: dict[str, Path]) -> None:
    decoder = decoder_of(graphs["qwen35"], slots=4)
    # Two layers: 2 x 16 numbers of queries and of keys and 4 x 24 of values, three times; 4 heads of 16 x 24.
    each = 2 * 4 * ((2 * 2 * 16 + 4 * 24) * 3 + 4 * 16 * 24)
    assert decoder.states.bytes_per_slot == each
    needs = plan_memory(limits(), decoder, weights=0, available=2**30)
    assert needs.states == 4 * each
    assert "MiB of states + " in str(needs)
    with pytest.raises(DoesNotFit, match="MiB of states"):
        plan_memory(limits(), decoder, weights=0, available=needs.cache + needs.logits + needs.states - 1)


def test_a_model_without_keys_and_values_has_no_cache(graphs: dict[str, Path]) -> None:
    decoder = decoder_of(graphs["mamba2"], slots=4)
    needs = plan_memory(limits(kv_cache_mib=1), decoder, weights=0, available=2**30)
    assert (needs.cache, needs.cache_tokens) == (0, 4 * 48)


def test_states_are_kept_on_the_cpu(graphs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "trident_serving.generation.decoder.open_session",
        lambda path, device, device_id, threads: __import__("onnxruntime").InferenceSession(str(path)),
    )
    with pytest.raises(DeviceMissing, match="the states of this model are kept on the CPU only"):
        OnnxDecoder(graphs["lfm2"], slots=2, context=32, longest_run=16, threads=1, device="cuda")


def test_a_hybrid_for_a_gpu_is_refused(models: dict[str, Any]) -> None:
    class Spec:
        name = "x"
        generation = limits(device="cuda")

    with pytest.raises(ModelsFileError, match=r"\[x\] device is 'cuda', but models of type 'lfm2' keep states"):
        check_device(Spec, models["lfm2"])  # type: ignore[arg-type]


def test_states_of_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    """RecurrentGemma keeps its states in its modules, where no cache sees them."""
    config = RecurrentGemmaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        lru_width=64,
        head_dim=16,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UnsupportedArchitecture, match="is not supported: it keeps states outside its cache"):
        export_causal_graph(model, positions=64)


def test_what_no_known_function_computes_is_refused() -> None:
    found = States(Places(*EXAMPLE))
    found.handed(torch.zeros(1, 4, 5))
    with pytest.raises(UnsupportedArchitecture, match="layer 0 keeps inputs of a kind that is not known here"):
        found.check_all_taken()
    with pytest.raises(UnsupportedArchitecture, match="layer 0 keeps a state of a kind that is not known here"):
        found.check_returned(torch.zeros(2, 4, 3))
