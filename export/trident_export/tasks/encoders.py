"""Models that read whole texts: an ensemble of tokenizer, encoder graph and postprocess for each task."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from trident_export import configs, corpora, disk, encoder_files, ensembles, recipes
from trident_export import folder as hf
from trident_export.errors import ModelsFileError, TextError
from trident_export.graphs.encoder import TOKEN_TYPES, export_encoder_graph
from trident_export.limits import EmbeddingLimits, EncoderLimits, FillMaskLimits, LabelLimits
from trident_export.measure import fidelity
from trident_export.models_file import ModelSpec
from trident_export.passes import CalibrationRuns, Feeds
from trident_export.progress import track
from trident_export.recipes import Kind
from trident_export.tasks import Evaluator, Job
from trident_serving import preprocessing
from trident_serving.artefacts import VERSION
from trident_serving.classification import Activation, activate, softmax
from trident_serving.encoding import TokenRoles
from trident_serving.errors import InvalidRequest
from trident_serving.onnx_backend import OnnxModel
from trident_serving.pooling import PoolingSettings, normalize, pool
from trident_serving.postprocessing import LabelSettings
from trident_serving.text import encode_texts
from trident_serving.triton_adapter import parameters

Floats = NDArray[np.float32]

_GATE_BATCH = 4
# Share of a calibration text's tokens that may be unknown; more, and the text is in another tokenizer's language.
_MOST_UNKNOWN = 0.1

HEADS = {
    "feature-extraction": AutoModel,
    "text-classification": AutoModelForSequenceClassification,
    "text-ranking": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "question-answering": AutoModelForQuestionAnswering,
    "fill-mask": AutoModelForMaskedLM,
}


def trace(job: Job) -> None:
    """See `trident_export.tasks`."""
    spec = job.spec
    limits = _limits(spec)
    check_limits(spec, job.source)
    weights = sum(file.stat().st_size for kind in ("*.safetensors", "*.bin") for file in job.source.glob(kind))
    disk.require(job.staging, weights, spec.recipes)
    tokenizer_folder = job.staging / f"{spec.name}_tokenizer" / VERSION
    encoder_files.save_tokenizer(job.source, tokenizer_folder)
    encoder_files.read_roles(job.source, spec.prompts).save(tokenizer_folder)
    save_postprocess(spec, job.source, tokenizer_folder, job.staging / f"{spec.name}_postprocess" / VERSION)
    job.graphs.mkdir()
    job.progress("tracing the graph")
    stages = ensembles.stages(spec.task, limits)
    export_encoder_graph(
        job.source,
        job.graphs / "model.onnx",
        spec.task,
        HEADS[spec.task],
        [name for name, *_ in stages.model_outputs],
        pairs=TOKEN_TYPES in [name for name, *_ in stages.model_inputs],
        top_k=limits.top_k if isinstance(limits, FillMaskLimits) else 0,
        pooling=encoder_files.read_pooling(job.source).pooling if spec.task == "feature-extraction" else None,
    )


def write(job: Job, variant: str) -> None:
    """See `trident_export.tasks`."""
    spec = job.spec
    runs = calibration_runs(job, job.staging / f"{spec.name}_tokenizer" / VERSION)
    path = job.staging / configs.model_part(spec, variant) / VERSION / "model.onnx"
    recipes.apply(spec.recipes[variant], Kind.ENCODER, job.graphs / "model.onnx", path, runs)
    # An ensemble has no files, and Triton wants the folder.
    (job.staging / spec.public_name(variant) / VERSION).mkdir(parents=True, exist_ok=True)


def save_postprocess(spec: ModelSpec, source: Path, tokenizer_folder: Path, folder: Path) -> None:
    """Write what the last stage reads."""
    folder.mkdir(parents=True)
    if spec.task == "feature-extraction":
        encoder_files.read_pooling(source).save(folder)
    if isinstance(spec.limits, LabelLimits):
        encoder_files.read_labels(source, spec.task).save(folder)
    if spec.task in ("token-classification", "fill-mask"):
        shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)


def check_limits(spec: ModelSpec, source: Path) -> None:
    """The limits of models.toml must be those of the model.

    Raises:
        ModelsFileError: a limit does not fit; the message names the model's value.
    """
    limits = _limits(spec)
    config = hf.config(source)
    if isinstance(limits, EmbeddingLimits) and limits.dimensions != config.hidden_size:
        raise ModelsFileError(
            f"[{spec.name}] limits.dimensions is {limits.dimensions}, the model's is {config.hidden_size}"
        )
    if isinstance(limits, LabelLimits) and limits.labels != config.num_labels:
        raise ModelsFileError(f"[{spec.name}] limits.labels is {limits.labels}, the model has {config.num_labels}")
    if isinstance(limits, FillMaskLimits) and limits.top_k > config.vocab_size:
        raise ModelsFileError(f"[{spec.name}] limits.top_k is {limits.top_k}, the model has {config.vocab_size} tokens")
    longest = encoder_files.longest_input(source, config)
    if longest is not None and limits.max_tokens > longest:
        raise ModelsFileError(
            f"[{spec.name}] limits.max_tokens is {limits.max_tokens}, the model's longest text is {longest}"
        )


def evaluator(spec: ModelSpec, source: Path, root: Path, texts: Sequence[str], *, thorough: bool = False) -> Evaluator:
    """See `trident_export.tasks`; the measures are those of `fidelity.compare_embeddings` or `compare_scores`.

    The thorough ones are `recall_at_10` of embeddings, and `exact_match` and `f1` of answers (see `fidelity`).
    """
    built = configs.build(spec)
    name = f"{spec.name}_tokenizer"
    preprocess = preprocessing.create(parameters(configs.as_backend_json(built[name])), root / name / VERSION)
    pairs = [taken for taken, _ in readable(spec, preprocess, sample_texts(spec, source, texts))]
    if not pairs:
        raise TextError(f"the tokenizer of {spec.name} knows none of the texts: give some of its language")
    reference = reference_outputs(spec, source, pairs)
    read = reader(spec, root / f"{spec.name}_postprocess" / VERSION)
    searched = [[(text,) for text in texts] for texts in (corpora.passages(), corpora.questions())]
    retrieves = thorough and spec.task == "feature-extraction"
    expected = [reference_outputs(spec, source, texts) for texts in searched] if retrieves else []

    def evaluate(variant: str) -> dict[str, float]:
        part = configs.model_part(spec, variant)
        model = OnnxModel(root / part / VERSION, configs.as_backend_json(built[part]))

        def answers(texts: Sequence[tuple[str, ...]], batch: int) -> list[Floats]:
            return [row for tensors in _served(spec, model, preprocess, texts, batch) for row in read(tensors)]

        found, alone = answers(pairs, _GATE_BATCH), answers(pairs, 1)
        effect = max(_difference(a, b) for a, b in zip(found, alone, strict=True))
        measured = compare(spec, reference, found) | {"batch_effect": effect}
        if thorough and spec.task == "question-answering":
            measured |= fidelity.compare_spans(reference, found)
        if retrieves:
            given = [answers(texts, _GATE_BATCH) for texts in searched]
            passages, questions, *both = (np.stack(rows) for rows in [*expected, *given])
            measured["recall_at_10"] = fidelity.recall(passages, questions, *both)
        return measured

    return evaluate


def compare(spec: ModelSpec, reference: Sequence[Floats], found: Sequence[Floats]) -> dict[str, float]:
    """What a variant's answers get wrong, text by text."""
    if spec.task == "feature-extraction":
        return fidelity.compare_embeddings(np.stack(reference), np.stack(found))
    return fidelity.compare_scores(reference, found)


