"""What an export needs, said before it is begun: memory, room on the disk and time."""

from __future__ import annotations

import os
from collections.abc import Mapping

from trident_export import disk, memory
from trident_export.recipes import Kind, Recipe

# Seconds of one core for a billion parameters (docs/how-to/export-a-large-model.md): to read, trace and write
# the graph and ask Hugging Face; to write and to measure a variant.
_ONCE, _VARIANT = 200, 125
_STARTING = 40  # seconds, of the libraries


def sentence(parameters: int, kind: Kind, recipes: Mapping[str, Recipe]) -> str:
    """Of a model with so many parameters, on this machine."""
    room = memory.needed(parameters, kind) / memory.GIGABYTE
    space = disk.needed(4 * parameters, recipes) / memory.GIGABYTE
    return f"about {room:.1f} GB of memory, {space:.1f} GB of disk and {_minutes(parameters, len(recipes))}"


def _minutes(parameters: int, variants: int) -> str:
    cores = os.cpu_count() or 1
    minutes = (_STARTING + parameters / 1e9 * (_ONCE + _VARIANT * variants) / cores) / 60
    return "a minute" if minutes < 1.5 else f"{minutes:.0f} minutes"
