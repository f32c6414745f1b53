"""What the processor has: recipes and kernels differ by it, so each report says it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from trident_export import processors

# What kernels of matrix products look for, by the names of /proc/cpuinfo.
FEATURES = {
    "amx_int8": "AMX int8",
    "amx_bf16": "AMX bf16",
    "avx512_bf16": "AVX512 bf16",
    "avx512_vnni": "AVX512 VNNI",
    "avx_vnni": "AVX VNNI",
    "avx512f": "AVX512",
    "avx2": "AVX2",
}


def sentence(cpuinfo: Path = processors.CPUINFO) -> str:
    """The processor's name, its cores and features, such as `AMD EPYC, 2 cores, AVX2`."""
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = processors.flags(cpuinfo)
    return ", ".join([name, f"{os.cpu_count()} cores", *(text for flag, text in FEATURES.items() if flag in flags)])
