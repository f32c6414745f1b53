"""Room on the disk, asked for before anything is written."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from trident_export.recipes import Recipe


class NoSpace(RuntimeError):
    """The disk has too little room."""


def needed(weights: int, recipes: Mapping[str, Recipe]) -> int:
    """Bytes that an export writes at most, the traced graph and a variant for each recipe, for so many of weights."""
    # A tied output head is stored twice in a graph, and it is the largest matrix of a small model.
    return int(weights * 1.3 * (1 + sum(recipe.size for recipe in recipes.values()))) + 2**26


def require(folder: Path, weights: int, recipes: Mapping[str, Recipe]) -> None:
    """Check the disk of `folder`.

    Raises:
        NoSpace: it has too little room for the export.
    """
    room = shutil.disk_usage(folder).free
    wanted = needed(weights, recipes)
    if room < wanted:
        raise NoSpace(
            f"the export needs {wanted / 2**20:.0f} MiB in {folder}, and {room / 2**20:.0f} MiB are free: "
            "make room, or choose another folder with REPOSITORY=..."
        )
