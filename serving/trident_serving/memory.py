"""How much memory this process may still take: the machine's, or its container's where that is less."""

from __future__ import annotations

from pathlib import Path


def available_bytes(root: Path = Path("/")) -> int:
    """The smaller of the kernel's MemAvailable and what the control group (version 2 or 1) has left."""
    meminfo = (root / "proc/meminfo").read_text(encoding="ascii")
    kibibytes = next(line.split()[1] for line in meminfo.splitlines() if line.startswith("MemAvailable:"))
    available = int(kibibytes) * 1024
    for limit, used in (
        ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            allowed, taken = ((root / name).read_text(encoding="ascii").strip() for name in (limit, used))
        except OSError:
            continue
        if allowed.isdecimal():
            available = min(available, int(allowed) - int(taken))
    return max(available, 0)
