"""The file of a batch's results: an object a line, written whole, found again after an interruption.

    {"line": 3, "id": "a", "request": "8d21...", "result": ...}
    {"line": 4, "id": "b", "request": "19ff...", "error": {"type": "InvalidRequestError", "message": "..."}}

`id` is there where the input has one; `request` tells what was asked, so that a result isn't taken for another's.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from trident_client.cli import output, texts
from trident_client.cli.exits import InputError
from trident_client.cli.verbs import Asked

POLL_SECONDS = 0.2  # between two looks whether the batch ends


@dataclass(frozen=True)
class Done:
    """A line that has been answered.

    Attributes:
        digest: of what was asked.
        failed: whether its answer is an error.
    """

    digest: str
    failed: bool


class Output:
    """The results, which one process at a time may write.

    Attributes:
        done: the lines that have a result already, by `Asked.key`.
        repaired: whether the last line was half-written.

    Args:
        file: is made where it isn't there; "-": standard output, which has no results yet.
        overwrite: throw away what it has.
        retry_failed: throw away the errors that it has.

    Raises:
        InputError: it is no file of results, or another process writes to it.
        OSError: it can't be read or written.
    """

    def __init__(self, file: Path, *, overwrite: bool = False, retry_failed: bool = False) -> None:
        self.done: dict[str | int, Done] = {}
        self.repaired = False
        if str(file) == texts.STDIN:
            sys.stdout.flush()
            self._file: BinaryIO = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
            return
        if file.exists() and not file.is_file():  # a pipe, or a device
            self._file = file.open("wb", buffering=0)
            return
        self._file = file.open("a+b", buffering=0)
        try:
            _lock(self._file, file)
            if overwrite:
                self._file.truncate(0)
            self._read(file)
            if retry_failed and any(done.failed for done in self.done.values()):
                self._drop_failed(file)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file; each line is there already."""
        self._file.close()

    def write(self, asked: Asked, **outcome: Any) -> None:
        """Add a line: a `result`, or an `error`.

        Raises:
            OSError: it can't be written.
        """
        head: dict[str, Any] = {"line": asked.line} | ({} if asked.id is None else {"id": asked.id})
        text = json.dumps({**head, "request": asked.digest, **output.plain(outcome)}, ensure_ascii=False)
        left = memoryview(text.encode("utf-8", "backslashreplace") + b"\n")
        while left:
            left = left[self._file.write(left) or 0 :]
        self.done[asked.key] = Done(asked.digest, "error" in outcome)

    def _read(self, file: Path) -> None:
        """Find what is there, and take away a last line that is half-written."""
        self._file.seek(0)
        end = number = 0
        for number, content in enumerate(self._file, 1):
            whole = content.endswith(b"\n")
            found = _head(content, whole)
            if found is None and not whole:
                self.repaired = True
                self._file.truncate(end)
                break
            if found is None:
                raise InputError(f"{file}: line {number} is no result of a batch; --overwrite throws it all away")
            if not whole:
                self._file.write(b"\n")
            end += len(content)
            asked = Asked(found["line"], found.get("id"))
            self.done[asked.key] = Done(found["request"], "error" in found)
        self._file.seek(0, os.SEEK_END)

    def _drop_failed(self, file: Path) -> None:
        """Leave out the lines with errors: a new file takes the old one's place once it is complete."""
        kept = file.with_name(f".{file.name}.{os.getpid()}")
        new = kept.open("x+b", buffering=0)
        try:
            _lock(new, file)
            self._file.seek(0)
            for content in self._file:
                if "error" not in (_head(content, True) or {}):
                    new.write(content)
            os.fsync(new.fileno())
            os.chmod(kept, file.stat().st_mode & 0o777)
            os.replace(kept, file)
        except BaseException:
            new.close()
            with contextlib.suppress(OSError):
                kept.unlink()
            raise
        self._file.close()
        self._file = new
        self.done = {key: done for key, done in self.done.items() if not done.failed}


def _head(content: bytes, whole: bool) -> dict[str, Any] | None:
    """The fields of a line that come before its result; None if it isn't one.

    A result may be long, so only that of a last line without an end is read to see whether it is complete. The text
    that parts the two can't be in an id, whose quotes have backslashes.
    """
    try:
        head, parted, _ = content.partition(b', "result": ')
        found = json.loads(head + b"}" if parted and whole else content)
    except ValueError:
        return None
    kinds: dict[str, Any] = {"line": int, "request": str, "id": str | int}
    if not isinstance(found, dict) or isinstance(found.get("line"), bool) or not (parted or "error" in found):
        return None
    if not all(isinstance(found.get(name, "" if name == "id" else None), kind) for name, kind in kinds.items()):
        return None
    return found


def _lock(opened: BinaryIO, file: Path) -> None:
    """Keep other batches away from a file, until this process ends.

    Raises:
        InputError: another one has it.
    """
    try:
        import fcntl
    except ImportError:  # there is none on Windows
        return
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{file}: another batch is writing to it") from None
    except OSError:  # a file system without locks
        return


def lines(file: Path, stopping: Callable[[], bool] = lambda: False) -> Iterator[tuple[int, bytes]]:
    """The lines of a batch's input that are not empty, each with its number; "-": of standard input.

    Args:
        stopping: whether standard input isn't waited for any longer.
    """
    with contextlib.nullcontext() if str(file) == texts.STDIN else file.open("rb") as opened:
        for number, content in enumerate(opened or _standard_input(stopping), 1):
            if content := content.strip(b"\r\n \t"):
                yield number, content


def _standard_input(stopping: Callable[[], bool]) -> Iterator[bytes]:
    """Its lines. A thread that waits inside of `sys.stdin` would keep the interpreter from ending."""
    descriptor = sys.stdin.fileno()
    parts: list[bytes] = []
    while not stopping():
        if not select.select([descriptor], [], [], POLL_SECONDS)[0]:
            continue
        content = os.read(descriptor, 1 << 16)
        *whole, rest = content.split(b"\n")
        for line in whole:
            yield b"".join([*parts, line])
            parts = []
        parts.append(rest)
        if not content:
            yield b"".join(parts)
            return


def count(file: Path) -> int | None:
    """How many lines `lines` gives; None where that isn't known before they are read."""
    return sum(1 for _ in lines(file)) if file.is_file() else None
