"""How each task is exported: graph, variants, gate, and the files that its backends read.

A task is a module with four functions, registered in `MODULES` under the transformers pipeline's name:

    check(spec, source)       refuse what can be told from the folder's small files; `trident-export add` asks it, too
    trace(job)                write the float32 graph into `job.graphs`, and what all variants share
    write(job, variant)       write the version folders of a variant from it
    evaluator(spec, source, root, texts, thorough)
                              asks Hugging Face, and gives a function from a variant in `root` to what it gets wrong
"""

from __future__ import annotations

import gc
import importlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trident_export import corpora
from trident_export.errors import FidelityError
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.measure import fidelity
from trident_export.models_file import ModelSpec
from trident_serving.encoders import MODULES as ENCODER_MODULES


@dataclass(frozen=True)
class Job:
    """One export, built aside.

    Attributes:
        spec: the model.
        source: its Hugging Face folder.
        staging: where the Triton models' version folders are built, as `<staging>/<triton model>/<version>`.
        progress: told what is being done.
    """

    spec: ModelSpec
    source: HuggingFaceFolder
    staging: Path
    progress: Callable[[str], None]

    @property
    def graphs(self) -> Path:
        """Where the float32 graphs are while variants are made of them; no model's name begins with "_"."""
        return self.staging / "_graph"

    @property
    def assets(self) -> Path:
        """Where files lie that go into every variant's folder."""
        return self.staging / "_assets"


# Measures of each variant, by its name.
Measures = dict[str, dict[str, float]]
# What a variant gets wrong.
Evaluator = Callable[[str], dict[str, float]]


@dataclass(frozen=True)
class Checked:
    """What the gate found.

    Attributes:
        measures: of each variant.
        refused: variants that it refuses, with the reason.
    """

    measures: Measures
    refused: dict[str, str]


TEMPLATES = "trident_export.tasks.templates"
VLLM = "trident_export.tasks.vllm"
MODULES = {
    "text-generation": "trident_export.tasks.text_generation",
    "translation": "trident_export.tasks.seq2seq",
    "summarization": "trident_export.tasks.seq2seq",
    "automatic-speech-recognition": "trident_export.tasks.speech",
    **{task: f"trident_export.tasks.encoders.{name}" for task, name in ENCODER_MODULES.items()},
}


def build(job: Job, *, force: bool = False) -> Checked:
    """Build the artefacts of a job and put every variant through its gate.

    Args:
        force: go on where a variant is refused.

    Raises:
        FidelityError: a variant is refused.
        ExportError: models.toml and the model disagree, or the model has no form here.
    """
    trace(job)
    for variant, recipe in job.spec.recipes.items():
        chosen = f" by the recipe {recipe.name}" if recipe.name not in ("", variant) else ""
        job.progress(f"writing {variant}{chosen}")
        write(job, variant)
    for left in (job.graphs, job.assets):
        shutil.rmtree(left, ignore_errors=True)
    if not job.spec.template:
        job.progress("comparing with Hugging Face")
    measures = evaluate(job.spec, job.source, job.staging)
    refused = {}
    if (uncompared := _uncompared(job.spec, measures)) is not None:
        job.progress(uncompared)
    for variant, measured in measures.items():
        precision = job.spec.recipes[variant].precision
        try:
            fidelity.check(job.spec.task, variant, measured, job.spec.gates.get(variant), precision)
        except FidelityError as error:
            if not force:
                raise
            refused[variant] = str(error)
    return Checked(measures, refused)


def _uncompared(spec: ModelSpec, measures: Measures) -> str | None:
    """What the gate leaves to belief: texts longer than the longest that it compared."""
    longest = int(min((measured.get(fidelity.LONGEST, 0) for measured in measures.values() if measured), default=0))
    most = 0
    if spec.causal:
        most = spec.causal.context
    elif spec.encoder:
        most = spec.encoder.max_tokens
    elif spec.seq2seq:
        most = spec.seq2seq.max_source_tokens
    return f"compared texts have {longest} tokens at most, the model takes {most}" if longest < most else None


def check(spec: ModelSpec, source: HuggingFaceFolder) -> None:
    """Refuse what can be told without the weights' numbers, in a second or two.

    Raises:
        ExportError: models.toml and the model disagree, a file is damaged, or the model has no form here.
    """
    _module(spec).check(spec, source)


def trace(job: Job) -> None:
    """Write the float32 graphs of a job, and what all its variants share.

    Raises:
        ExportError: models.toml and the model disagree, or the model has no form here.
    """
    check(job.spec, job.source)
    _module(job.spec).trace(job)
    gc.collect()  # the model, whose parts know each other


def write(job: Job, variant: str) -> None:
    """Write the version folders of a variant, from the traced graphs; what was there is overwritten.

    Raises:
        ExportError: its recipe does not fit the model.
    """
    _module(job.spec).write(job, variant)


def evaluate(
    spec: ModelSpec,
    source: HuggingFaceFolder,
    root: Path,
    texts: Sequence[str] | None = None,
    *,
    thorough: bool = False,
) -> Measures:
    """What each variant gets wrong.

    Args:
        spec: the model.
        source: its Hugging Face folder.
        root: holds the version folders, as `<root>/<triton model>/<version>`: a repository or a staging folder.
        texts: to measure with; None: the packaged ones that nothing is calibrated on.
        thorough: more than the gate needs, see docs/reference/precisions.md: what becomes of whole answers.
    """
    measure = evaluator(spec, source, root, texts, thorough=thorough)
    return {variant: measure(variant) for variant in spec.recipes}


def evaluator(
    spec: ModelSpec,
    source: HuggingFaceFolder,
    root: Path,
    texts: Sequence[str] | None = None,
    *,
    thorough: bool = False,
) -> Evaluator:
    """Ask Hugging Face once, to measure variants with; see `evaluate`."""
    samples = corpora.held_out() if texts is None else list(texts)
    found: Evaluator = _module(spec).evaluator(spec, source, root, samples, thorough=thorough)
    gc.collect()  # Hugging Face's model: what it said is kept, and sessions take its place
    return found


def module_name(spec: ModelSpec) -> str:
    """The module that exports a model."""
    if spec.template:
        return TEMPLATES
    return VLLM if spec.vllm_limits else MODULES[spec.task]


def _module(spec: ModelSpec) -> Any:
    # Imported when needed: torch and transformers take ten seconds, and a fresh repository needs neither.
    return importlib.import_module(module_name(spec))
