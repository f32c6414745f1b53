"""Makes one backend folder for the server: its own backends and ours.

A Python-based backend may carry any name, so `onnxruntime` is our stand-in where the server has no native
one, and the same config.pbtxt is served in both places.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from trident_serving.errors import StartError

if TYPE_CHECKING:
    from trident_serving.launcher.installation import Installation

OUR_BACKENDS = Path(__file__).parents[1] / "_backends"
STAND_IN = "onnxruntime"
NAMES = (
    STAND_IN,
    "trident_explain",
    "trident_generator",
    "trident_postprocess",
    "trident_seq2seq",
    "trident_speech",
    "trident_template",
    "trident_tokenizer",
    "trident_vllm",
)


def missing(installation: Installation, ours: Path = OUR_BACKENDS) -> list[Path]:
    """Our backends that the installation lacks; the stand-in counts only where there is no native backend."""
    folders = sorted(path.parent for path in ours.glob("*/model.py"))
    return [
        folder
        for folder in folders
        if not (installation.backends / folder.name).exists()
        and not (folder.name == STAND_IN and installation.has_native_onnxruntime)
    ]


def check(installation: Installation, ours: Path = OUR_BACKENDS) -> None:
    """Check that the server has every backend, or that `prepare` can make a folder with all of them.

    Raises:
        StartError: this package lacks backends; or the installation lacks ours and has native ones, which can't be
            copied.
    """
    if lost := [name for name in NAMES if not (ours / name / "model.py").exists()]:
        raise StartError(
            f"{ours} lacks the backends {', '.join(lost)}: the package is not whole, install it again with "
            "pip install --force-reinstall --no-deps trident-serving"
        )
    lacking = missing(installation, ours)
    natives = sorted(path.name for path in installation.backends.iterdir() if path.is_dir() and path.name != "python")
    if lacking and natives:
        raise StartError(
            f"{installation.backends} lacks {', '.join(path.name for path in lacking)}: copy them there from "
            f"{ours}, as deploy/Dockerfile does"
        )


def prepare(folder: Path, installation: Installation) -> Path:
    """The backend folder for the server: the installation's own if it has ours, as in our images; else `folder`, which
    is filled.

    Raises:
        StartError: see `check`.
    """
    check(installation)
    ours = missing(installation)
    if not ours:
        return installation.backends
    # Files are copied, because the server refuses a library that is a link out of the folder. The stub is linked,
    # because it finds its libraries by a path relative to itself.
    shutil.copytree(installation.backends / "python", folder / "python", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "python" / installation.stub.name).unlink(missing_ok=True)
    (folder / "python" / installation.stub.name).symlink_to(installation.stub)
    for backend in ours:
        shutil.copytree(backend, folder / backend.name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder
