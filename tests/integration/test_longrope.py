"""Models with two rotations (longrope) on both sides of their original context, against Hugging Face's `generate`.

Phi-3 rotates a text beyond its original context by other frequencies, its first tokens too. An answer that grows
beyond it is computed again, as `generate` does. Here that context is 32 tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PretrainedConfig

from tests.integration.test_decoder_graphs import LLAMA, VOCABULARY
from trident_export import recipes
from trident_export.graphs import decoder_passes, editing, rotary
from trident_export.graphs.causal import export_causal_graph
from trident_export.passes.groups import Groups
from trident_serving.generation.answer import FinishReason, Job
from trident_serving.generation.batch import SlotTokens
from trident_serving.generation.decoder import OnnxDecoder
from trident_serving.generation.engine import Engine, EngineSettings
from trident_serving.runtime.log_probabilities import TokenLogProbs
from trident_serving.runtime.metrics import Recorder
from trident_serving.runtime.sampling.params import SamplingParams

ORIGINAL, CONTEXT, CHUNK = 32, 96, 16


def rope(size: int) -> dict[str, Any]:
    factors = {"short_factor": [1.0] * (size // 2), "long_factor": [1.0 + 0.5 * i for i in range(size // 2)]}
    kind = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 3.0}
    return {"rope_parameters": kind | factors | {"original_max_position_embeddings": ORIGINAL}}


def make(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return model


SIZES = LLAMA | {"max_position_embeddings": CONTEXT}
PHI3 = Phi3Config(**SIZES, **rope(16), sliding_window=None, original_max_position_embeddings=ORIGINAL)


@pytest.fixture(scope="module")
def model() -> Any:
    return make(PHI3)


@pytest.fixture(scope="module")
def graph(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("longrope") / "model.onnx"
    editing.save(decoder_passes.optimize(export_causal_graph(model, CONTEXT + CHUNK, CONTEXT)), path)
    return path


class Collector:
    """Keeps its tokens and their log-probabilities."""

    cancelled = False

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.error: Exception | None = None
        self.done = threading.Event()

    def accept(self, token: int, log_probs: TokenLogProbs | None) -> bool:
        assert log_probs is not None
        self.tokens.append(token)
        self.log_probs.append(log_probs.chosen)
        return False

    def finish(self, reason: FinishReason) -> None:
        self.done.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.done.set()


class Served:
    """An engine, and how many of the prompts' tokens it found in its cache."""

    def __init__(self, graph: Path) -> None:
        decoder = OnnxDecoder(graph, slots=4, context=CONTEXT, longest_run=CHUNK, threads=1)
        settings = EngineSettings(4, 4 * CONTEXT, CHUNK, 8, original_context=decoder.original_context)
        self.recorder = Recorder()
        self.engine = Engine(decoder, settings, eos_token_ids=frozenset(), recorder=self.recorder)

    def start(self, prompt: list[int], max_tokens: int) -> Collector:
        consumer = Collector()
        self.engine.submit(Job(list(prompt), SamplingParams(max_tokens=max_tokens), consumer, log_probs=True))
        return consumer

    def answer(self, prompt: list[int], max_tokens: int) -> list[int]:
        consumer = self.start(prompt, max_tokens)
        assert consumer.done.wait(20)
        assert consumer.error is None
        return consumer.tokens

    def reused(self) -> int:
        """Tokens of prompts since the last call."""
        return int(self.recorder.drain().counters["prefix_hit_tokens"])


@pytest.fixture
def served(graph: Path) -> Iterator[Served]:
    made = Served(graph)
    yield made
    made.engine.stop()


def generated(model: Any, prompt: list[int], max_tokens: int) -> list[int]:
    with torch.inference_mode():
        options = {"max_new_tokens": max_tokens, "do_sample": False, "eos_token_id": None}
        return model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def text(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, VOCABULARY, length).tolist()


