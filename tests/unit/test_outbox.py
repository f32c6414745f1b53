"""When the sender sends what."""

from __future__ import annotations

import math
import queue
import threading
import time
from typing import Any

from trident_serving.runtime.outbox import Outbox, PendingStreams, pace


def test_streams_that_are_due_soon_go_out_with_the_first() -> None:
    pending = PendingStreams()
    streams: list[Any] = [object() for _ in range(4)]
    for due, stream in zip((1.0, 1.02, 1.05, 1.06), streams, strict=True):
        pending.add(due, stream)
    assert pending.take(0.999, 0.5) == []  # none is due, however soon the others are
    assert pending.first == 1.0
    assert pending.take(1.0, 0.05) == streams[:3]
    assert pending.take(1.0, 0.05) == []
    assert pending.first == 1.06
    assert pending.take(math.inf, 0.0) == streams[3:]
    assert pending.first == math.inf
    assert pending.take(math.inf, 0.0) == []


class Answer:
    """A stream whose text is what `say` has said."""

    def __init__(self, outbox: Outbox) -> None:
        self.cancelled = self.pending = False
        self.last_sent = 0.0
        self.channel = self
        self.sent: list[tuple[float, list[str]]] = []
        self.heard = threading.Event()
        self._outbox = outbox
        self._waiting: list[str] = []

    def is_cancelled(self) -> bool:
        return False

    def fail(self, error: Exception) -> None:
        raise error

    @property
    def urgent(self) -> bool:
        return self.last_sent == 0.0

    def say(self, text: str) -> None:
        self._waiting.append(text)
        if not self.pending:
            self._outbox.notify(self)

    def send_pending(self) -> bool:
        if self._waiting:
            self.sent.append((time.monotonic(), self._waiting))
            self._waiting = []
            self.heard.set()
        return False


def test_a_first_token_never_waits_and_the_next_ones_do() -> None:
    outbox = Outbox()
    answers = [Answer(outbox) for _ in range(40)]
    for answer in answers:
        outbox.add(answer)
    time.sleep(0.02)  # the thread has seen them, and they have nothing yet
    last, said = answers[-1], time.monotonic()
    for answer in answers[:9]:
        answer.say("first")
    waits = [answer.sent[0][0] - said for answer in answers[:9] if answer.heard.wait(5)]
    assert sorted(waits)[4] < 0.03 < pace(40) / 2
    answers[0].say("second")
    time.sleep(pace(40) / 4)
    assert len(answers[0].sent) == 1
    last.say("its end")
    outbox.stop()
    assert [texts for _, texts in answers[0].sent] == [["first"], ["second"]]
    assert [texts for _, texts in last.sent] == [["its end"]]


class Unsendable:
    """A stream, and its channel, of a response that no message can hold."""

    cancelled = pending = False
    last_sent = 0.0
    urgent = True

    def __init__(self) -> None:
        self.channel = self
        self.failures: queue.SimpleQueue[Exception] = queue.SimpleQueue()

    def send_pending(self) -> bool:
        "\ud800".encode()
        return True

    def is_cancelled(self) -> bool:
        return False

    def fail(self, error: Exception) -> None:
        self.failures.put(error)
        raise RuntimeError("Triton takes no error either")


def test_a_response_that_can_not_be_sent_fails_its_request() -> None:
    outbox = Outbox()
    for stream in (Unsendable(), Unsendable()):  # the thread goes on behind the first
        outbox.add(stream)
        outbox.notify(stream)
        assert isinstance(stream.failures.get(timeout=30), UnicodeEncodeError)
        assert stream.cancelled
    outbox.stop()
