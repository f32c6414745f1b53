"""The connections to one server: requests use the latest, and one that was replaced is closed once it has none."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Connection = TypeVar("Connection")


@dataclass
class _Entry(Generic[Connection]):
    connection: Connection
    since: float = field(default_factory=time.monotonic)
    requests: int = 0


class Connections(Generic[Connection]):
    """Threads may share it.

    Args:
        connect: makes one; called with whether there was another before it.
    """

    def __init__(self, connect: Callable[[bool], Connection]) -> None:
        self._connect = connect
        self._lock = threading.Lock()
        self._entries = [_Entry(connect(False))]

    def begin(self) -> tuple[Connection, Callable[[], None]]:
        """The latest one for a request, and what is called at the request's end."""
        with self._lock:
            entry = self._entries[-1]
            entry.requests += 1

        def end() -> None:
            with self._lock:
                entry.requests -= 1

        return entry.connection, end

    @contextlib.contextmanager
    def using(self) -> Iterator[Connection]:
        """The same for the time of a `with` block."""
        connection, end = self.begin()
        try:
            yield connection
        finally:
            end()

    def renew(self, since: float) -> list[Connection]:
        """Have further requests use a new one, because the latest hangs.

        Args:
            since: when it began to, by `time.monotonic`; a connection that is younger stays.

        Returns:
            Those to close: no request uses them any more.
        """
        with self._lock:
            if self._entries[-1].since >= since:
                return []
            replaced = self._entries
            self._entries = [entry for entry in replaced if entry.requests] + [_Entry(self._connect(True))]
            return [entry.connection for entry in replaced if not entry.requests]

    def all(self) -> list[Connection]:
        """Every one that is not closed."""
        with self._lock:
            return [entry.connection for entry in self._entries]
