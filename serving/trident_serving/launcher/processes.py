"""Reads and changes other processes of Linux: state, memory, connections, limits."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

_SYS_PIDFD_GETFD = 438
_PR_SET_PDEATHSIG = 1
# Fields of /proc/<pid>/stat, counted from the state, which comes after the command's name.
_STATE, _UTIME, _STIME, _STARTED, _ARG_START, _ARG_END = 0, 11, 12, 19, 45, 46


@dataclass(frozen=True)
class ProcessState:
    """A process as /proc shows it.

    Attributes:
        letter: its state: R, S, D (waits for a disk), T and t (stopped), Z and X (dead); "" if it does not exist.
        ticks: processor time that it has used, in clock ticks.
        started: when, in clock ticks of the system.
    """

    letter: str
    ticks: int = 0
    started: int = 0

    @property
    def dead(self) -> bool:
        """Whether it has ended; a zombie has."""
        return self.letter in ("", "Z", "X")

    @property
    def stopped(self) -> bool:
        """Whether a signal or a debugger has stopped it."""
        return self.letter in ("T", "t")


def state(pid: int) -> ProcessState:
    """The state of a process."""
    fields = _stat(pid)
    if not fields:
        return ProcessState("")
    return ProcessState(fields[_STATE], int(fields[_UTIME]) + int(fields[_STIME]), int(fields[_STARTED]))


def has_children(pid: int) -> bool:
    """Whether a process has started others that still run."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
        return any(Path(f"/proc/{pid}/task/{thread}/children").read_text() for thread in threads)
    except OSError:
        return False


def kill(pid: int) -> None:
    """End a process at once, if it exists."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def before_server() -> None:
    """For `preexec_fn`: end the server with its launcher, even a killed one, and raise its limit of open files.

    A cancelled stream sometimes leaves a socket open in the server (2.51).
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def hide_argument(pid: int, secret: str) -> bool:
    """Overwrite a secret in another process's command line, which every user of the machine can read.

    Returns:
        Whether it is hidden; a system may not allow it.
    """
    try:
        fields = _stat(pid)
        start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
        with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(start)
            arguments = memory.read(end - start)
            memory.seek(start)
            memory.write(arguments.replace(secret.encode(), b"*" * len(secret)))
        return secret.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, IndexError, ValueError):
        return False


def close_connections(pid: int, ports: Collection[int]) -> bool:
    """Close the connections that another process has accepted on these ports, as a lost network would.

    Returns:
        Whether it was possible; a system may not allow it.
    """
    try:
        own = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        for entry in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(f"/proc/{pid}/fd/{entry}").startswith("socket:"):
                    _close_accepted(_duplicate(own, int(entry)), ports)
    except OSError:
        return False
    finally:
        os.close(own)
    return True


def _duplicate(pidfd: int, descriptor: int) -> int:
    found: int = ctypes.CDLL(None, use_errno=True).syscall(_SYS_PIDFD_GETFD, pidfd, descriptor, 0)
    if found < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return found


def _close_accepted(descriptor: int, ports: Collection[int]) -> None:
    with socket.socket(fileno=descriptor) as own, contextlib.suppress(OSError):
        if own.family in (socket.AF_INET, socket.AF_INET6) and own.getsockname()[1] in ports:
            own.getpeername()  # an error for one that listens
            own.shutdown(socket.SHUT_RDWR)


def _stat(pid: int) -> list[str]:
    try:
        descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY)  # a launcher looks at each process five times a second
        try:
            text = os.read(descriptor, 4096)
        finally:
            os.close(descriptor)
        return text.decode("utf-8", "replace").rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return []
