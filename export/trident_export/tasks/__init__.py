"""How each task is exported: graph, variants, gate, and the files that its backends read.

A task is a function `build(job)`, registered in `BUILDERS` under the transformers pipeline's name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trident_export.models_file import ModelSpec


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
    source: Path
    staging: Path
    progress: Callable[[str], None]


# Measures of each variant, by its name.
Measures = dict[str, dict[str, float]]

BUILDERS = {
    "text-generation": "trident_export.tasks.text_generation",
    "feature-extraction": "trident_export.tasks.feature_extraction",
}


def build(job: Job) -> Measures:
    """Build the artefacts of a job and put every variant through its gate.

    Raises:
        FidelityError: a variant is refused.
        ValueError: models.toml and the model disagree.
    """
    # Imported when needed: torch and transformers take ten seconds, and a fresh repository needs neither.
    module: Any = importlib.import_module(BUILDERS[job.spec.task])
    measures: Measures = module.build(job)
    return measures
