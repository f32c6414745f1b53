"""Which of several servers gets a request."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from trident_client._errors import DeadlineExceededError, OverloadedError, UnavailableError

FIRST_REST = 1.0  # seconds that a server is left alone after a failure; doubled with each one that follows
LONGEST_REST = 30.0

Server = TypeVar("Server")


@dataclass
class _Place(Generic[Server]):
    server: Server
    busy: int = 0  # requests of this client that it answers
    turn: int = 0  # when it was last chosen
    failures: int = 0  # one after the other
    rests_until: float = 0.0


class Choice(Generic[Server]):
    """Of the servers that answer, the one with the fewest requests of this client; between equals, each in its turn.

    Threads may share it.

    Args:
        servers: one or more.
        now: gives the time in seconds.
    """

    def __init__(self, servers: Sequence[Server], now: Callable[[], float] = time.monotonic) -> None:
        self._places = [_Place(server) for server in servers]
        self._now = now
        self._turn = 0
        self._lock = threading.Lock()

    def all(self) -> list[Server]:
        """Every server."""
        return [place.server for place in self._places]

    def order(self) -> list[Server]:
        """The servers to try, one after the other. Those that failed lately are left out, unless all did."""
        with self._lock:
            now = self._now()
            awake = [place for place in self._places if place.rests_until <= now] or self._places
            found = sorted(awake, key=lambda place: (place.busy, place.turn))
            self._turn += 1
            found[0].turn = self._turn
            return [place.server for place in found]

    def another(self) -> bool:
        """Whether a server is left that has not failed lately."""
        with self._lock:
            return any(place.rests_until <= self._now() for place in self._places)

    def begin(self, server: Server) -> Callable[[], None]:
        """Count a request as one of this server's, until what is returned is called."""
        place = self._place(server)
        with self._lock:
            place.busy += 1

        def end() -> None:
            with self._lock:
                place.busy -= 1

        return end

    @contextlib.contextmanager
    def using(self, server: Server) -> Iterator[None]:
        """Count a request for the time of a `with` block."""
        end = self.begin(server)
        try:
            yield
        finally:
            end()

    def failed(self, server: Server) -> None:
        """Note that a server could not be reached or did not answer."""
        place = self._place(server)
        with self._lock:
            place.failures += 1
            place.rests_until = self._now() + min(FIRST_REST * 2.0 ** min(place.failures - 1, 10), LONGEST_REST)

    def full(self, server: Server) -> None:
        """Note that a server has no room for a request."""
        place = self._place(server)
        with self._lock:
            place.rests_until = self._now() + FIRST_REST

    def note(self, server: Server, error: BaseException | None) -> bool:
        """Note how a request ended; whether another server may answer it, if nothing of an answer has come."""
        if isinstance(error, OverloadedError):
            self.full(server)
        elif isinstance(error, UnavailableError | DeadlineExceededError):
            self.failed(server)
        else:
            self.answered(server)
        return isinstance(error, UnavailableError) and self.another()

    def answered(self, server: Server) -> None:
        """Note that a server answered."""
        place = self._place(server)
        with self._lock:
            place.failures, place.rests_until = 0, 0.0

    def _place(self, server: Server) -> _Place[Server]:
        return next(place for place in self._places if place.server is server)
