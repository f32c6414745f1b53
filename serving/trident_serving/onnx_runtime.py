"""Which ONNX Runtime a process gets: the environment's own, or the one for GPUs that an image has beside it.

The newest ONNX Runtime has no build for GPUs, and graphs for CPUs need it; so the image for GPUs holds both (decision
0023). Both are the module `onnxruntime`: a process has one of them, and every served model has a process of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

CUDA_RUNTIME = "TRIDENT_CUDA_RUNTIME"


def choose(device: str, environment: Mapping[str, str] = os.environ) -> None:
    """Let `import onnxruntime` find the runtime for a device, `cpu` or `cuda`; called before anything imports it.

    Where the variable TRIDENT_CUDA_RUNTIME names a folder with an onnxruntime, `cuda` gets that one. Elsewhere nothing
    changes, and `runtime.session.open_session` says what is missing.

    Raises:
        RuntimeError: an ONNX Runtime is imported already.
    """
    folder = Path(environment.get(CUDA_RUNTIME, ""))
    if device != "cuda" or not environment.get(CUDA_RUNTIME) or not (folder / "onnxruntime").is_dir():
        return
    if "onnxruntime" in sys.modules:
        raise RuntimeError(f"onnxruntime is imported already, from {sys.modules['onnxruntime'].__file__}")
    sys.path.insert(0, str(folder))
