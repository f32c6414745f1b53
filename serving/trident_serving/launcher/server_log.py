"""Prints the output of tritonserver and its backends, without lines that the user can't act on."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from typing import IO

# Lines about a missing GPU, and Triton's own on every machine (2.51); each appeared in a start that served well.
_NOISE = re.compile(
    r"CUDA driver version is insufficient|CudaDriverHelper has not been initialized|pinned system memory"
    r"|Failed to initialize NVML|DCGM unable to start|unable to create stream for|CUDA memory pool disabled"
    r"|model_config_content_name_ is empty|^Signal \(\d+\) received|failed to load 'shutting-down'"
)


def has_gpu(root: Path = Path("/dev")) -> bool:
    """Whether the machine shows an NVIDIA GPU."""
    return (root / "nvidiactl").exists() or (root / "dxg").exists()


class ServerLog:
    """Passes a server's output on, line by line, until it ends.

    Args:
        source: the server's standard output and error.
        everything: print every line.
    """

    def __init__(self, source: IO[bytes], *, everything: bool) -> None:
        self._source = source
        self._everything = everything
        self._thread = threading.Thread(target=self._pass_on, name="log", daemon=True)
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait until all output is printed, at most this many seconds."""
        self._thread.join(seconds)

    def _pass_on(self) -> None:
        for line in self._source:
            if self._everything or not is_noise(line.decode("utf-8", "replace")):
                sys.stderr.buffer.write(line)
                sys.stderr.flush()


def is_noise(line: str) -> bool:
    """Whether the reader of a line can't act on it."""
    return bool(_NOISE.search(line))
