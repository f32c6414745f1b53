"""Memory that an export takes at its peak, asked for before the heavy work, as `disk` asks for room.

    bytes = base + copies x 4 bytes x parameters of the weight files

Measured as the peak resident set of whole exports on 2 cores, decimal GB (docs/decisions/0020-memory-of-an-export.md).
No step holds the weights twice: they are Hugging Face's, or a session's, or in files (`graphs.editing`). What is beside
them are the libraries, one matrix, the logits that the gate compares, and pages of the files that are being read.
"""

from __future__ import annotations

from trident_export.errors import NoMemory
from trident_export.recipes import Kind
from trident_serving.memory import available_bytes

GIGABYTE = 10**9
# By kind of model: what the libraries and the gate take whatever the model is, and copies of the weights.
_BASE = {Kind.DECODER: 2.0 * GIGABYTE, Kind.SEQ2SEQ: 0.6 * GIGABYTE, Kind.ENCODER: 0.9 * GIGABYTE}
_COPIES = {Kind.DECODER: 1.6, Kind.SEQ2SEQ: 7.7, Kind.ENCODER: 2.1}


def needed(parameters: int, kind: Kind) -> int:
    """Bytes that the export of a model takes at its peak, by the measurements above.

    Args:
        parameters: numbers in its weight files.
    """
    return int(_BASE[kind] + _COPIES[kind] * 4 * parameters)


def require(name: str, parameters: int, kind: Kind, *, force: bool = False) -> None:
    """Check what this process may still take.

    Args:
        name: of the model.
        force: go on nevertheless.

    Raises:
        NoMemory: it is too little.
    """
    wanted, room = needed(parameters, kind), available_bytes()
    if wanted > room and not force:
        raise NoMemory(
            f"the export of {name} ({parameters / 1e6:.0f} M parameters) needs about {wanted / GIGABYTE:.1f} GB of "
            f"memory, and {room / GIGABYTE:.1f} GB are available: close other programs, raise the limit of the "
            "container, export on a larger machine, or go on all the same with FORCE=1 (--force)"
        )
