"""The launcher's folder, and what tritonserver leaves in /tmp; removes both where a launcher was killed.

    <temporary folder>/trident-XXXXXXXX/lock    locked by the launcher (flock) for as long as it lives

tritonserver makes a folder `folderXXXXXX` in /tmp, whatever TMPDIR says, for a model that is loaded from the files of
a request, and a killed one leaves it; what a launcher's `Control` sends is marked. A folder is removed only if a lock
that nobody holds, or this launcher, says whose it is: the kernel gives the lock up with its process, in another
container too, where process ids say nothing. The Python backend also makes folders `python_env_XXXXXX`, empty, one
for each backend: nothing says whose they are, so they stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "trident-"
LOCK = "lock"
# Where tritonserver makes its folders.
SERVERS = Path("/tmp")


class TemporaryFolder:
    """A new folder that this process owns while it lives.

    Attributes:
        path: the folder.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        # Locked before it has its name: a launcher that looks meanwhile takes a folder without a lock for no one's.
        self._lock = (self.path / f"{LOCK}.part").open("w")
        with contextlib.suppress(OSError):  # a file system without locks: then nobody else removes it
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (self.path / f"{LOCK}.part").rename(self.path / LOCK)

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def mark(folder: Path) -> str:
    """The first line of a model's code that a launcher sends to its tritonserver: whose it is."""
    return f"# Of the launcher with the folder {str(folder)!r}."


def remove_servers(folder: Path, servers: Path = SERVERS) -> None:
    """Remove what the tritonserver of a launcher has left; it has ended.

    Args:
        folder: the launcher's.
    """
    for code in servers.glob("folder??????/*/model.py"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if _is_ours(code.parents[1]) and code.read_text(encoding="utf-8").startswith(mark(folder) + "\n"):
                shutil.rmtree(code.parents[1], ignore_errors=True)


def remove_abandoned(servers: Path = SERVERS) -> None:
    """Remove the folders of launchers that were killed, and what their tritonservers left."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), _locked(folder):
            remove_servers(folder, servers)
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder.

    Raises:
        OSError: it is no launcher's, another user's, or its launcher lives.
    """
    if not _is_ours(folder):
        raise PermissionError(f"{folder} is another user's")
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


def _is_ours(folder: Path) -> bool:
    """Whether this user has made a folder; a link is none."""
    return not folder.is_symlink() and folder.is_dir() and folder.lstat().st_uid == os.getuid()