def _difference(one: Floats, other: Floats) -> float:
    """The largest, where both have a number."""
    width = min(one.shape[-1], other.shape[-1])
    return float(np.nanmax(np.abs(one[..., :width] - other[..., :width])))


def calibration_runs(job: Job, tokenizer_folder: Path) -> CalibrationRuns:
    """Calibration texts as the graph's inputs, a text a run.

    Raises:
        TextError: when texts are drawn: the file has none, or the tokenizer does not know their language.
    """
    spec = job.spec
    config = configs.as_backend_json(configs.build(spec)[f"{spec.name}_tokenizer"])
    preprocess = preprocessing.create(parameters(config), tokenizer_folder)
    unknown = TokenRoles.load(tokenizer_folder).unk_token_id

    def feeds(samples: int, seed: int) -> Feeds:
        texts = corpora.calibration(spec.calibration, samples, seed)
        found = readable(spec, preprocess, sample_texts(spec, job.source, texts))
        known = [inputs for _, inputs in found if _unknown_share(inputs, unknown) <= _MOST_UNKNOWN]
        if 2 * len(known) < len(texts):
            raise TextError(
                f"the calibration text {spec.calibration or 'that is packaged'} does not fit the tokenizer, which does "
                f"not know what {len(texts) - len(known)} of {len(texts)} texts are written in: name a file of the "
                "model's own language with calibration = ..."
            )
        return iter(known)

    return feeds


