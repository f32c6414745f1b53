"""How encoder tasks are exported; see `trident_export.tasks`. A module each, with what differs between them.

A new task is a module with an `EncoderExport`, of the same name as its other half in `trident_serving.encoders`.
"""

from __future__ import annotations

import importlib
from typing import Any

from trident_export import tasks
from trident_export.tasks.encoders.base import EncoderExport


def of(task: str) -> EncoderExport[Any]:
    """The export of a task, by the transformers pipeline's name."""
    export: EncoderExport[Any] = importlib.import_module(tasks.MODULES[task]).EXPORT
    return export
