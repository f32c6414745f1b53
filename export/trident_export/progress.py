"""What is being done: plain lines, and on a terminal a bar or a clock below the last one.

say("writing int8")                    a line that stays, on standard error so that output can be piped
for text in track(texts, "gate"):      a bar while a loop runs that can be counted
with bars():                           around a whole command: without it, or without a terminal, lines are all
"""

from __future__ import annotations

import contextlib
import operator
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO, TypeVar

Progress = Callable[[str], None]
T = TypeVar("T")

_SECONDS = 1.0  # a step that takes less shows neither bar nor clock
_terminal: _Terminal | None = None


class Counted(Iterator[T]):
    """An iterator that says how many items it will give, so that a bar has an end."""

    def __init__(self, items: Iterable[T], count: int) -> None:
        self._items, self._left = iter(items), count

    def __next__(self) -> T:
        item = next(self._items)
        self._left -= 1
        return item

    def __length_hint__(self) -> int:
        return max(0, self._left)


class _Terminal:
    """The clock below the last line; a thread moves it, since torch's tracing gives no sign for minutes."""

    def __init__(self, stream: TextIO) -> None:
        from tqdm import tqdm

        self._tqdm, self._stream = tqdm, stream
        self._bar: Any = None
        self._since = 0.0  # when the last line was written; 0: before the first
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)
        self._thread.start()

    def say(self, line: str) -> None:
        with self._lock:
            self._close()
            self._tqdm.write(line, file=self._stream)
            self._since = time.time()

    def track(self, items: Iterable[T], what: str) -> Iterator[T]:
        return iter(
            self._tqdm(
                items,
                desc=f"  {what}",
                total=operator.length_hint(items) or None,
                file=self._stream,
                leave=False,
                delay=_SECONDS,
                disable=False,
            )
        )

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _tick(self) -> None:
        while not self._ended.wait(_SECONDS):
            with self._lock:
                if self._bar is not None:
                    self._bar.refresh()
                elif self._since and time.time() - self._since >= _SECONDS:
                    self._bar = self._tqdm(file=self._stream, bar_format="  {elapsed}", leave=False, disable=False)
                    self._bar.start_t = self._since


@contextlib.contextmanager
def bars(stream: TextIO | None = None) -> Iterator[None]:
    """Show bars while the block runs, where the stream (default: standard error) is a terminal."""
    global _terminal
    stream = stream or sys.stderr
    if not stream.isatty():
        yield
        return
    _terminal = _Terminal(stream)
    try:
        yield
    finally:
        ending, _terminal = _terminal, None
        ending.end()


def say(message: str) -> None:
    """A line of progress."""
    line = f"trident-export: {message}"
    if _terminal is not None:
        _terminal.say(line)
    else:
        print(line, file=sys.stderr, flush=True)


def track(items: Iterable[T], what: str) -> Iterator[T]:
    """The same items, with a bar while they are taken."""
    return _terminal.track(items, what) if _terminal is not None else iter(items)
