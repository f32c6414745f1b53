"""API keys: a file of hashes, each with a name and what it may do.

A key is 256 random bits, so a plain SHA-256 of it can't be searched, and finding one takes no longer than a look into a
dictionary. The key itself is shown once, when it is made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
INFERENCE, ADMIN = "inference", "admin"
SCOPES = (INFERENCE, ADMIN)
PREFIX = "trident-"
_LOOK_SECONDS = 1.0
_HASH = re.compile(r"[0-9a-f]{64}")


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
        for name in ("name", "hash", "created"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"a key's {name} must be a text")
        if not self.name.isprintable() or not 0 < len(self.name) <= 64:
            raise ValueError(f"a key's name must have 1 to 64 printable characters, found {self.name[:80]!r}")
        if unknown := set(self.scopes) - set(SCOPES):
            raise ValueError(f"a scope must be one of {', '.join(SCOPES)}, found {', '.join(map(str, unknown))}")
        if not _HASH.fullmatch(self.hash):
            raise ValueError(f"the hash of the key {self.name!r} must have 64 hexadecimal digits")
        if isinstance(self.max_concurrent, bool) or not isinstance(self.max_concurrent, int) or self.max_concurrent < 0:
            raise ValueError(f"max_concurrent must be a whole number of at least 0, found {self.max_concurrent!r}")


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
        if not isinstance(entries, list):
            raise ValueError("keys must be a list")
        return [_key(entry) for entry in entries]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is no file of keys: {what}") from None


def _key(entry: Mapping[str, Any]) -> Key:
    scopes = entry["scopes"]
    if not isinstance(scopes, list):
        raise ValueError(f"scopes must be a list, found {scopes!r}")
    return Key(**{**entry, "scopes": tuple(scopes), "hash": str(entry["hash"]).lower()})


def write(path: Path, keys: Iterable[Key]) -> None:
    """Write the file, at once or not at all; a new one only its owner can read, an older one keeps its mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # mkstemp's files are their owner's only
    with contextlib.suppress(FileNotFoundError):
        os.fchmod(handle, path.stat().st_mode & 0o777)
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

    A file that can't be read, perhaps because somebody writes it, leaves the keys as they were; one that is gone has
    none.

    Args:
        path: the file; None: there are no keys, and everybody may ask.

    Raises:
        ValueError: it is no file of keys.
        OSError: it can't be read.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._by_hash: Mapping[str, Key] = {}
        self._seen: tuple[int, ...] = ()
        self._next_look = 0.0
        if path is not None:
            self._seen = _version(path)
            self._by_hash = _hashed(path)

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
        try:
            seen = _version(self._path)
            if seen == self._seen:
                return
            self._seen = seen
            self._by_hash = _hashed(self._path)
        except FileNotFoundError:
            if self._by_hash:
                logger.error("%s is gone: there are no keys now", self._path)
            self._by_hash, self._seen = {}, ()
        except (OSError, ValueError) as error:
            logger.error("the keys stay as they were: %s", error)


def _version(path: Path) -> tuple[int, ...]:
    """What changes with a file's content."""
    status = path.stat()
    return status.st_mtime_ns, status.st_ino, status.st_size


def _hashed(path: Path) -> dict[str, Key]:
    return {key.hash: key for key in read(path)}
