"""How encoder tasks are exported; see `trident_export.tasks`. A module each, with what differs between them.

A new task is a module with an `EncoderExport` and a row in `TASKS`; `trident_serving.encoders` has its other half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.models_file import ModelSpec
from trident_export.tasks import Evaluator, Job
from trident_export.tasks.encoders import base
from trident_export.tasks.encoders.base import EncoderExport
from trident_export.tasks.encoders.classification import Classification
from trident_export.tasks.encoders.embeddings import Embeddings
from trident_export.tasks.encoders.entities import Entities
from trident_export.tasks.encoders.fill_mask import FillMask
from trident_export.tasks.encoders.question_answering import QuestionAnswering
from trident_export.tasks.encoders.ranking import Ranking

# By the transformers pipeline's name.
TASKS: Mapping[str, EncoderExport[Any]] = {
    export.task.name: export
    for export in (Classification(), Entities(), QuestionAnswering(), FillMask(), Ranking(), Embeddings())
}


def trace(job: Job) -> None:
    """See `trident_export.tasks`."""
    base.trace(job, TASKS[job.spec.task])


def write(job: Job, variant: str) -> None:
    """See `trident_export.tasks`."""
    base.write(job, variant, TASKS[job.spec.task])


def evaluator(
    spec: ModelSpec, source: HuggingFaceFolder, root: Path, texts: Sequence[str], *, thorough: bool = False
) -> Evaluator:
    """See `trident_export.tasks`."""
    return base.evaluator(spec, source, root, texts, TASKS[spec.task], thorough=thorough)
