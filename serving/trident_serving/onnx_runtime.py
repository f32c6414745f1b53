"""Chooses the ONNX Runtime of a process: the environment's own, or the build for GPUs that an image also holds.

Graphs for CPUs need the newest ONNX Runtime, which has no build for GPUs, so the image for GPUs holds two (decision
0023). Both are the module `onnxruntime`, so a process can import only one; every served model has its own process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

CUDA_RUNTIME = "TRIDENT_CUDA_RUNTIME"


def choose(device: str, environment: Mapping[str, str] = os.environ) -> None:
    """Let `import onnxruntime` find the runtime for a device, `cpu` or `cuda`; call it before any such import.

    `cuda` gets the onnxruntime in the folder that the variable TRIDENT_CUDA_RUNTIME names. Without such a folder
    nothing changes, and `runtime.session.open_session` says what is missing.

    Raises:
        RuntimeError: an ONNX Runtime is imported already.
    """
    folder = Path(environment.get(CUDA_RUNTIME, ""))
    if device != "cuda" or not environment.get(CUDA_RUNTIME) or not (folder / "onnxruntime").is_dir():
        return
    if "onnxruntime" in sys.modules:
        raise RuntimeError(f"onnxruntime is imported already, from {sys.modules['onnxruntime'].__file__}")
    sys.path.insert(0, str(folder))
