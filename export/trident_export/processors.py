"""What a processor has for matmuls of 8 bits, which decides how a variant is made where its recipe says so.

ONNX Runtime chooses its kernels by the same flags. Every recipe computes the same on all of them; only speed differs.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from pathlib import Path


class Processor(StrEnum):
    """A kind of processor, by the best instructions that it has."""

    AMX = "amx"
    VNNI = "vnni"
    AVX2 = "avx2"
    OTHER = "other"


# Flags of Linux, all of a set, from the best on.
_FLAGS: tuple[tuple[Processor, frozenset[str]], ...] = (
    (Processor.AMX, frozenset({"amx_tile", "amx_int8"})),
    (Processor.VNNI, frozenset({"avx512_vnni"})),
    (Processor.VNNI, frozenset({"avx_vnni"})),
    (Processor.AVX2, frozenset({"avx2"})),
)
CPUINFO = Path("/proc/cpuinfo")


def of(found: Collection[str]) -> Processor:
    """The kind of a processor that has these flags, as Linux names them."""
    return next((processor for processor, needed in _FLAGS if needed <= set(found)), Processor.OTHER)


def flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """What Linux says that this machine's processor has; nothing where the system does not say.

    Args:
        cpuinfo: where it says so.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def this_machine(cpuinfo: Path = CPUINFO) -> Processor:
    """The kind of this machine's processor; `OTHER` where the system does not say."""
    return of(flags(cpuinfo))
