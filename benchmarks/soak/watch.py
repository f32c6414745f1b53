"""Samples a server while it works, from Linux and from the metrics port."""

from __future__ import annotations

import re
import threading
import time
import urllib.request
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import processes as process_tree
from benchmarks.soak.calls import Address

SERVER = "tritonserver"
LAUNCHER = "launcher"
GATEWAY = "gateway"
SHARED_MEMORY = Path("/dev/shm")
GAUGES = ("trident_slots_used", "trident_requests_running", "trident_requests_waiting")
_GAUGE = re.compile(r'^(trident_\w+)\{[^}]*model="([^"]+)"[^}]*\} (\S+)$', re.MULTILINE)
LARGE_KIB = 32 * 1024
# Of a mapping in /proc/<pid>/smaps: its size, its name and its anonymous pages, in KiB.
_MAPPING = re.compile(
    r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)\nSize: +(\d+) kB$(?:\n(?![0-9a-f]+-).*)*?\nAnonymous: +(\d+) kB$",
    re.MULTILINE,
)
_INSTANCE = re.compile(r"_\d+_\d+$")
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass
class Series:
    """What one process used over time: seconds since the beginning, bytes, and counts."""

    pid: int
    times: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    threads: list[float] = field(default_factory=list)
    files: list[float] = field(default_factory=list)


class Watch:
    """Samples the processes of a server, on a thread of its own.

    Args:
        launcher: the process of `python -m trident_serving`.
        http_port: of the server; its regions' names contain it.
        period: seconds between two samples.

    Attributes:
        series: by process name: tritonserver, or the model of a backend process; one for each process that had it.
        shared: times and bytes of the server's regions.
    """

    def __init__(self, launcher: int, http_port: int, period: float) -> None:
        self._launcher = launcher
        self._prefix = f"trident-{launcher}-{http_port}-"
        self._period = period
        self._began = time.monotonic()
        self._ended = threading.Event()
        self.series: dict[str, list[Series]] = defaultdict(list)
        self.shared: tuple[list[float], list[float]] = ([], [])
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take no more samples."""
        self._ended.set()
        self._thread.join()

    def sample(self) -> None:
        """Take one."""
        now = time.monotonic() - self._began
        for name, pid in processes(self._launcher):
            try:
                memory, threads = _status(pid)
                files = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
            except OSError:
                continue  # it has just gone
            several = self.series[name]
            if not several or several[-1].pid != pid:
                several.append(Series(pid))
            several[-1].times.append(now)
            several[-1].memory.append(memory)
            several[-1].threads.append(threads)
            several[-1].files.append(files)
        self.shared[0].append(now)
        self.shared[1].append(_size_of_regions(self._prefix))

    def _loop(self) -> None:
        while not self._ended.wait(self._period):
            self.sample()


def processes(launcher: int) -> list[tuple[str, int]]:
    """The launcher, tritonserver, the backend processes and the gateway, each by its name and its process id."""
    children = process_tree.children()
    found = [(LAUNCHER, launcher)]
    for server in children[launcher]:
        if _command(server)[0].endswith(SERVER):
            found.append((SERVER, server))
            found += [(name, pid) for pid in children[server] if (name := _model(pid))]
        elif "trident_gateway" in _command(server):
            found.append((GATEWAY, server))
    return found


def gauges(address: Address) -> dict[str, float]:
    """The slots and requests that the engines hold, by "gauge of model"."""
    with _OPENER.open(f"http://127.0.0.1:{address.metrics_port}/metrics", timeout=30) as response:
        text = response.read().decode()
    return {f"{name} of {model}": float(value) for name, model, value in _GAUGE.findall(text) if name in GAUGES}


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:
        return [""]


def _model(pid: int) -> str:
    """The model of a backend process; "" for any other."""
    command = _command(pid)
    if "python_backend_stub" not in command[0]:
        return ""
    names = [word for word in command if _INSTANCE.search(word)]
    return _INSTANCE.sub("", names[-1]) if names else Path(command[1]).parents[1].name


def _status(pid: int) -> tuple[float, float]:
    """Memory in bytes, without pages of files, which the system frees as it likes; and the number of threads."""
    threads = re.search(r"^Threads:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    memory = memory_of(Path(f"/proc/{pid}/smaps").read_text())
    if threads is None or not memory:
        raise ProcessLookupError(pid)
    return memory, float(threads[1])


def memory_of(smaps: str) -> float:
    """Bytes of a process's own memory: the resident pages of its mappings; a large mapping counts whole.

    Large mappings are weights and the KV cache, whose pages come and go with the slots in use. Their size is fixed, so
    a new mapping or one that grows is seen, while the use of the cache does not look like a leak.
    """
    total = 0
    for name, size, anonymous in _MAPPING.findall(smaps):
        large = int(size) >= LARGE_KIB and name != "[heap]"
        total += int(size) if large and int(anonymous) else int(anonymous)
    return total * 1024.0


def _size_of_regions(prefix: str) -> float:
    total = 0
    for region in SHARED_MEMORY.glob(f"{prefix}*"):
        try:
            total += region.stat().st_blocks * 512
        except OSError:
            continue
    return float(total)
