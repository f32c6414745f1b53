"""Checks that /dev/shm is large enough: tensors travel through it between tritonserver and its Python backends.

Each Python backend takes one region of a mebibyte when it is loaded. The region grows with the largest requests and
answers of its model, and never shrinks. Without room a load fails, and a request that needs a larger region fails with
INTERNAL. A container has 64 MiB by default.
"""

from __future__ import annotations

import os
from pathlib import Path

from trident_serving.errors import StartError

FOLDER = Path("/dev/shm")
MEBIBYTE = 2**20
REGION_MIB = 1  # of each Python backend when it is loaded
# Room for requests and answers. Four callers at once, each with 32 texts of 256 KiB, the most that one request may
# hold, took 16 MiB.
SPARE_MIB = 32


def check(models: int, folder: Path = FOLDER) -> None:
    """Check that there is room for the regions of this many models, and for requests.

    Raises:
        StartError: there is less; the message says what a container needs.
    """
    try:
        status = os.statvfs(folder)
    except OSError as error:
        raise StartError(
            f"{folder} can't be used ({error.strerror}): tritonserver needs it, mount a tmpfs there"
        ) from None
    free = status.f_bavail * status.f_frsize // MEBIBYTE
    needed = models * REGION_MIB + SPARE_MIB
    if free < needed:
        raise StartError(
            f"{folder} has {free} MiB free, and {models} models need {needed} MiB ({REGION_MIB} each, {SPARE_MIB} for "
            "requests): give a container more with --shm-size=1g, or serve fewer models"
        )
