"""Heads of more than 128 numbers: a text's numbers are the same to the last bit in any company, however it is cut.

With such heads ONNX Runtime's matmul of queries and keys sums in another order where there are few keys (Gemma: 256).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from tools import families_seq2seq
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Gemma3TextConfig

from tests.integration.test_decoder_graphs import compare_logits
from trident_export.graphs import decoder_passes, editing
from trident_export.graphs.causal import export_causal_graph
from trident_export.graphs.seq2seq import export_decoder, export_encoder
from trident_serving.generation.batch import SlotTokens
from trident_serving.generation.decoder import OnnxDecoder
from trident_serving.seq2seq.decoder import Row, Seq2SeqDecoder

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

CONTEXT = 200
VOCABULARY = 128
TEXT = np.random.default_rng(0).integers(1, VOCABULARY, CONTEXT).tolist()


def gemma(size: int) -> Any:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=size,
        query_pre_attn_scalar=size,
        sliding_window=40,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=2 * CONTEXT,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6) if parameter.ndim > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=[256, 512])
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "model.onnx"
    model = gemma(request.param)
    made = decoder_passes.optimize(export_causal_graph(model, positions=2 * CONTEXT))
    assert decoder_passes.sum_scores_alike(made) == 2
    assert decoder_passes.sum_scores_alike(made) == 0
    editing.save(made, path)
    compare_logits(model, path, tolerance=5e-4)
    return path


def opened(graph: Path) -> OnnxDecoder:
    return OnnxDecoder(graph, slots=3, context=CONTEXT, longest_run=CONTEXT, threads=1)


@pytest.fixture
def whole(graph: Path) -> NDArray[np.float32]:
    return opened(graph).run([SlotTokens(0, 0, TEXT, CONTEXT)]).copy()


def test_a_text_that_is_cut_anywhere(graph: Path, whole: NDArray[np.float32]) -> None:
    decoder = opened(graph)
    for length in (1, 20, 64, 65, 90, 129, 160, 193):
        np.testing.assert_array_equal(decoder.run([SlotTokens(0, 0, TEXT[:length], length)]), whole[:length])
        rest = TEXT[length : length + 3]
        np.testing.assert_array_equal(decoder.run([SlotTokens(0, length, rest, len(rest))]), whole[length : length + 3])


def test_token_by_token_beside_others(graph: Path, whole: NDArray[np.float32]) -> None:
    decoder = opened(graph)
    decoder.run([SlotTokens(0, 0, TEXT[:150])])
    for at in range(40):
        items = [SlotTokens(slot, start, [TEXT[start]]) for slot, start in ((0, 150 + at), (1, at), (2, at))]
        np.testing.assert_array_equal(decoder.run(items), whole[[150 + at, at, at]])


def test_only_large_heads_of_floats_have_sinks(tmp_path: Path) -> None:
    small = decoder_passes.optimize(export_causal_graph(gemma(128), positions=64))
    assert decoder_passes.sum_scores_alike(small) == 0
    on_gpu = decoder_passes.optimize(export_causal_graph(gemma(256), positions=64), ragged=False)
    assert decoder_passes.sum_scores_alike(on_gpu) == 0
    editing.save(small, tmp_path / "model.onnx")
    nodes = onnx.load(str(tmp_path / "model.onnx")).graph.node
    assert [node.input[11] for node in nodes if node.op_type == "GroupQueryAttention"] == ["", ""]


def test_a_text_to_translate_beside_longer_ones(tmp_path: Path) -> None:
    config: Any = families_seq2seq.tiny("t5gemma")
    config.encoder.head_dim = config.decoder.head_dim = 256
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").eval()
    export_encoder(model, tmp_path / "encoder.onnx", families_seq2seq.CONTEXT)
    export_decoder(model, tmp_path / "decoder.onnx", 8)
    texts = {length: [3 + token % (config.decoder.vocab_size - 3) for token in TEXT[:length]] for length in (30, 100)}

    def logits(*lengths: int) -> NDArray[np.float32]:
        decoder = Seq2SeqDecoder(tmp_path, slots=2, capacity=8, threads=1)
        assert decoder.encode_all({length: texts[length] for length in lengths}) == {}
        steps = [decoder.run([Row(length, 5 + step, step) for length in lengths])[0].copy() for step in range(4)]
        return np.array(steps)

    np.testing.assert_array_equal(logits(30), logits(30, 100))
