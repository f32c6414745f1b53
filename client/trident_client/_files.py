"""Files that a call takes: their bytes or their paths."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trident_client._errors import InvalidRequestError
from trident_client._types import File

_ADDRESS = re.compile(r"https?:/|data:[\w/.+-]*[;,]", re.IGNORECASE)  # Path makes one slash of two
_SHOWN = 60  # characters of an address


def is_file(given: File | Sequence[File]) -> bool:
    """Whether it is one file and not several."""
    return isinstance(given, bytes | bytearray | memoryview | str | Path)


def content_of(file: File) -> bytes:
    """The bytes of a file.

    Raises:
        InvalidRequestError: it is an address.
        TypeError: it is neither bytes nor a path.
        ValueError: the path is empty.
        OSError: it can't be read.
    """
    if isinstance(file, bytes | bytearray | memoryview):
        return bytes(file)
    if not isinstance(file, str | os.PathLike):
        raise TypeError(f"a file is given by its bytes or its path, found {type(file).__name__}")
    if isinstance(file, str) and _ADDRESS.match(file):
        raise InvalidRequestError(
            f"{file[:_SHOWN]!r} is an address, and none is fetched: give the file's bytes or path"
        )
    if not os.fspath(file):
        raise ValueError("the path of a file is empty: name one")
    return Path(file).read_bytes()


def tensor_of(contents: list[bytes]) -> NDArray[np.object_]:
    """Files as a BYTES tensor [files]."""
    found = np.empty(len(contents), np.object_)
    found[:] = contents
    return found
