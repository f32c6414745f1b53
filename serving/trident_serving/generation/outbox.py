"""The thread that sends: the engine's loop never waits for a client.

Sending costs about a millisecond a response on this server, so the engine only notes that a stream has text.
While the sender is busy, the tokens of a stream gather and leave in one response. The same thread asks
for cancellations, which Triton also answers by a call.
"""

from __future__ import annotations

import logging
import queue
import threading
import time

from trident_serving.generation.stream import TextStream

logger = logging.getLogger(__name__)

CANCELLATION_POLL_SECONDS = 0.02


class Outbox:
    """Sends for every stream of one model."""

    def __init__(self) -> None:
        self._ready: queue.SimpleQueue[TextStream | None] = queue.SimpleQueue()
        self._open: set[TextStream] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._loop, name="outbox", daemon=True)
        self._thread.start()

    def add(self, stream: TextStream) -> None:
        """Watch a stream until its last response is sent."""
        with self._lock:
            self._open.add(stream)
        self.notify(stream)  # wakes the thread, which asks for cancellations from now on

    def discard(self, stream: TextStream) -> None:
        """Forget a stream that was never started."""
        with self._lock:
            self._open.discard(stream)

    def notify(self, stream: TextStream) -> None:
        """The stream has something to send."""
        self._ready.put(stream)

    def stop(self) -> None:
        """Send what is ready, then end the thread."""
        self._ready.put(None)
        self._thread.join()

    def _loop(self) -> None:
        next_poll = time.monotonic()
        while True:
            try:
                stream = self._ready.get(timeout=CANCELLATION_POLL_SECONDS if self._open else None)
            except queue.Empty:
                pass
            else:
                if stream is None:
                    return
                self._send(stream)
            if time.monotonic() >= next_poll:
                self._poll_cancellations()
                next_poll = time.monotonic() + CANCELLATION_POLL_SECONDS

    def _send(self, stream: TextStream) -> None:
        try:
            done = stream.send_pending()
        except Exception:
            logger.exception("a response could not be sent")
            stream.cancelled = True  # the engine ends it; nothing more can be sent
            done = True
        if done:
            self.discard(stream)

    def _poll_cancellations(self) -> None:
        with self._lock:
            streams = [stream for stream in self._open if not stream.cancelled]
        for stream in streams:
            if stream.channel.is_cancelled():
                stream.cancelled = True
