"""Tasks of models that read whole texts or images at once. A module each: its tensors, and the stages around its graph.

A new task is a module with an `EncoderTask`, named in `_ALL`; `trident_export.tasks.encoders` has its other half in a
module of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping

from trident_serving.encoders import (
    classification,
    embeddings,
    entities,
    fill_mask,
    hybrid,
    image_classification,
    image_embeddings,
    image_zero_shot,
    question_answering,
    ranking,
    sparse,
    zero_shot,
)
from trident_serving.encoders.task import EncoderTask
from trident_serving.errors import ReadingError

_ALL = (
    embeddings,
    classification,
    entities,
    question_answering,
    ranking,
    fill_mask,
    zero_shot,
    sparse,
    hybrid,
    image_classification,
    image_embeddings,
    image_zero_shot,
)
# By the transformers pipeline's name: the tasks, and the modules that have them, here and in the export.
TASKS: Mapping[str, EncoderTask] = {module.TASK.name: module.TASK for module in _ALL}
MODULES: Mapping[str, str] = {module.TASK.name: module.__name__.rpartition(".")[2] for module in _ALL}


def task_of(parameters: Mapping[str, str]) -> EncoderTask:
    """The task that a config's `parameters` name.

    Raises:
        ReadingError: it is unknown.
    """
    task = parameters.get("task")
    if task is None or task not in TASKS:
        raise ReadingError(f"parameter 'task' must be one of {', '.join(TASKS)}, found {task!r}")
    return TASKS[task]