def readable(
    spec: ModelSpec, preprocess: preprocessing.Preprocess, pairs: Sequence[tuple[str, ...]]
) -> list[tuple[tuple[str, ...], dict[str, NDArray[Any]]]]:
    """The texts that a request could bring, with the graph's inputs for each; others are left out.

    The packaged texts are in languages and scripts that not every vocabulary has.
    """
    found = []
    for texts in pairs:
        with contextlib.suppress(InvalidRequest):
            found += [(texts, inputs) for inputs in _inputs(spec, preprocess, [texts], 1)]
    return found


def _unknown_share(inputs: Mapping[str, NDArray[Any]], unknown: int | None) -> float:
    return float((inputs["input_ids"][inputs["attention_mask"] > 0] == unknown).mean()) if unknown is not None else 0.0


def sample_texts(spec: ModelSpec, source: Path, texts: Sequence[str]) -> list[tuple[str, ...]]:
    """Texts, or pairs of texts, as a request would bring them."""
    if spec.task == "text-ranking":
        return list(zip(texts, [*texts[1:], *texts[:1]], strict=True))
    if spec.task == "question-answering":
        return [(text[:24], text) for text in texts]
    if spec.task == "fill-mask":
        gap = hf.tokenizer(source).mask_token
        words = [text.split()[:16] for text in texts]
        return [(" ".join([*row[: len(row) // 2], gap, *row[len(row) // 2 + 1 :]]),) for row in words]
    return [(text,) for text in texts]


def reference_outputs(spec: ModelSpec, source: Path, pairs: Sequence[tuple[str, ...]]) -> list[Floats]:
    """What Hugging Face makes of the texts, one at a time and without padding, in float32; see `reader`."""
    tokenizer = hf.tokenizer(source)
    model = hf.model(HEADS[spec.task], source)
    read = reader_from(spec, source)
    cut = "only_second" if spec.task == "question-answering" else True
    found = []
    with torch.inference_mode():
        for texts in track(pairs, "Hugging Face"):
            batch = tokenizer(*texts, truncation=cut, max_length=_limits(spec).max_tokens, return_tensors="pt")
            tensors = {name: t.numpy() for name, t in model(**batch).items() if isinstance(t, torch.Tensor)}
            inputs = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
            found += read({**tensors, **inputs})
    return found


Reader = Callable[[Mapping[str, NDArray[Any]]], list[Floats]]


def reader(spec: ModelSpec, folder: Path) -> Reader:
    """From the tensors of a batch to what is compared of each text, by the settings in a postprocess folder.

    Embeddings [dimensions]; scores [1, labels] of a text, [tokens, labels] of its tokens, [2, tokens] of an answer's
    start and end, [gaps, vocabulary] of its gaps, with NaN for the tokens that the model did not name.
    """
    if spec.task == "feature-extraction":
        return _vector_reader(PoolingSettings.load(folder))
    if spec.task in ("text-classification", "text-ranking"):
        return _label_reader(LabelSettings.load(folder).activation)
    if spec.task == "fill-mask":
        return _gap_reader(TokenRoles.load(folder).mask_token_id)
    return _token_reader


def reader_from(spec: ModelSpec, source: Path) -> Reader:
    """The same by the Hugging Face folder."""
    if spec.task == "feature-extraction":
        return _vector_reader(encoder_files.read_pooling(source))
    if spec.task in ("text-classification", "text-ranking"):
        return _label_reader(encoder_files.read_labels(source, spec.task).activation)
    if spec.task == "fill-mask":
        return _gap_reader(encoder_files.read_roles(source).mask_token_id)
    return _token_reader


def _vector_reader(settings: PoolingSettings) -> Reader:
    def read(tensors: Mapping[str, NDArray[Any]]) -> list[Floats]:
        vectors = tensors.get("pooled")
        if vectors is None:  # Hugging Face's side
            vectors = pool(tensors["last_hidden_state"], tensors["attention_mask"], settings.pooling)
        return list(normalize(vectors) if settings.normalize else vectors)

    return read


def _label_reader(activation: Activation) -> Reader:
    return lambda tensors: list(activate(tensors["logits"], activation)[:, None])


def _gap_reader(mask_token_id: int | None) -> Reader:
    def read(tensors: Mapping[str, NDArray[Any]]) -> list[Floats]:
        if "logits" in tensors:
            return [
                softmax(row[ids == mask_token_id])
                for row, ids in zip(tensors["logits"], tensors["input_ids"], strict=True)
            ]
        found = []
        columns = (tensors[name] for name in ("top_scores", "top_ids", "log_normalizer", "input_ids"))
        for scores, tokens, normalizer, ids in zip(*columns, strict=True):
            gaps = ids == mask_token_id
            row = np.full((int(gaps.sum()), int(tensors["top_ids"].max()) + 1), np.nan, np.float32)
            np.put_along_axis(row, tokens[gaps], np.exp(scores[gaps] - normalizer[gaps, None]), axis=1)
            found.append(row)
        return found

    return read


def _token_reader(tensors: Mapping[str, NDArray[Any]]) -> list[Floats]:
    kept = [mask > 0 for mask in tensors["attention_mask"]]
    if "logits" in tensors:
        return [softmax(row[real]) for row, real in zip(tensors["logits"], kept, strict=True)]
    both = zip(tensors["start_logits"], tensors["end_logits"], kept, strict=True)
    return [softmax(np.stack([start[real], end[real]])) for start, end, real in both]


def _served(
    spec: ModelSpec,
    model: OnnxModel,
    preprocess: preprocessing.Preprocess,
    pairs: Sequence[tuple[str, ...]],
    batch: int,
) -> Iterator[dict[str, NDArray[Any]]]:
    """The graph's inputs and outputs for the texts, in padded batches, as they are served."""
    for inputs in _inputs(spec, preprocess, pairs, batch):
        result = model.run([inputs])[0]
        if isinstance(result, Exception):
            raise result
        yield {**inputs, **result}


def _inputs(
    spec: ModelSpec, preprocess: preprocessing.Preprocess, pairs: Sequence[tuple[str, ...]], batch: int
) -> Iterator[dict[str, NDArray[Any]]]:
    """The graph's inputs for the texts, in padded batches."""
    stages = ensembles.stages(spec.task, _limits(spec))
    names = [name for name, *_ in stages.texts]
    size = batch if stages.batched else 1
    for start in track(range(0, len(pairs), size), f"texts, {size} at a time"):
        columns = [encode_texts(column) for column in zip(*pairs[start : start + size], strict=True)]
        request: dict[str, NDArray[Any]] = dict(zip(names, columns, strict=True))
        tensors = preprocess(request | {"truncate": np.ones(1, np.bool_)})
        # Of a long context the first window alone, which is what Hugging Face's side reads.
        yield {name: tensors[name][:size] for name, *_ in stages.model_inputs}


def _limits(spec: ModelSpec) -> EncoderLimits:
    assert isinstance(spec.limits, EncoderLimits)
    return spec.limits
