"""Room on the disk, asked for before anything is written, and what it means when writing fails nevertheless."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from trident_export.errors import ExportError, NoMemory, NoSpace, NotWritable
from trident_export.recipes import Recipe

# Less room than this on a disk right after a write has failed is why it failed: libraries hide the error's number.
_FULL = 2**20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def needed(weights: int, recipes: Mapping[str, Recipe]) -> int:
    """Bytes that an export writes at most, the traced graph and a variant for each recipe, for so many of weights."""
    # A variant without passes is another name of the graph; while the others are made, as much again is put aside.
    made = [recipe.size for recipe in recipes.values() if any(recipe.passes.values())]
    # A tied output head is stored twice in a graph, and it is the largest matrix of a small model.
    return int(weights * 1.3 * (1 + sum(made) + bool(made))) + 2**26


def require(folder: Path, weights: int, recipes: Mapping[str, Recipe]) -> None:
    """Check the disk of `folder` for an export; see `require_room`."""
    require_room(folder, needed(weights, recipes))


def require_room(folder: Path, wanted: int) -> None:
    """Check that a disk takes so many bytes.

    Raises:
        NoSpace: it has too little room.
    """
    room = _free(folder)
    if room < wanted:
        raise NoSpace(
            f"the export needs {wanted / 2**20:.0f} MiB in {folder}, and {room / 2**20:.0f} MiB are free: "
            "make room, or choose another folder with REPOSITORY=..."
        )


def require_writable(repository: Path, models: Iterable[str]) -> None:
    """Check that models can be put into a repository, before hours are spent on them.

    Raises:
        NotWritable: a folder belongs to another user or is read-only, or the repository is a file.
    """
    if repository.exists() and not repository.is_dir():
        raise NotWritable(f"{repository} is no folder: choose another with REPOSITORY=...")
    folders = [repository / name for name in models]
    numbers = [number for folder in folders for number in folder.glob("[0-9]*")]
    for folder in [repository, repository / ".trident", *folders, *numbers]:
        # A folder that is moved needs to be written itself, because its own ".." changes.
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            raise _not_writable(folder, "read-only" if _is_owner(folder) else "permission denied")


def require_folder(folder: Path) -> None:
    """Check that a folder is there or can be made, as far as files stand in its way.

    Raises:
        NotWritable: it, or a folder above it, is a file.
    """
    nearest = _nearest(folder)
    if not nearest.is_dir():
        raise NotWritable(f"{nearest} is a file, and a folder is needed there: name another one")


@contextlib.contextmanager
def writing(*folders: Path) -> Iterator[None]:
    """Translate what is raised because one of the folders can't take what is written.

    Raises:
        NoSpace, NotWritable, NoMemory: that was the reason. Everything else is raised as it is.
    """
    try:
        yield
    except Exception as error:
        if (meaning := explain(error, *folders)) is None:
            raise
        raise meaning from error


def explain(error: BaseException, *folders: Path) -> ExportError | None:
    """What an error of the system means to the user; None where it is of another kind.

    Args:
        folders: where things were written, in case the error does not name a file.
    """
    if isinstance(error, ExportError):
        return None
    for cause in _causes(error):
        if isinstance(cause, MemoryError):
            return NoMemory("memory ran out: close other programs, or take a machine or container with more")
        if not isinstance(cause, OSError):
            continue
        path = Path(os.fsdecode(cause.filename)) if isinstance(cause.filename, str | bytes) else _fullest(folders)
        if cause.errno in _NO_ROOM:
            return _no_room(path)
        if cause.errno == errno.EFBIG:
            return NoSpace(f"{path} can't hold a file as large as this one: raise the limit (ulimit -f), or the disk's")
        if cause.errno in _IN_THE_WAY and (found := _in_the_way(path)) is not None:
            return found
        if cause.errno in _FORBIDDEN:
            return _not_writable(path, (cause.strerror or "permission denied").lower())
    crowded = _fullest(folders)
    return _no_room(crowded) if folders and _free(crowded) < _FULL else None


def _in_the_way(path: Path) -> NotWritable | None:
    """What stands where something was to be written; None: nothing does."""
    if path.is_dir():
        return NotWritable(f"{path} is a folder, and a file is needed there: name another one")
    try:
        require_folder(path)
    except NotWritable as error:
        return error
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def _no_room(path: Path) -> NoSpace:
    return NoSpace(
        f"the disk of {path} is full, {_free(path) / 2**20:.0f} MiB are free: make room, or choose another folder "
        "(REPOSITORY=... for the models, --cache for sources, TMPDIR for temporary files)"
    )


def _not_writable(path: Path, why: str) -> NotWritable:
    return NotWritable(
        f"{path} can't be written by user {_user(os.geteuid())} ({why}; it belongs to {_owner(path)}): run as its "
        "owner, change its owner or mode, or choose another folder (REPOSITORY=... for the models, --cache for sources)"
    )


def _fullest(folders: Iterable[Path]) -> Path:
    return min(folders, key=_free, default=Path(tempfile.gettempdir()))


def _free(path: Path) -> int:
    return shutil.disk_usage(_nearest(path)).free


def _nearest(path: Path) -> Path:
    """The path or the first folder above it that is there and may be looked at."""
    for folder in (path.absolute(), *path.absolute().parents):
        with contextlib.suppress(OSError):
            folder.stat()
            return folder
    return Path("/")


def _is_owner(path: Path) -> bool:
    return _nearest(path).stat().st_uid == os.geteuid()


def _owner(path: Path) -> str:
    return _user(_nearest(path).stat().st_uid)


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)  # a container often runs as a number that has no name
