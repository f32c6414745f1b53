"""Connects a launcher and the backend processes of its server through files in a private folder.

    <folder>/alive                          a FIFO that the launcher holds open: the kernel tells the others of its end
    <folder>/control                        one byte, written by the launcher: whether new requests are refused
    <folder>/pass                           shows that a request comes from a model of this server
    <folder>/processes/<pid>:<ver>:<model>  one record for each backend process: its heartbeat and its open requests

The launcher names the folder in the environment. A server that another program has started has no such folder; its
backends work unwatched. Records are mapped into memory, so that a write takes less than a microsecond.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = "TRIDENT_RUNTIME_FOLDER"
# The address of the server's gRPC port, which the launcher sets.
ADDRESS_ENVIRONMENT = "TRIDENT_GRPC_ADDRESS"
BEAT_SECONDS = 0.5
# The request parameter that carries the pass.
PASS_PARAMETER = "trident_pass"
# A process whose engine has open requests and makes no step for this long hangs. A step of a large model takes seconds.
STALL_SECONDS = 60.0
_RECORD = struct.Struct("<dqqq")
_DRAINING = b"\1"


@dataclass(frozen=True)
class Record:
    """A backend process as it was when its record was read.

    Attributes:
        pid: the process.
        model: its Triton model.
        version: the version that it serves.
        beat: its last heartbeat, in seconds of the system's monotonic clock; 0.0 before it is ready.
        open: requests whose answers are not complete.
        held: those of them whose callers hear nothing if it dies; Triton answers the others.
        taken: requests that it has ever been given. Triton gives a process none before it serves with it.
    """

    path: Path
    pid: int
    model: str
    version: str
    beat: float
    open: int
    held: int
    taken: int = 0


class RuntimeFolder:
    """The launcher's side."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # By file name and inode: a launcher reads them five times a second, beside models that want its core.
        self._maps: dict[tuple[str, int], mmap.mmap] = {}
        (folder / "processes").mkdir(mode=0o700, parents=True)
        # Open for ever, and in no other process: nothing closes it but the end of this one.
        os.mkfifo(folder / "alive", 0o600)
        os.open(folder / "alive", os.O_RDWR | os.O_NONBLOCK)
        (folder / "control").write_bytes(b"\0")
        (folder / "pass").write_text(secrets.token_hex(), encoding="ascii")

    def drain(self) -> None:
        """Tell every backend to refuse new requests."""
        with (self.folder / "control").open("r+b") as file:
            file.write(_DRAINING)

    def records(self) -> list[Record]:
        """The records of the backend processes, including those that have died."""
        maps: dict[tuple[str, int], mmap.mmap] = {}
        found = []
        for entry in self._entries():
            key = entry.name, entry.inode()
            try:
                record = maps[key] = self._maps.get(key) or _map(entry.path)
            except (OSError, ValueError):
                continue  # it has just gone, or is being made
            beat, count, held, taken = _RECORD.unpack_from(record)
            pid, version, model = entry.name.split(":", 2)
            found.append(Record(Path(entry.path), int(pid), model, version, beat, count, held, taken))
        self._maps = maps
        return found

    def clear(self) -> None:
        """Remove all records, once their server has ended."""
        for entry in self._entries():
            Path(entry.path).unlink(missing_ok=True)

    def _entries(self) -> list[os.DirEntry[str]]:
        """The records' files; [] if the folder was removed, as programs that clean /tmp do: then nothing is watched."""
        try:
            with os.scandir(self.folder / "processes") as entries:
                return list(entries)
        except OSError:
            return []


def _map(path: str) -> mmap.mmap:
    """A record, as its process writes it.

    Raises:
        OSError: it has gone.
        ValueError: it is empty.
    """
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), _RECORD.size, access=mmap.ACCESS_READ)


