"""A process and all that it has started, as /proc shows them."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path


def children() -> dict[int, list[int]]:
    """The processes of this machine, by the one that started them; [] of one that has started none."""
    found: dict[int, list[int]] = defaultdict(list)
    for folder in Path("/proc").glob("[0-9]*"):
        if fields := stat(int(folder.name)):
            found[int(fields[1])].append(int(folder.name))
    return found


def descendants(root: int) -> list[int]:
    """A process and all that it has started, as far as they still run."""
    started = children()
    found = [root]
    for process in found:
        found += started[process]
    return found


def stat(process: int) -> list[str]:
    """Fields of /proc/<pid>/stat, from the state on; [] once it has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
