"""Files that a call takes: their bytes or their paths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trident_client._types import File


def is_file(given: File | Sequence[File]) -> bool:
    """Whether it is one file and not several."""
    return isinstance(given, bytes | bytearray | memoryview | str | Path)


def content_of(file: File) -> bytes:
    """The bytes of a file.

    Raises:
        OSError: it can't be read.
    """
    return bytes(file) if isinstance(file, bytes | bytearray | memoryview) else Path(file).read_bytes()


def tensor_of(contents: list[bytes]) -> NDArray[np.object_]:
    """Files as a BYTES tensor [files]."""
    found = np.empty(len(contents), np.object_)
    found[:] = contents
    return found
