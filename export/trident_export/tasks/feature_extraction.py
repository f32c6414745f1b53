"""Embedding models: an ensemble of tokenizer, encoder and pooling."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModel, AutoTokenizer

from trident_export import configs, disk, fidelity, recipes
from trident_export.encoder_graph import export_encoder_graph
from trident_export.models_file import EmbeddingLimits, ModelSpec
from trident_export.tasks import Job, Measures
from trident_serving import encoding
from trident_serving.artefacts import VERSION
from trident_serving.onnx_backend import OnnxModel
from trident_serving.pooling import Pooling, PoolingSettings, normalize, pool

_POOLING_MODES = {
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_lasttoken": Pooling.LAST_TOKEN,
    "pooling_mode_max_tokens": Pooling.MAX,
}


def build(job: Job) -> None:
    """See `trident_export.tasks`."""
    spec = job.spec
    check_limits(spec, job.source)
    weights = sum(file.stat().st_size for file in job.source.glob("*.safetensors"))
    disk.require(job.staging, weights, spec.variants)
    save_tokenizer(job.source, job.staging / f"{spec.name}_tokenizer" / VERSION)
    postprocess_folder = job.staging / f"{spec.name}_postprocess" / VERSION
    postprocess_folder.mkdir(parents=True)
    read_pooling(job.source).save(postprocess_folder)
    graph = job.staging / "graph" / "model.onnx"
    graph.parent.mkdir()
    job.progress("tracing the graph")
    export_encoder_graph(job.source, graph)
    for variant in spec.variants:
        job.progress(f"writing {variant}")
        recipes.apply(variant, graph, job.staging / configs.model_part(spec, variant) / VERSION / "model.onnx")
        # An ensemble has no files, and Triton wants the folder.
        (job.staging / spec.public_name(variant) / VERSION).mkdir(parents=True)
    shutil.rmtree(graph.parent)


def evaluate(spec: ModelSpec, source: Path, root: Path) -> Measures:
    """See `trident_export.tasks`; the measures are those of `fidelity.compare_embeddings`."""
    limits = spec.limits
    assert isinstance(limits, EmbeddingLimits)
    texts = fidelity.texts()
    reference = reference_embeddings(source, texts, limits.max_tokens, read_pooling(source))
    encoder = encoding.TextEncoder.load(
        root / f"{spec.name}_tokenizer" / VERSION,
        encoding.EncodingSettings(limits.max_tokens, limits.max_bytes, limits.all_buckets, truncate=True),
    )
    pooling = PoolingSettings.load(root / f"{spec.name}_postprocess" / VERSION)
    built = configs.build(spec)
    measures: Measures = {}
    for variant in spec.variants:
        part = configs.model_part(spec, variant)
        model = OnnxModel(root / part / VERSION, configs.as_backend_json(built[part]))
        measures[variant] = measure(model, encoder, pooling, texts, reference)
    return measures


def check_limits(spec: ModelSpec, source: Path) -> None:
    """The limits of models.toml must be those of the model.

    Raises:
        ValueError: a limit does not fit; the message names the model's value.
    """
    limits = spec.limits
    assert isinstance(limits, EmbeddingLimits)
    config = AutoConfig.from_pretrained(source)
    if limits.dimensions != config.hidden_size:
        raise ValueError(f"[{spec.name}] limits.dimensions is {limits.dimensions}, the model's is {config.hidden_size}")
    longest = getattr(config, "max_position_embeddings", limits.max_tokens)
    file = source / "sentence_bert_config.json"
    if file.exists():
        longest = min(longest, json.loads(file.read_text()).get("max_seq_length") or longest)
    if limits.max_tokens > longest:
        raise ValueError(
            f"[{spec.name}] limits.max_tokens is {limits.max_tokens}, the model's longest text is {longest}"
        )


def save_tokenizer(source: Path, folder: Path) -> None:
    """Write tokenizer.json with the padding token named in it, as the runtime reads it."""
    folder.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.enable_padding(pad_id=tokenizer.pad_token_id or 0, pad_token=tokenizer.pad_token or "[PAD]")
    backend.save(str(folder / "tokenizer.json"))


def read_pooling(source: Path) -> PoolingSettings:
    """Pooling and normalization from the model's sentence-transformers files; mean and normalized without them.

    Raises:
        ValueError: the model has a step that is not supported.
    """
    file = source / "modules.json"
    if not file.exists():
        return PoolingSettings(Pooling.MEAN, normalize=True)
    modules = {module["type"].rsplit(".", 1)[-1]: module["path"] for module in json.loads(file.read_text())}
    unknown = sorted(set(modules) - {"Transformer", "Pooling", "Normalize"})
    if unknown:
        raise ValueError(f"the model has the modules {', '.join(unknown)}, which are not supported")
    settings = json.loads((source / modules["Pooling"] / "config.json").read_text())
    active = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value]
    if len(active) != 1 or active[0] not in _POOLING_MODES:
        raise ValueError(f"the model pools by {active}; supported is one of {', '.join(_POOLING_MODES)}")
    return PoolingSettings(_POOLING_MODES[active[0]], normalize="Normalize" in modules)


def reference_embeddings(
    source: Path, texts: list[str], max_tokens: int, settings: PoolingSettings
) -> NDArray[np.float32]:
    """Hugging Face's embeddings, one text at a time and without padding; float32 [texts, dimensions]."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    vectors = []
    with torch.inference_mode():
        for text in texts:
            batch = tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")
            hidden = model(**batch).last_hidden_state.numpy()
            vectors.append(pool(hidden, batch["attention_mask"].numpy(), settings.pooling)[0])
    stacked = np.stack(vectors)
    return normalize(stacked) if settings.normalize else stacked


def measure(
    model: OnnxModel,
    encoder: encoding.TextEncoder,
    settings: PoolingSettings,
    texts: list[str],
    reference: NDArray[np.float32],
) -> dict[str, float]:
    """Compare an encoder with Hugging Face, in padded batches of four; see `fidelity.compare_embeddings`."""
    vectors = []
    for start in range(0, len(texts), 4):
        input_ids, attention_mask = encoder.encode(texts[start : start + 4])
        result = model.run([{"input_ids": input_ids, "attention_mask": attention_mask}])[0]
        if isinstance(result, Exception):
            raise result
        vectors.append(pool(result["last_hidden_state"], attention_mask, settings.pooling))
    found = np.concatenate(vectors)
    return fidelity.compare_embeddings(reference, normalize(found) if settings.normalize else found)
