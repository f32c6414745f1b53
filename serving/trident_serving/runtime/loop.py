"""The loop of an engine: a thread that runs steps while there are requests, and starts again when a step fails.

It also ends requests that are cancelled or overdue. What a step does is the engine's.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

from trident_serving.errors import DeadlineExceeded, Overloaded
from trident_serving.runtime.metrics import Recorder

logger = logging.getLogger(__name__)


class Consumer(Protocol):
    """Who receives an answer; called on the engine's thread, so it must be quick."""

    @property
    def cancelled(self) -> bool:
        """Whether the answer is not wanted any more; read before each step."""
        ...

    def fail(self, error: Exception) -> None:
        """The answer can't be completed; nothing follows."""
        ...


class Request:
    """What an engine holds of one request, while it waits and while it runs.

    Args:
        seconds: it fails once this time is over, waiting included; None: never.
        submitted: when it came; None: now.

    Attributes:
        submitted: when it came, by `time.monotonic`.
        started: whether it waits no more.
        generated: tokens, or steps of all its beams.
    """

    def __init__(self, consumer: Consumer, seconds: float | None, submitted: float | None = None) -> None:
        self.consumer = consumer
        self.seconds = seconds
        self.submitted = time.monotonic() if submitted is None else submitted
        self.started = False
        self.generated = 0

    @property
    def age(self) -> float:
        """Seconds since it came."""
        return time.monotonic() - self.submitted

    @property
    def overdue(self) -> bool:
        """Whether its time is over."""
        return self.seconds is not None and self.age >= self.seconds


R = TypeVar("R", bound=Request)


class EngineLoop(ABC, Generic[R]):
    """One thread runs the loop; requests may be added from any thread.

    A subclass starts the thread when it is built, with `start`. Its queue is read and changed under `_changed`.

    Args:
        name: of the thread.
        recorder: counts what happens.
    """

    def __init__(self, name: str, recorder: Recorder | None) -> None:
        self._recorder = recorder or Recorder()
        self._changed = threading.Condition()
        self._stopping = False
        self._steps = 0
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)

    @property
    def steps(self) -> int:
        """Steps run so far; the count rises while there is work."""
        return self._steps

    @property
    def busy(self) -> bool:
        """Whether there is work; it never waits, so that a loop that hangs is seen."""
        return bool(self._requests())

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End the loop; what still runs fails with `Overloaded`."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @abstractmethod
    def _requests(self) -> Sequence[R]:
        """All that wait or run."""

    @abstractmethod
    def _step(self) -> None:
        """One step for the requests there are."""

    @abstractmethod
    def _remove(self, request: R) -> None:
        """Take a request out, wherever it is."""

    @abstractmethod
    def _finish_cancelled(self, request: R) -> None:
        """Tell the consumer of a cancelled request, which was taken out."""

    @abstractmethod
    def _clear(self) -> Sequence[R]:
        """Take all requests out, and go on with nothing: what is held can't be trusted."""

    @abstractmethod
    def _record_state(self) -> None:
        """Set the gauges."""

    @contextmanager
    def _adding(self) -> Iterator[None]:
        """Hold the queue to add to it.

        Raises:
            Overloaded: the engine is stopping.
        """
        with self._changed:
            if self._stopping:
                raise Overloaded("the model is being unloaded")
            yield
            self._changed.notify()

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not self._requests() and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    break
            self._steps += 1
            try:
                self._end_cancelled_and_overdue()
                self._step()
            except Exception as error:
                logger.exception("a step of the engine failed; it starts again with nothing")
                self._recorder.count("loop_restarts")
                self._fail_all(error)
            self._record_state()
        self._fail_all(Overloaded("the model was unloaded before the answer was complete"))
        self._record_state()

    def _end_cancelled_and_overdue(self) -> None:
        with self._changed:
            requests = list(self._requests())
        for request in requests:
            if request.consumer.cancelled:
                self._recorder.count("requests_cancelled")
                self._remove(request)
                self._finish_cancelled(request)
            elif request.overdue:
                self._remove(request)
                where = f"after {request.generated} tokens" if request.started else "while it waited"
                self._fail(request, DeadlineExceeded(f"the timeout of {request.seconds:g} s was over {where}"))

    def _fail_all(self, error: Exception) -> None:
        for request in self._clear():
            self._fail(request, error)

    def _fail(self, request: R, error: Exception) -> None:
        self._recorder.count("requests_failed")
        try:
            request.consumer.fail(error)
        except Exception:
            logger.exception("a consumer could not be told of a failure")
