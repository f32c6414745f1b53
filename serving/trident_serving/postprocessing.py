"""The last stage of an ensemble: what a task makes of its model's output tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from trident_serving.pooling import PoolingSettings, normalize, pool

Tensors = Mapping[str, NDArray[Any]]
Postprocess = Callable[[Tensors], Tensors]


def create(parameters: Mapping[str, str], folder: Path) -> Postprocess:
    """The postprocess that a config's `parameters` name, with its settings from the version folder.

    Raises:
        ValueError: the task is unknown, or a setting is malformed.
    """
    task = parameters.get("task")
    if task not in _TASKS:
        raise ValueError(f"parameter 'task' must be one of {', '.join(_TASKS)}, found {task!r}")
    return _TASKS[task](folder)


def _embedding(folder: Path) -> Postprocess:
    settings = PoolingSettings.load(folder)

    def postprocess(tensors: Tensors) -> Tensors:
        vectors = pool(tensors["last_hidden_state"], tensors["attention_mask"], settings.pooling)
        return {"embedding": normalize(vectors) if settings.normalize else vectors}

    return postprocess


_TASKS: dict[str, Callable[[Path], Postprocess]] = {"feature-extraction": _embedding}
