"""Encoder-decoder models for translation and summarization: one folder a variant, which `trident_seq2seq` serves."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from trident_export import corpora, disk, recipes
from trident_export.errors import ModelsFileError
from trident_export.graphs import editing
from trident_export.graphs.seq2seq import export_decoder, export_encoder
from trident_export.huggingface import seq2seq as text_files
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.huggingface.seq2seq import save_text_files, task_generation_config
from trident_export.huggingface.vocabulary import rows_of
from trident_export.measure import fidelity, seq2seq_texts
from trident_export.models_file import ModelSpec
from trident_export.progress import track
from trident_export.recipes import Kind
from trident_export.tasks import Evaluator, Job
from trident_serving.artefacts import VERSION
from trident_serving.schema.fields import LongInput
from trident_serving.schema.limits import Seq2SeqLimits
from trident_serving.seq2seq.decoder import Row, Seq2SeqDecoder, Source
from trident_serving.seq2seq.request import GenerationDefaults, positions
from trident_serving.seq2seq.source import SourceText

Floats = NDArray[np.float32]

# Texts that the gate compares, tokens of their sources and answers, and texts that it runs at once.
GATE_TEXTS = 12
GATE_SOURCE = 48
GATE_TOKENS = 24
GATE_ROWS = 4
# Tokens of the longest source and answer that are compared, and logits of the latter.
FAR_SOURCE, FAR_TARGET, FAR_LOGITS = 1024, 256, 2**26


def check(spec: ModelSpec, source: HuggingFaceFolder) -> None:
    """See `trident_export.tasks`."""
    source.check_head(AutoModelForSeq2SeqLM)
    check_limits(spec, source)
    text_files.check(spec, source)


def trace(job: Job) -> None:
    """See `trident_export.tasks`."""
    spec = job.spec
    limits = _limits(spec)
    job.progress("loading the model")
    model = load_model(job.source)
    disk.require(job.staging, model.num_parameters() * 4, spec.recipes)
    save_text_files(spec, job.source, job.assets, rows_of(model))
    capacity = positions(limits.max_target_tokens, GenerationDefaults.load(job.assets).prompt)
    job.graphs.mkdir()
    job.progress("tracing the graphs")
    export_encoder(model, job.graphs / "encoder.onnx", job.source.longest_input)
    export_decoder(model, job.graphs / "decoder.onnx", capacity)


def write(job: Job, variant: str) -> None:
    """See `trident_export.tasks`."""
    folder = job.staging / job.spec.public_name(variant) / VERSION
    for name in ("encoder.onnx", "decoder.onnx"):
        recipes.apply(job.spec.recipes[variant], Kind.SEQ2SEQ, job.graphs / name, folder / name)
    editing.share_weights(folder / "encoder.onnx", folder / "decoder.onnx")
    shutil.copytree(job.assets, folder, dirs_exist_ok=True)


def evaluator(
    spec: ModelSpec, source: HuggingFaceFolder, root: Path, texts: Sequence[str], *, thorough: bool = False
) -> Evaluator:
    """See `trident_export.tasks`; the measures are those of `fidelity.compare_logits`.

    The thorough ones are BLEU, chrF and ROUGE-L of the variant's greedy answers against Hugging Face's, 0 to 100.
    """
    model = source.reference(AutoModelForSeq2SeqLM)
    folder = root / spec.name / VERSION
    samples = sample_sources(SourceText.load(folder, min(GATE_SOURCE, _limits(spec).max_source_tokens)), texts)
    prompt = GenerationDefaults.load(folder).prompt
    length = min(GATE_TOKENS, _limits(spec).max_target_tokens)
    targets = [answer_ids(model, ids, prompt, length) for ids in samples]
    far = far_text(spec, source, folder, targets, prompt, texts)
    reference = reference_logits(model, [*samples, far[0]], [*targets, far[1]])
    capacity = positions(_limits(spec).max_target_tokens, prompt)
    tokenizer = source.tokenizer
    seq2seq_texts.check_sources(source.tokenizer, folder, corpora.held_out())
    config = task_generation_config(spec, source)
    # Both by the folder's rules, as they are served: without repeated n-grams, with a penalty for repetitions.
    asked = seq2seq_texts.silent_requests(folder, _limits(spec), texts, len(texts), length) if thorough else []
    known = seq2seq_texts.generated(model, config, folder, _limits(spec), asked, beams=1)
    expected = [tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in known]

    def evaluate(variant: str) -> dict[str, float]:
        folder = root / spec.public_name(variant) / VERSION
        measured = measure(folder, samples, targets, reference, capacity, _limits(spec).threads, far)
        if spec.recipes[variant].precision == "fp32":
            seq2seq_texts.check_answers(model, config, folder, _limits(spec), corpora.held_out())
        if thorough:
            answers = seq2seq_texts.greedy(folder, _limits(spec), asked)
            found = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
            measured |= fidelity.compare_texts(expected, found)
        return measured

    return evaluate


def load_model(source: HuggingFaceFolder) -> PreTrainedModel:
    """The model in float32, in evaluation mode."""
    return source.load(AutoModelForSeq2SeqLM)


def check_limits(spec: ModelSpec, source: HuggingFaceFolder) -> None:
    """The limits of models.toml must be ones that the model was built for.

    Raises:
        ModelsFileError: the source is longer than the encoder's positions.
    """
    longest = source.longest_input
    if longest is not None and _limits(spec).max_source_tokens > longest:
        raise ModelsFileError(
            f"[{spec.name}] limits.max_source_tokens is {_limits(spec).max_source_tokens}, the model was built for "
            f"{longest} positions"
        )


def sample_sources(source: SourceText, texts: Sequence[str]) -> list[list[int]]:
    """Source tokens of some of the texts."""
    step = max(1, len(texts) // GATE_TEXTS)
    return [list(source.windows(text, LongInput.TRUNCATE)[0].ids) for text in texts[::step][:GATE_TEXTS]]


def answer_ids(model: PreTrainedModel, source_ids: list[int], prompt: tuple[int, ...], length: int) -> list[int]:
    """The decoder's tokens that the gate goes through: start tokens, and Hugging Face's greedy answer.

    Args:
        length: of the answer, in tokens.
    """
    with torch.inference_mode():
        given = model.generate(
            torch.tensor([source_ids]),
            decoder_input_ids=torch.tensor([prompt]),
            do_sample=False,
            num_beams=1,
            max_new_tokens=length,
            min_length=0,
            suppress_tokens=None,
        )
    ids: list[int] = given[0].tolist()
    return ids[: len(prompt) + length - 1]


def far_text(
    spec: ModelSpec,
    source: HuggingFaceFolder,
    folder: Path,
    targets: list[list[int]],
    prompt: tuple[int, ...],
    texts: Sequence[str],
) -> tuple[list[int], list[int]]:
    """A source as long as the limit, and an answer to it made of the others' tokens: positions may have vectors."""
    limits, longest = _limits(spec), source.longest_input or FAR_SOURCE
    reader = SourceText.load(folder, min(limits.max_source_tokens, FAR_SOURCE))
    ids = list(reader.windows("\n".join(texts), LongInput.TRUNCATE)[0].ids)
    rows = max(getattr(source.text_config, name, 0) or 0 for name in ("vocab_size", "decoder_vocab_size"))
    affordable = min(FAR_TARGET, max(FAR_LOGITS // max(rows, 1), GATE_TOKENS))
    length = min(limits.max_target_tokens, longest - len(prompt), affordable)
    answer = [token for target in targets for token in target[len(prompt) :]]
    return ids, [*prompt, *islice(cycle(answer), max(length - 1, 0))]


def reference_logits(model: PreTrainedModel, samples: list[list[int]], targets: list[list[int]]) -> list[Floats]:
    """Hugging Face's logits behind each token of the answers, float32 [tokens, vocabulary] for each text."""
    with torch.inference_mode():
        return [
            model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([target])).logits[0].float().numpy()
            for ids, target in track(list(zip(samples, targets, strict=True)), "Hugging Face")
        ]


def measure(
    folder: Path,
    samples: Sequence[Source],
    targets: list[list[int]],
    reference: list[Floats],
    capacity: int,
    threads: int = 0,
    far: tuple[Source, list[int]] | None = None,
) -> dict[str, float]:
    """Compare the graphs in a version folder with Hugging Face; see `fidelity.compare_logits`.

    Args:
        reference: of the samples, and then of the far text.
        far: see `far_text`.

    The texts run as they would be served, several at once, each one step behind the other, as two beams that share
    their text. `batch_effect` is the largest difference of a logit from a text that runs alone.
    """
    decoder = Seq2SeqDecoder(folder, slots=2 * GATE_ROWS, capacity=capacity, threads=threads)
    found: list[Floats] = []
    for start in track(range(0, len(samples), GATE_ROWS), folder.parent.name):
        rows = slice(start, start + GATE_ROWS)
        found += served_logits(decoder, samples[rows], targets[rows], beams=2)
    effect = 0.0
    every = list(zip(samples, targets, found, strict=True))
    for ids, target, served in track(every, f"{folder.parent.name}, one at a time"):
        (alone,) = served_logits(decoder, [ids], [target], beams=1)
        effect = max(effect, float(np.abs(alone - served).max()))
    if far is not None:
        samples, targets = [*samples, far[0]], [*targets, far[1]]
        found += served_logits(decoder, [far[0]], [far[1]], beams=1)
    compared = fidelity.compare_logits(reference, found, targets)
    return compared | {"batch_effect": effect, fidelity.LONGEST: float(max(map(len, samples)))}


def served_logits(
    decoder: Seq2SeqDecoder, samples: Sequence[Source], targets: list[list[int]], beams: int
) -> list[Floats]:
    """Logits of texts that run together, each one step behind the one before; float32 [tokens, vocabulary] each."""
    for error in decoder.encode_all(dict(enumerate(samples))).values():
        raise error
    logits: list[list[Floats]] = [[] for _ in samples]
    steps = max(len(target) + text for text, target in enumerate(targets))
    for step in range(steps):
        rows = []
        for text, target in enumerate(targets[: step + 1]):
            place = min(step - text, len(target) - 1)  # one that is at its end repeats its last token
            rows += [Row(text, target[place], place)] * beams
        result = decoder.run(rows)
        for text, target in enumerate(targets[: step + 1]):
            if step - text < len(target):
                logits[text].append(result[text * beams].copy())
    for text in range(len(samples)):
        decoder.remove(text)
    return [np.stack(rows) for rows in logits]


def _limits(spec: ModelSpec) -> Seq2SeqLimits:
    assert spec.seq2seq
    return spec.seq2seq
