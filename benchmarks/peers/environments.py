"""The environments of the peers: what environments.toml lists, built once under the cache."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("environments.toml")


class PeerError(Exception):
    """A peer can't be installed, or can't do what it was asked; the message says why."""


@dataclass(frozen=True)
class Environment:
    """A table of environments.toml.

    Attributes:
        requirements: what pip installs.
        without: packages that are taken out again: they come along and can't be imported here.
        generators, embedders: the peers that run in it.
        own: whether they run in this environment.
    """

    name: str
    requirements: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    generators: tuple[str, ...] = ()
    embedders: tuple[str, ...] = ()
    own: bool = False


def load(file: Path = FILE) -> list[Environment]:
    """All of them, in the file's order."""
    tables = tomllib.loads(file.read_text(encoding="utf-8"))
    return [
        Environment(name, **{key: tuple(value) if isinstance(value, list) else value for key, value in table.items()})
        for name, table in tables.items()
    ]


def selected(names: Sequence[str]) -> list[Environment]:
    """Those of these names, and first what runs in our own environment, which the others are compared with.

    Args:
        names: (): all.

    Raises:
        PeerError: there is no such environment.
    """
    known = {environment.name: environment for environment in load()}
    if unknown := [name for name in names if name not in known]:
        raise PeerError(f"there is no peer {unknown[0]!r}; known are {', '.join(known)}")
    own = [environment for environment in known.values() if environment.own]
    return [*own, *(each for each in known.values() if not each.own and (not names or each.name in names))]


def python_of(environment: Environment, cache: Path) -> Path:
    """Its interpreter; the environment is built where its table has changed or it is not there.

    Raises:
        PeerError: pip could not install it; the message is the end of what pip said.
    """
    if environment.own:
        return Path(sys.executable)
    folder = cache.resolve() / "peers" / environment.name
    python, stamp = folder / "bin/python", folder / "stamp"
    wanted = hashlib.sha256(
        repr((environment.requirements, environment.without, sys.version_info)).encode()
    ).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"bench: installing {environment.name} into {folder}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    _run([sys.executable, "-m", "venv", str(folder)])
    _run([*pip, "install", *environment.requirements])
    if environment.without:
        _run([*pip, "uninstall", "--yes", *environment.without])
    stamp.write_text(wanted)
    return python


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise PeerError("; ".join(lines[-2:]) or f"{command[0]} ended with status {done.returncode}")
