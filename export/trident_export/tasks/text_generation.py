"""Causal language models: one folder a variant, which `trident_generator` serves from text to text."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from trident_export import disk, fidelity, recipes, shape_folding
from trident_export.causal_graph import export_causal_graph
from trident_export.models_file import GenerationLimits, ModelSpec
from trident_export.tasks import Job, Measures
from trident_serving.artefacts import VERSION
from trident_serving.generation.decoder import OnnxDecoder
from trident_serving.tokenization import TextTokenizer

# Tokens of each text that the gate compares, and how many of them it runs one at a time.
GATE_TEXTS = 12
GATE_TOKENS = 64
GATE_DECODED = 8


def build(job: Job) -> None:
    """See `trident_export.tasks`."""
    spec = job.spec
    job.progress("loading the model")
    model = load_model(job.source)
    check_context(spec, model)
    disk.require(job.staging, model.num_parameters() * 4, spec.variants)
    assets = job.staging / "assets"
    save_text_files(job.source, assets)
    graph = job.staging / "graph" / "model.onnx"
    graph.parent.mkdir()
    job.progress("tracing the graph")
    export_causal_graph(model, graph)
    shape_folding.fold_file(graph)
    for variant in spec.variants:
        job.progress(f"writing {variant}")
        folder = job.staging / spec.public_name(variant) / VERSION
        recipes.apply(variant, graph, folder / "model.onnx")
        shutil.copytree(assets, folder, dirs_exist_ok=True)
    shutil.rmtree(graph.parent)
    shutil.rmtree(assets)


def evaluate(spec: ModelSpec, source: Path, root: Path) -> Measures:
    """See `trident_export.tasks`; the measures are those of `fidelity.compare_logits`."""
    assert isinstance(spec.limits, GenerationLimits)
    folders = {variant: root / spec.public_name(variant) / VERSION for variant in spec.variants}
    model = load_model(source)
    tokenizer = TextTokenizer.load(folders[spec.default_variant])
    samples = sample_ids(tokenizer, spec.limits.context, model.config.vocab_size)
    reference = reference_logits(model, samples)
    return {variant: measure(folder, samples, reference) for variant, folder in folders.items()}


def load_model(source: Path) -> PreTrainedModel:
    """The model in float32, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()


def check_context(spec: ModelSpec, model: PreTrainedModel) -> None:
    """The context of models.toml must be one that the model was built for.

    Raises:
        ValueError: it is larger.
    """
    assert isinstance(spec.limits, GenerationLimits)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and spec.limits.context > longest:
        raise ValueError(
            f"[{spec.name}] limits.context is {spec.limits.context}, the model was built for {longest} positions"
        )


def save_text_files(source: Path, folder: Path) -> None:
    """Write the tokenizer, the chat template and the generation config that the runtime reads."""
    folder.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True)
    tokenizer.save_pretrained(str(folder))
    for name in ("config.json", "generation_config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    kept = {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "config.json",
    }
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()
    if not (folder / "generation_config.json").exists():
        # Older models keep these settings in their config.
        GenerationConfig.from_model_config(AutoConfig.from_pretrained(source)).save_pretrained(str(folder))


def sample_ids(tokenizer: TextTokenizer, context: int, vocabulary: int) -> list[list[int]]:
    """Token ids of the gate's texts, each at most GATE_TOKENS long.

    Raises:
        ValueError: the tokenizer is not this model's.
    """
    length = min(GATE_TOKENS, context)
    samples = [tokenizer.encode(text, add_special_tokens=False)[:length] for text in fidelity.texts()]
    largest = max((token for ids in samples for token in ids), default=0)
    if largest >= vocabulary:
        raise ValueError(f"the tokenizer gives the token {largest}, the model has {vocabulary}: it is another model's")
    samples = [ids for ids in samples if len(ids) >= length // 2]
    if not samples:
        raise ValueError("the tokenizer gives too few tokens for the gate's texts: is it the model's own?")
    step = max(1, len(samples) // GATE_TEXTS)
    return samples[::step][:GATE_TEXTS]


def reference_logits(model: PreTrainedModel, samples: list[list[int]]) -> list[NDArray[np.float32]]:
    """Hugging Face's logits, float32 [tokens, vocabulary] for each text."""
    with torch.inference_mode():
        return [model(torch.tensor([ids])).logits[0].float().numpy() for ids in samples]


def measure(folder: Path, samples: list[list[int]], reference: list[NDArray[np.float32]]) -> dict[str, float]:
    """Compare the decoder in a version folder with Hugging Face; see `fidelity.compare_logits`.

    Each text runs as it would be served: two prefill chunks, then single tokens, in a cache with other rows.
    """
    longest = max(len(ids) for ids in samples)
    decoder = OnnxDecoder(folder / "model.onnx", slots=2, capacity=longest + 1, threads=0)
    found = [_served_logits(decoder, ids, row % 2) for row, ids in enumerate(samples)]
    return fidelity.compare_logits(reference, found)


def _served_logits(decoder: OnnxDecoder, ids: list[int], row: int) -> NDArray[np.float32]:
    decoded = min(GATE_DECODED, len(ids) - 2)
    middle = (len(ids) - decoded) // 2
    ends = [middle, len(ids) - decoded, *range(len(ids) - decoded + 1, len(ids) + 1)]
    pieces = []
    start = 0
    for end in ends:
        tokens = np.array([ids[start:end]], np.int64)
        positions = np.arange(end - start)
        logits = decoder.run_positions(row, tokens, np.array([start], np.int64), positions)
        pieces.append(logits[0].copy())
        start = end
    return np.concatenate(pieces)
