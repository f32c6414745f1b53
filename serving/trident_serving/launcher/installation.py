"""Finds the `tritonserver` of this machine: the container's, or the one in the nvidia-pytriton wheel."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from trident_serving.errors import StartError
from trident_serving.launcher import backend_folder, preflight

CONTAINER_ROOT = Path("/opt/tritonserver")


@dataclass(frozen=True)
class Installation:
    """One tritonserver.

    Attributes:
        binary: the program.
        backends: its backend folder.
        stub: the Python backend's stub for this interpreter.
        caches: its folder of response caches; None: the server's default.
    """

    binary: Path
    backends: Path
    stub: Path
    caches: Path | None

    @property
    def has_native_onnxruntime(self) -> bool:
        """Whether the server brings the C++ ONNX Runtime backend."""
        return (self.backends / "onnxruntime" / "libtriton_onnxruntime.so").exists()


def find(container_root: Path = CONTAINER_ROOT) -> Installation:
    """The installation to start.

    Raises:
        StartError: there is no installation, it does not run, or it lacks our backends or a stub for this interpreter.
    """
    preflight.check_python()
    if (container_root / "bin" / "tritonserver").exists():
        backends = container_root / "backends"
        return _checked(
            Installation(
                binary=container_root / "bin" / "tritonserver",
                backends=backends,
                stub=backends / "python" / "triton_python_backend_stub",
                caches=container_root / "caches",
            )
        )
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise StartError(
            f"there is no tritonserver: neither {container_root}/bin/tritonserver nor the Python package "
            "nvidia-pytriton: install it with pip install 'trident-serving[serve]'"
        )
    root = Path(next(iter(spec.submodule_search_locations))) / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return _checked(
        Installation(
            binary=root / "bin" / "tritonserver",
            backends=root / "backends",
            stub=root / "python_backend_stubs" / version / "triton_python_backend_stub",
            caches=root / "caches",
        )
    )


def _checked(installation: Installation) -> Installation:
    for path, what in ((installation.binary, "server"), (installation.stub, "Python backend's stub")):
        if not path.exists():
            raise StartError(
                f"the {what} is missing: {path} (Python {sys.version_info.major}.{sys.version_info.minor})"
            )
    try:
        # It prints its flags and exits with any status; a program that can't be loaded exits with 127.
        run = subprocess.run([str(installation.binary), "--help"], capture_output=True, text=True, check=False)
        problem = run.stderr.strip().splitlines()[-1] if run.returncode == 127 and run.stderr.strip() else ""
    except OSError as error:
        problem = str(error.strerror)
    if problem:
        raise StartError(f"{installation.binary} does not run here ({problem}): install what it names")
    backend_folder.check(installation)
    return installation
