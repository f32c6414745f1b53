"""What the processor has: recipes and kernels differ by it, so each report says it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

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


def sentence(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, its cores and features, such as `AMD EPYC, 2 cores, AVX2`."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    told = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    flags = set(told.get("flags", "").split())
    found = [name for flag, name in FEATURES.items() if flag in flags]
    return ", ".join([told.get("model name", platform.machine()), f"{os.cpu_count()} cores", *found])
