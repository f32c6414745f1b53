"""Whether /dev/shm is large enough: tensors travel through it between tritonserver and its Python backends.

Each Python backend takes one region of a mebibyte when it is loaded. It grows with the largest requests and answers
that the model has seen, and never shrinks. Where there is no room a load fails, or the request that wanted to grow
a region, with INTERNAL. A container has 64 MiB where nobody says otherwise.
"""

from __future__ import annotations

import os
from pathlib import Path

from trident_serving.errors import StartError

FOLDER = Path("/dev/shm")
MEBIBYTE = 2**20
REGION_MIB = 1  # of a Python backend, from its load on
# For requests and answers to grow into. Four callers at once, each with 32 texts of 256 KiB, the most that one request
# may hold, took 16 MiB.
SPARE_MIB = 32


def check(models: int, folder: Path = FOLDER) -> None:
    """There must be room for the regions of so many models, and for requests.

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