class Process:
    """A backend process's side.

    Args:
        model: the Triton model.
        version: its version.
        folder: the launcher's folder; None: no launcher watches.

    Attributes:
        own_pass: what its own requests to this server carry; "" without a launcher.
    """

    def __init__(self, model: str, version: str, folder: Path | None) -> None:
        self._lock = threading.Lock()
        self._open = self._held = self._taken = 0
        self._control: mmap.mmap | None = None
        self._record: mmap.mmap | None = None
        self._path: Path | None = None
        self._ended = threading.Event()
        self._server = os.getppid()
        self._progress: Callable[[], int] = lambda: 0
        self._busy: Callable[[], bool] = lambda: False
        self.own_pass = ""
        if folder is None or not folder.is_dir():
            return
        _end_with_launcher(folder / "alive")
        self.own_pass = (folder / "pass").read_text(encoding="ascii")
        with (folder / "control").open("rb") as file:
            self._control = mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ)
        self._path = folder / "processes" / f"{os.getpid()}:{version}:{model}"
        self._path.unlink(missing_ok=True)  # not shortened: a launcher may have it mapped
        with self._path.open("x+b") as file:
            file.write(bytes(_RECORD.size))
            file.flush()
            self._record = mmap.mmap(file.fileno(), _RECORD.size)

    @classmethod
    def register(cls, model: str, version: str) -> Process:
        """This process, with the folder that the environment names."""
        named = os.environ.get(ENVIRONMENT)
        return cls(model, version, Path(named) if named else None)

    @property
    def draining(self) -> bool:
        """Whether new requests are to be refused."""
        return self._control is not None and self._control[:1] == _DRAINING

    def holds_pass(self, value: object) -> bool:
        """Whether a request's parameter shows that a model of this server made it."""
        return bool(self.own_pass) and isinstance(value, str) and secrets.compare_digest(value, self.own_pass)

    @property
    def replaced(self) -> bool:
        """Whether another process serves the same version, or begins to; True where no launcher can tell."""
        if self._path is None:
            return True
        _, own = self._path.name.split(":", 1)
        others = (path.name.split(":", 1) for path in self._path.parent.iterdir() if path.name != self._path.name)
        return any(what == own for _, what in others)

    def start(self, progress: Callable[[], int] = lambda: 0, busy: Callable[[], bool] = lambda: False) -> None:
        """Start the heartbeat, once the model is loaded.

        Args:
            progress: a count that rises while the engine works.
            busy: whether the engine has work, so that its count must rise.
        """
        self._progress, self._busy = progress, busy
        if self._record is not None:
            threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def opened(self) -> None:
        """Count a request that this process answers through a response sender."""
        self._add(1, 1)

    def closed(self) -> None:
        """Count its last response."""
        self._add(-1, -1)

    @contextlib.contextmanager
    def answering(self, count: int) -> Iterator[None]:
        """Count requests that `execute` answers by its return value, for the time of a `with` block."""
        self._add(count, 0)
        try:
            yield
        finally:
            self._add(-count, 0)

    def ends(self) -> None:
        """Remove the record: the process ends as it should, and the launcher must not take it for one that doesn't."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def stop(self) -> None:
        """End the heartbeat, and remove the record."""
        self._ended.set()
        self.ends()

    def _add(self, count: int, held: int) -> None:
        with self._lock:
            self._open += count
            self._held += held
            self._taken += max(count, 0)
            if self._record is not None:
                struct.pack_into("<qqq", self._record, 8, self._open, self._held, self._taken)

    def _beat(self) -> None:
        assert self._record is not None
        seen, since = -1, time.monotonic()
        while True:
            if os.getppid() != self._server:  # an idle process ends without this; a busy one would work on
                os._exit(1)
            now = time.monotonic()
            if (count := self._progress()) != seen or not self._busy():
                seen, since = count, now
            if now - since < STALL_SECONDS:
                struct.pack_into("<d", self._record, 0, now)
            if self._ended.wait(BEAT_SECONDS):
                return


def _end_with_launcher(alive: Path) -> None:
    """Have the kernel end this process, by SIGIO, once the launcher has ended, and its server with it.

    A call into a server that was killed waits for ever, with Python's lock held, so that no thread of Python would see
    it. A clock would take a process that was frozen for one whose server is gone.
    """
    with contextlib.suppress(OSError):  # a sandbox may lack this signal; the heartbeat looks for the parent, too
        descriptor = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)  # for ever, too
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
