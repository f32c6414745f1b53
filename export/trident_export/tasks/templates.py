"""Tasks in front of a generator: nothing to convert, since the template is in the config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.models_file import ModelSpec
from trident_export.tasks import Evaluator, Job
from trident_serving.artefacts import VERSION


def check(spec: ModelSpec, source: HuggingFaceFolder) -> None:
    """See `trident_export.tasks`: models.toml has been checked, and there is nothing else."""


def trace(job: Job) -> None:
    """See `trident_export.tasks`: Triton wants the version folder."""
    (job.staging / job.spec.name / VERSION).mkdir(parents=True)


def write(job: Job, variant: str) -> None:
    """See `trident_export.tasks`: a template has no recipes, and this is never called."""


def evaluator(
    spec: ModelSpec, source: HuggingFaceFolder, root: Path, texts: Sequence[str], *, thorough: bool = False
) -> Evaluator:
    """See `trident_export.tasks`: a template's answers have no reference, its generator has its gate."""
    return lambda variant: {}
