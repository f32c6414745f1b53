"""The versions of a model in a repository: what they are, which one is next, which ones go."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trident_export.errors import StoreError
from trident_serving import artefacts
from trident_serving.artefacts import Manifest

_DIGITS = 12  # of a digest that is shown


@dataclass(frozen=True)
class Version:
    """A complete version of a model.

    Attributes:
        number: the name of its folders.
        served: whether it is the one that a server loads.
    """

    number: int
    manifest: Manifest
    served: bool

    @property
    def short_digest(self) -> str:
        """The beginning of its digest, by which it can be named, too; "" of an export that has none."""
        return self.manifest.digest[:_DIGITS]


def of(repository: Path, name: str) -> list[Version]:
    """The versions of a model, the oldest first.

    Raises:
        StoreError: it has none.
    """
    found = artefacts.read_versions(repository, name)
    (*_, served) = artefacts.served_versions(repository, name)
    if served not in found:
        raise StoreError(f"{repository} has no exported model {name!r}: run make export MODEL={name}")
    return [Version(number, manifest, number == served) for number, manifest in found.items()]


def served(versions: Sequence[Version]) -> Version:
    """The version that is served."""
    (found,) = (version for version in versions if version.served)
    return found


def newer(name: str, versions: Sequence[Version]) -> Version:
    """The version that a promotion without a name means: the latest.

    Raises:
        StoreError: it is served already.
    """
    if versions[-1].served:
        raise StoreError(
            f"version {versions[-1].number} of {name} is served, and there is no later one: "
            f"make export MODEL={name} BESIDE=1 exports one beside it"
        )
    return versions[-1]


def older(name: str, versions: Sequence[Version]) -> Version:
    """The version that a rollback means: the one before that is served.

    Raises:
        StoreError: there is none.
    """
    before = [version for version in versions if version.number < served(versions).number]
    if not before:
        raise StoreError(f"version {served(versions).number} of {name} is served, and there is no earlier one")
    return before[-1]


def named(name: str, versions: Sequence[Version], wanted: str) -> Version:
    """A version by its number, or by the beginning of its digest.

    Raises:
        StoreError: there is none, or several.
    """
    found = [version for version in versions if str(version.number) == wanted] or [
        version for version in versions if len(wanted) >= 4 and version.manifest.digest.startswith(wanted)
    ]
    if len(found) != 1:
        known = ", ".join(f"{version.number} ({version.short_digest})" for version in versions)
        raise StoreError(f"{name} has no version {wanted!r}; it has {known}")
    return found[0]


def keep_only(name: str, repository: Path, numbers: Collection[int]) -> None:
    """Remove the other versions of a model; the manifest of each goes first."""
    for path in sorted(repository.glob(f"{name}/*")):
        if path.is_dir() and path.name.isdecimal() and int(path.name) not in numbers:
            (path / artefacts.MANIFEST).unlink(missing_ok=True)
    for model in sorted(path.parent for path in repository.glob("*/[0-9]*")):
        if model.name.partition("_")[0] == name:
            for path in model.iterdir():
                if path.is_dir() and path.name.isdecimal() and int(path.name) not in numbers:
                    shutil.rmtree(path)
            if not any(model.iterdir()):
                model.rmdir()


@contextmanager
def locked(repository: Path, progress: Callable[[str], None]) -> Iterator[None]:
    """Hold the repository: one export or promotion at a time."""
    work = repository / ".trident"
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"another export works in {repository}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
