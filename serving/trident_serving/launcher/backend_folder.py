"""One backend folder for the server: its own backends, linked, and ours.

A Python-based backend may carry any name, so `onnxruntime` is our stand-in where the server has no native
one, and the same config.pbtxt is served in both places.
"""

from __future__ import annotations

from pathlib import Path

from trident_serving.launcher.installation import Installation

OUR_BACKENDS = Path(__file__).parents[2] / "backends"
STAND_IN = "onnxruntime"


def assemble(folder: Path, installation: Installation, ours: Path = OUR_BACKENDS) -> Path:
    """Fill an empty folder with links; returns it.

    The stub is linked, not copied: it finds its libraries by a path relative to itself.
    """
    for backend in sorted(installation.backends.iterdir()):
        if backend.is_dir() and backend.name != "python":
            (folder / backend.name).symlink_to(backend)
    python = folder / "python"
    python.mkdir()
    for file in sorted((installation.backends / "python").iterdir()):
        if file.name != installation.stub.name:
            (python / file.name).symlink_to(file)
    (python / installation.stub.name).symlink_to(installation.stub)
    for backend in sorted(ours.iterdir()):
        if (backend / "model.py").exists() and not (
            backend.name == STAND_IN and installation.has_native_onnxruntime
        ):
            (folder / backend.name).symlink_to(backend)
    return folder
