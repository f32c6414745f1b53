"""Time limits: what is left of one, and an end of what waits too long where a library has no limit of that kind."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from trident_client._errors import DeadlineExceededError

if TYPE_CHECKING:
    from typing_extensions import Self

POLL_SECONDS = 0.1
_ENDLESS_SECONDS = 1e9  # thirty years; what is much longer has no form in gRPC's messages and sockets' timers


def limit(seconds: float | None) -> float | None:
    """A timeout as the calls take it; one that outlives everybody is none.

    Raises:
        ValueError: it is no number.
    """
    if seconds is None or seconds > _ENDLESS_SECONDS:
        return None
    if seconds != seconds:
        raise ValueError("a timeout must be a number of seconds, or None for no limit, found nan")
    return seconds


def countdown(seconds: float | None) -> Callable[[], float | None]:
    """Gives what is left of so many seconds; None: no limit."""
    if seconds is None:
        return lambda: None
    until = time.monotonic() + seconds
    return lambda: max(until - time.monotonic(), 0.0)


class Wait:
    """A thread that waits again and again.

    Attributes:
        until: when its present wait is ended, by `time.monotonic`.
        ended: whether one was.
    """

    def __init__(self, end: Callable[[], Any]) -> None:
        self.until = math.inf
        self.ended = False
        self._end = end

    @contextlib.contextmanager
    def limited(self, until: float) -> Iterator[None]:
        """What waits in the `with` block is ended at this time."""
        self.until = until
        try:
            yield
        finally:
            self.until = math.inf

    def expire(self) -> None:
        """End the present wait."""
        self.ended = True
        with contextlib.suppress(Exception):
            self._end()


class Watch:
    """Ends the waits of any number of threads; it has a thread of its own while there are any."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waits: set[Wait] = set()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def over(self, end: Callable[[], Any]) -> Iterator[Wait]:
        """A wait that is watched in the `with` block; `end` ends it, from another thread."""
        wait = Wait(end)
        with self._changed:
            self._waits.add(wait)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="trident-watch", daemon=True)
                self._thread.start()
        try:
            yield wait
        finally:
            with self._changed:
                self._waits.discard(wait)
                self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._waits:
                    self._changed.wait(POLL_SECONDS)
                if not self._waits:
                    self._thread = None
                    return
                late = [wait for wait in self._waits if wait.until <= time.monotonic()]
                self._waits.difference_update(late)
            for wait in late:
                wait.expire()


class Alarm:
    """In a coroutine, `with Alarm(seconds, message)` raises DeadlineExceededError where its block takes longer.

    Args:
        seconds: None: no limit.
        message: of the error.
    """

    def __init__(self, seconds: float | None, message: str) -> None:
        self._seconds = seconds
        self._message = message
        self._task: asyncio.Task[Any] | None = None
        self._handle: asyncio.TimerHandle | None = None
        self._rang = False
        self._cancelled = 0  # how often others have asked the task to end

    def __enter__(self) -> Self:
        if self._seconds is not None and self._seconds != math.inf:
            self._task = asyncio.current_task()
            self._cancelled = _requests(self._task)
            self._handle = asyncio.get_running_loop().call_later(max(self._seconds, 0.0), self._ring)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.cancel()
        if not self._rang:
            return
        if _taken_back(self._task) > self._cancelled:
            return  # somebody else wants the task to end, too
        if kind is not None and issubclass(kind, asyncio.CancelledError):
            raise DeadlineExceededError(self._message) from None

    def _ring(self) -> None:
        if self._task is not None:
            self._rang = True
            self._task.cancel()


def _requests(task: Any) -> int:
    """How often a task was asked to end; 0 before Python 3.11, which does not count."""
    count: int = task.cancelling() if hasattr(task, "cancelling") else 0
    return count


def _taken_back(task: Any) -> int:
    """The same after one request is taken back."""
    count: int = task.uncancel() if hasattr(task, "uncancel") else 0
    return count