# Below, up to the last token, beyond, over the border from far and from its last token, and from behind it.
CASES = [(10, 8), (24, 8), (50, 8), (20, 30), (32, 4), (33, 4)]


def test_answers_are_those_of_generate_on_both_sides_and_across(model: Any, served: Served) -> None:
    """In company first, then alone, where log-probabilities are the same to the last bit; and with what is kept."""
    prompts = [text(length, seed) for seed, (length, _) in enumerate(CASES)]
    # A text that repeats itself is drafted, up to the border.
    prompts[3] = prompts[3][:4] * 5
    together = [served.start(prompt, tokens) for prompt, (_, tokens) in zip(prompts, CASES, strict=True)]
    assert all(consumer.done.wait(20) for consumer in together)
    for prompt, (_, tokens), consumer in zip(prompts, CASES, together, strict=True):
        assert consumer.error is None
        assert consumer.tokens == generated(model, prompt, tokens)
        alone = served.start(prompt, tokens)
        assert alone.done.wait(20)
        assert (alone.tokens, alone.log_probs) == (consumer.tokens, consumer.log_probs)


def test_a_prefix_is_reused_on_its_side_of_the_border_only(model: Any, served: Served) -> None:
    prompt = text(20)
    first = served.answer(prompt, 8)
    assert first == generated(model, prompt, 8)
    assert served.reused() == 0
    beyond = [*prompt, *first, *text(10, 1)]  # what the slot holds has the other rotation
    assert served.answer(beyond, 4) == generated(model, beyond, 4)
    assert served.reused() == 0
    longer = [*beyond, *text(10, 2)]
    assert served.answer(longer, 4) == generated(model, longer, 4)
    assert served.reused() == len(beyond)
    crossing = [*prompt, *first[:4]]
    answer = served.answer(crossing, 20)  # begins in the first rotation, which its slot then gives up
    assert answer == generated(model, crossing, 20)
    assert served.reused() == len(crossing) - 1
    after = [*crossing, *answer, 5]
    assert served.answer(after, 4) == generated(model, after, 4)
    assert served.reused() == len(crossing) + len(answer) - 1  # whose last token was not run


def test_variants_keep_both_rotations_and_a_graph_within_has_one(model: Any, graph: Path, tmp_path: Path) -> None:
    rounded = recipes.transform(ir.load(graph), [Groups(bits=8, group=16)])
    editing.save(rounded, tmp_path / "rounded.onnx")
    decoder = OnnxDecoder(tmp_path / "rounded.onnx", slots=1, context=CONTEXT, longest_run=CONTEXT, threads=1)
    assert [decoder.rotation(tokens) for tokens in (1, ORIGINAL, ORIGINAL + 1)] == [0, 0, 1]
    within = export_causal_graph(model, CONTEXT, ORIGINAL)
    assert "rotations" not in {value.name for value in within.graph.inputs}
    assert rotary.original_context(model) == ORIGINAL


def test_a_rotation_that_the_operator_does_not_know_is_in_the_graph_twice(tmp_path: Path) -> None:
    """Heads of 8 numbers; a few words of the text in its own rotation, then in the other."""
    model = make(LlamaConfig(**SIZES | {"num_attention_heads": 8}, **rope(8)))
    path = tmp_path / "model.onnx"
    editing.save(decoder_passes.optimize(export_causal_graph(model, CONTEXT + CHUNK, CONTEXT)), path)
    decoder = OnnxDecoder(path, slots=2, context=CONTEXT, longest_run=CONTEXT, threads=1)
    for length in (ORIGINAL, ORIGINAL + 1, 90):
        ids = text(length)
        logits = decoder.run([SlotTokens(1, 0, ids, length, decoder.rotation(length))])
        with torch.inference_mode():
            expected = model(torch.tensor([ids]), use_cache=False).logits[0]
        np.testing.assert_allclose(logits, expected.numpy(), atol=2e-4)
