"""Folders that transformers 5 wrote, as libraries with transformers 4 read them, and whether a conversion is whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

_DONE = "converted"


def converted(folder: Path, convert: Callable[[Path], None]) -> Path:
    """A folder that a conversion fills; what one that failed has left is removed."""
    if not (folder / _DONE).exists():
        shutil.rmtree(folder, ignore_errors=True)
        convert(folder)
        (folder / _DONE).touch()
    return folder


def for_transformers_4(source: Path, work: Path) -> Path:
    """A copy whose config names the base of its rotation, and its tokenizer's class, as transformers 4 does.

    Without the first it would compute another model, and say nothing.
    """
    folder = work / "source"
    if not folder.exists():
        shutil.copytree(source, folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        rotation = config.pop("rope_parameters", None) or {}
        if rotation.get("rope_type", "default") != "default":
            raise ValueError(f"its rotation is {rotation['rope_type']}, which is not converted")
        config |= {key: rotation[key] for key in ("rope_theta",) if key in rotation}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
