"""How much memory this process may still take: the machine's, or what its control groups leave where that is less.

A container and a systemd unit are control groups, version 2 or 1 or both. Each group between the
process's own and the root may have a limit, so the smallest room counts. A container that has a namespace of its own
sees its group as the root of the mount; that is the same walk with no step.
Sources: the kernel's Documentation/admin-guide, cgroup-v2.rst and cgroup-v1/memory.rst; `si_mem_available` in
mm/show_mem.c for what of the page cache counts as free; proc_pid_mountinfo(5) and cgroups(7) for the two files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

MEBIBYTE = 2**20


@dataclass(frozen=True)
class _Version:
    """The names of one version's files.

    Attributes:
        mount: where the hierarchy is where /proc does not say.
        limits: files with a limit in bytes; a word in place of a number is none. Beyond `memory.high` the kernel slows
            a process down until it stands, so that is a limit too.
        used: the file with the bytes that are charged, page cache among them.
        inactive: the key of memory.stat for page cache that is taken back first.
        halves: keys for what can be taken back, of which a part is needed again.
        inherited: the key for the smallest limit of the groups above, which may be out of sight.
    """

    mount: str
    limits: tuple[str, ...]
    used: str
    inactive: str
    halves: tuple[str, ...]
    inherited: str = ""


_V2 = _Version(
    "/sys/fs/cgroup",
    ("memory.max", "memory.high"),
    "memory.current",
    "inactive_file",
    ("active_file", "slab_reclaimable"),
)
_V1 = _Version(
    "/sys/fs/cgroup/memory",
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    "total_inactive_file",
    ("total_active_file",),
    "hierarchical_memory_limit",
)


def available_bytes(root: Path = Path("/")) -> int:
    """The smaller of the kernel's MemAvailable and the room in each control group that this process is in.

    Args:
        root: goes before every path; for tests.
    """
    meminfo = (root / "proc/meminfo").read_text(encoding="ascii")
    kibibytes = next(line.split()[1] for line in meminfo.splitlines() if line.startswith("MemAvailable:"))
    rooms = [room for version in (_V2, _V1) for folder in _groups(root, version) for room in _room(folder, version)]
    return max(0, min([int(kibibytes) * 1024, *rooms]))


def _groups(root: Path, version: _Version) -> Iterator[Path]:
    """The folders of this process's group and of all above it that can be seen, its own first."""
    own = _own_group(root, version)
    for mounted, mount in _mounts(root, version) or [(PurePosixPath("/"), PurePosixPath(version.mount))]:
        # A group out of the mount's sight, of another namespace: the mount's own root is the nearest that is seen.
        below = own.relative_to(mounted) if own.is_relative_to(mounted) and ".." not in own.parts else PurePosixPath()
        top = root / mount.relative_to("/")
        folder = top / below
        while True:
            yield folder
            if folder == top:
                break
            folder = folder.parent


def _own_group(root: Path, version: _Version) -> PurePosixPath:
    """From /proc/self/cgroup, whose lines are `hierarchy:controllers:path`; version 2 has no controllers in it."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if (version is _V2 and not controllers) or (version is _V1 and "memory" in controllers.split(",")):
            return PurePosixPath(path)
    return PurePosixPath("/")


def _mounts(root: Path, version: _Version) -> list[tuple[PurePosixPath, PurePosixPath]]:
    """Where hierarchies of this version are mounted: which group is the mount's root, and the folder."""
    found = []
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, (kind, _, options) = before.split(), after.split()[:3]
        if (kind == "cgroup2") if version is _V2 else (kind == "cgroup" and "memory" in options.split(",")):
            found.append((PurePosixPath(_unescaped(fields[3])), PurePosixPath(_unescaped(fields[4]))))
    return found


def _unescaped(text: str) -> str:
    """Spaces and the like are written as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _room(folder: Path, version: _Version) -> Iterator[int]:
    """What a group may still take, in bytes; nothing where it has no limit.

    Page cache is charged to the group that first read the file, and is given back when memory is wanted. As in the
    kernel's MemAvailable the inactive part counts as free. Of the active part, and of slabs that can be taken back,
    half counts: the kernel keeps the smaller of half and its low watermark, and a group has no watermark.
    """
    used = _number(folder / version.used)
    if used is None:
        return
    statistics = dict(line.split() for line in _lines(folder / "memory.stat"))
    limits = [limit for name in version.limits if (limit := _number(folder / name)) is not None]
    if version.inherited in statistics:
        limits.append(int(statistics[version.inherited]))
    reclaimable = int(statistics.get(version.inactive, 0))
    reclaimable += sum(int(statistics.get(key, 0)) for key in version.halves) // 2
    for limit in limits:
        yield limit - used + min(reclaimable, used)


def _number(file: Path) -> int | None:
    text = "".join(_lines(file)).strip()
    return int(text) if text.isdecimal() else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
