"""Folders in the cache that are made from a source once: dequantized or merged, and then plain Hugging Face folders."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from trident_export import disk

# What an export reads of a folder beside its weights; weights in other formats would only cost time and room.
SETTINGS_FILES = (
    "*.json",
    "*.txt",
    "*.model",
    "*.spm",
    "*.jinja",
    "[0-9]_*/*",
    "additional_chat_templates/*",
)


def convert(cache: Path, name: str, parts: object, room: int, write: Callable[[Path], None]) -> Path:
    """The folder that `write` makes; made when it is not there yet, and there only when it is whole.

    Args:
        cache: where it is kept.
        name: of the source, for people.
        parts: all that decides what is written, as plain data.
        room: bytes that are written at most.
        write: writes into the folder that it is given.

    Raises:
        NoSpace, NotWritable: the cache can't take it.
    """
    digest = hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()
    folder = cache / "sources" / f"{name}-{digest[:16]}"
    if folder.exists():
        return folder
    with disk.writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        disk.require_room(scratch, room)
        with disk.writing(scratch):
            write(scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process made it meanwhile
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def copy_settings(source: Path, folder: Path, patterns: Iterable[str] = (*SETTINGS_FILES, "*.py")) -> None:
    """Copy what a folder has beside its weights; what is there already is left."""
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            target = folder / file.relative_to(source)
            if file.is_file() and not file.name.endswith(".index.json") and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)


def state(path: Path) -> list[object]:
    """What tells one state of a file or folder from another, cheap enough for every start."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
