"""API keys: a file of hashes, each with a name and what it may do.

A key is 256 random bits, so a plain SHA-256 of it can't be searched, and finding one takes no longer than a look into a
dictionary. The key itself is shown once, when it is made.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

INFERENCE, ADMIN = "inference", "admin"
SCOPES = (INFERENCE, ADMIN)
PREFIX = "trident-"
_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Key:
    """What is known of a key.

    Attributes:
        name: for the log, the metrics and its owner.
        hash: SHA-256 of it, in hexadecimal.
        scopes: what it may do.
        max_concurrent: requests at once; 0: the gateway's limit.
        created: the date.
    """

    name: str
    hash: str
    scopes: tuple[str, ...] = (INFERENCE,)
    max_concurrent: int = 0
    created: str = ""

    def __post_init__(self) -> None:
        if not self.name.isprintable() or not 0 < len(self.name) <= 64:
            raise ValueError(f"a key's name must have 1 to 64 printable characters, found {self.name[:80]!r}")
        if unknown := set(self.scopes) - set(SCOPES):
            raise ValueError(f"a scope must be one of {', '.join(SCOPES)}, found {', '.join(sorted(unknown))}")


def hashed(key: str) -> str:
    """What the file has of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def new_key() -> str:
    """A key that nobody can guess."""
    return PREFIX + secrets.token_urlsafe(32)


def read(path: Path) -> list[Key]:
    """The keys of a file; none where there is no file.

    Raises:
        ValueError: it is no file of keys.
    """
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["keys"]
        return [Key(**{**entry, "scopes": tuple(entry["scopes"])}) for entry in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no file of keys: {error}") from None


def write(path: Path, keys: Iterable[Key]) -> None:
    """Write the file, readable for its owner only, at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # mkstemp's files are their owner's only
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump({"keys": [asdict(key) for key in keys]}, file, indent=2)
        file.write("\n")
    Path(name).replace(path)


def add(path: Path, name: str, scopes: Iterable[str], max_concurrent: int = 0) -> str:
    """Make a key and note its hash; returns the key, which is nowhere else.

    Raises:
        ValueError: the name is taken, or a scope is unknown.
    """
    known = read(path)
    if any(key.name == name for key in known):
        raise ValueError(f"there is a key {name!r} already: remove it first, or take another name")
    key = new_key()
    entry = Key(name, hashed(key), tuple(scopes), max_concurrent, time.strftime("%Y-%m-%d"))
    write(path, [*known, entry])
    return key


def remove(path: Path, name: str) -> None:
    """Take a key away; gateways that run see it within a second.

    Raises:
        ValueError: there is none of that name.
    """
    known = read(path)
    kept = [key for key in known if key.name != name]
    if len(kept) == len(known):
        raise ValueError(f"there is no key {name!r}; there are {', '.join(key.name for key in known) or 'none'}")
    write(path, kept)


class KeyRing:
    """The keys of a file, which is read again when it changes.

    Args:
        path: the file; None: there are no keys, and everybody may ask.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._by_hash: Mapping[str, Key] = {}
        self._seen: tuple[int, int] = (0, 0)
        self._next_look = 0.0
        self._look()

    @property
    def open(self) -> bool:
        """Whether everybody may ask."""
        return self._path is None

    def find(self, key: str) -> Key | None:
        """Whose key it is; None: nobody's."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + _LOOK_SECONDS
            self._look()
        return self._by_hash.get(hashed(key))

    def _look(self) -> None:
        if self._path is None:
            return
        status = self._path.stat()
        seen = (status.st_mtime_ns, status.st_ino)
        if seen != self._seen:
            self._by_hash = {key.hash: key for key in read(self._path)}
            self._seen = seen
