"""The thread that sends: the engine's loop never waits for a client.

A response costs this server and its client about a third of a millisecond of processor time, which the model then
lacks. So the engine only notes that a stream has text, and what waits goes out together: the first token and the end
of an answer at once, what is between as often as `pace` says, together with that of other streams. The same thread
asks for cancellations, which Triton also answers by a call.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.2


class Channel(Protocol):
    """A client, as far as the outbox cares."""

    def is_cancelled(self) -> bool:
        """Whether the client has gone."""
        ...

    def fail(self, error: Exception) -> None:
        """Send an error as the last response."""
        ...


class Stream(Protocol):
    """An answer that is sent in one or more responses.

    Attributes:
        cancelled: set by the outbox once the client has gone.
        pending: whether it waits for its time; the outbox's own note, as `last_sent` is.
    """

    cancelled: bool
    pending: bool
    last_sent: float

    @property
    def channel(self) -> Channel:
        """The client."""
        ...

    @property
    def urgent(self) -> bool:
        """Whether what there is to send goes out at once."""
        ...

    def send_pending(self) -> bool:
        """Send what there is; returns whether that was the last."""
        ...


def pace(streams: int) -> float:
    """Seconds between two responses of a stream: 33 a second for one stream, five for many (decision 0010)."""
    return max(0.03, min(0.0075 * streams, 0.2), 0.005 * streams)


def poll_interval(streams: int) -> float:
    """Seconds between two questions for cancellations, a few steps of the engine with this many streams.

    A question is a message to the server and back, which takes a core from the model; to run a few steps too many of
    one that has gone costs less (decision 0059).
    """
    return min(max(0.05, 0.0125 * streams), 0.2)


class PendingStreams:
    """Streams whose text waits for its time."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[float, Stream]] = deque()

    @property
    def first(self) -> float:
        """When the first is due; infinity where none waits."""
        return self._waiting[0][0] if self._waiting else math.inf

    def add(self, due: float, stream: Stream) -> None:
        """A stream is due at `due`: later than those before it, or nearly, where some ended meanwhile."""
        self._waiting.append((due, stream))

    def take(self, now: float, early: float) -> list[Stream]:
        """Those to send now: none before the first is due, and then also those due in the next `early` seconds.

        Waking up once for many responses costs the model less than once for each, and streams that went out together
        are due together from then on.
        """
        taken: list[Stream] = []
        if self.first <= now:
            while self.first <= now + early and self._waiting:
                taken.append(self._waiting.popleft()[1])
        return taken


class Outbox:
    """Sends for every stream of one model.

    Args:
        watch: called now and then while streams are open.
    """

    def __init__(self, watch: Callable[[], None] = lambda: None) -> None:
        self._watch = watch
        # None wakes the thread, which then polls all that are open, or ends.
        self._ready: queue.SimpleQueue[Stream | None] = queue.SimpleQueue()
        self._stopped = False
        self._open: set[Stream] = set()
        self._lock = threading.Lock()
        self._pending = PendingStreams()
        self._thread = threading.Thread(target=self._loop, name="outbox", daemon=True)
        self._thread.start()

    def add(self, stream: Stream) -> None:
        """Watch a stream until its last response is sent."""
        with self._lock:
            self._open.add(stream)
        # Not notify(): a stream that was sent for without having anything would count as one that has begun, and its
        # first token would wait as the later ones do.
        self._ready.put(None)

    def discard(self, stream: Stream) -> None:
        """Stop watching a stream."""
        with self._lock:
            self._open.discard(stream)

    def notify(self, stream: Stream) -> None:
        """The stream has something to send."""
        self._ready.put(stream)

    def stop(self) -> None:
        """Send what is ready, then end the thread."""
        self._stopped = True
        self._ready.put(None)
        self._thread.join()

    def _loop(self) -> None:
        next_poll = next_watch = time.monotonic()
        while True:
            try:
                stream = self._ready.get(timeout=self._wait(next_poll))
            except queue.Empty:
                pass
            else:
                if stream is not None:
                    self._send_or_pace(stream)
                if self._stopped and self._ready.empty():
                    break
            now = time.monotonic()
            for due in self._pending.take(now, pace(len(self._open)) / 2):
                self._send(due)
            if now >= next_poll:
                self._poll_cancellations()
                next_poll = time.monotonic() + poll_interval(len(self._open))
            if now >= next_watch and self._open:
                self._watch()
                next_watch = now + WATCH_SECONDS
        for stream in self._pending.take(math.inf, 0.0):
            self._send(stream)

    def _wait(self, next_poll: float) -> float | None:
        """How long the thread may sleep."""
        if not self._open:
            return None
        return max(min(next_poll, self._pending.first) - time.monotonic(), 0.0)

    def _send_or_pace(self, stream: Stream) -> None:
        due = stream.last_sent + pace(len(self._open))
        if stream.urgent or due <= time.monotonic():
            self._send(stream)
        elif not stream.pending:
            stream.pending = True
            self._pending.add(due, stream)

    def _send(self, stream: Stream) -> None:
        stream.pending = False
        stream.last_sent = time.monotonic()
        try:
            done = stream.send_pending()
        except Exception as error:
            logger.exception("a response could not be sent")
            stream.cancelled = True  # the engine ends it
            with suppress(Exception):  # if Triton takes no response, it takes no error either
                stream.channel.fail(error)
            done = True
        if done:
            self.discard(stream)

    def _poll_cancellations(self) -> None:
        with self._lock:
            streams = [stream for stream in self._open if not stream.cancelled]
        for stream in streams:
            if stream.channel.is_cancelled():
                stream.cancelled = True
