"""Many requests at once: so many in flight, and which of them are sent again.

Those that find a queue full are, as often as their time allows: nothing of them was done. Those whose answer breaks off
are as often as `Retries` says: to ask a model changes nothing on a server.
"""

from __future__ import annotations

import asyncio
import heapq
import queue
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from trident_client._errors import (
    DeadlineExceededError,
    OverloadedError,
    TridentError,
    UnavailableError,
    says_full,
)

IN_FLIGHT = 16
FIRST_PAUSE = 0.05  # seconds; doubled with each try, and drawn between half and all of it
LONGEST_PAUSE = 2.0
PATIENCE = 300.0  # seconds that a request without a deadline is tried


_Response = TypeVar("_Response")


@dataclass(frozen=True)
class Retries:
    """How often requests are sent again whose answer broke off before their caller had anything of it.

    Attributes:
        times: of one request, after the first.
        silence: seconds without anything of an answer after which it counts as broken off; None: no limit. The last
            try has all the time that is left.
    """

    times: int = 0
    silence: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.times, int) or self.times < 0:
            raise ValueError(f"retries must be a whole number, at least 0, found {self.times!r}")
        if self.silence is not None and not self.silence > 0:
            raise ValueError(f"retry_silence must be above 0 seconds, found {self.silence}")

    def after(self, error: BaseException | None, tried: int) -> bool:
        """Whether a request is worth another try that has ended so, after so many."""
        if tried >= self.times or isinstance(error, OverloadedError):
            return False
        return self.hung(error) or isinstance(error, UnavailableError)

    def hung(self, error: BaseException | None) -> bool:
        """Whether a request that has ended so waited for what may never come."""
        return self.silence is not None and isinstance(error, DeadlineExceededError)

    def limit(self, tried: int) -> float | None:
        """Seconds of silence that a try may have, after so many others."""
        return self.silence if tried < self.times else None


NEVER = Retries()


@dataclass
class _Request:
    index: int
    until: float  # by time.monotonic
    tries: int = 0

    def pause(self) -> float:
        """Seconds until it is sent again; longer each time."""
        self.tries += 1
        return min(FIRST_PAUSE * 2.0 ** min(self.tries, 10), LONGEST_PAUSE) * random.uniform(0.5, 1.0)

    def left(self) -> float:
        """Seconds until its time is over."""
        return max(self.until - time.monotonic(), 0.0)

    def pause_in_time(self) -> float | None:
        """Seconds until it is sent again; None: its time is over before that."""
        pause = self.pause()
        return pause if time.monotonic() + pause < self.until else None


class _Plan:
    """Which of the requests are sent, and when. Less are in flight after a refusal, and more after each answer.

    Args:
        count: how many there are.
        seconds: for each, from when it is first sent; None: `PATIENCE`.
    """

    def __init__(self, count: int, seconds: float | None) -> None:
        self._fresh = iter(range(count))
        self._missing = count
        self._patience = PATIENCE if seconds is None else seconds
        self._flying = 0
        self._limit = IN_FLIGHT
        self._waiting: list[tuple[float, int, _Request]] = []  # those that are sent again, by when

    def done(self) -> bool:
        """Whether all are answered."""
        return not self._missing

    def due(self) -> list[_Request]:
        """Those to send now."""
        now = time.monotonic()
        found = []
        while self._flying < self._limit and self._waiting and self._waiting[0][0] <= now:
            self._flying += 1
            found.append(heapq.heappop(self._waiting)[2])
        while self._flying + len(self._waiting) < self._limit and (index := next(self._fresh, None)) is not None:
            self._flying += 1
            found.append(_Request(index, now + self._patience))
        return found

    def wait(self) -> float | None:
        """Seconds until one is due again; None: none waits for that."""
        return max(self._waiting[0][0] - time.monotonic(), 0.0) if self._waiting else None

    def refused(self, request: _Request) -> bool:
        """Note that a request got no answer, most often for want of room; whether there is time to send it again."""
        pause = request.pause_in_time()
        if pause is None:
            return False
        again = time.monotonic() + pause
        self._flying -= 1
        heapq.heappush(self._waiting, (again, request.index, request))
        self._limit = max(self._limit // 2, 1)
        return True

    def answered(self) -> None:
        """Note an answer."""
        self._flying -= 1
        self._missing -= 1
        self._limit = min(self._limit + 1, IN_FLIGHT)


def send_all(
    start: Callable[[int, float | None], Any],
    count: int,
    seconds: float | None,
    again: Callable[[Any], bool] | None = None,
) -> list[Any]:
    """The responses to `count` requests, in their order.

    Args:
        start: called with a request's index and the seconds it has; gives a future of gRPC, or what is like one.
        seconds: for each request, from when it is first sent, tries and pauses included; None: no limit.
        again: whether a call that has ended so is worth another try; None: where the server had no room.

    Raises:
        Exception: of the first request that failed; the others are cancelled.
    """
    plan = _Plan(count, seconds)
    responses: list[Any] = [None] * count
    ended: queue.SimpleQueue[tuple[_Request, Any]] = queue.SimpleQueue()
    flying: dict[int, Any] = {}

    def send(request: _Request) -> None:
        call = flying[request.index] = start(request.index, None if seconds is None else request.left())
        call.add_done_callback(lambda call: ended.put((request, call)))

    try:
        while not plan.done():
            for request in plan.due():
                send(request)
            try:
                request, call = ended.get(timeout=plan.wait())
            except queue.Empty:
                continue
            del flying[request.index]
            if (again or was_full)(call) and plan.refused(request):
                continue
            responses[request.index] = call.result()
            plan.answered()
    finally:
        for call in flying.values():
            call.cancel()
    return responses


def send_one(
    ask: Callable[[float | None, float | None], _Response],
    seconds: float | None,
    wait_if_full: bool,
    retries: Retries = NEVER,
) -> _Response:
    """What one call gives, which is made again where the server had no room, or its answer broke off.

    Args:
        ask: makes it, within so many seconds, with so many of silence.
        seconds: see `send_all`.
        wait_if_full: whether it is made again where the server had no room.

    Raises:
        TridentError: of the call.
    """
    request = patient(seconds)
    tried = 0
    while True:
        try:
            return ask(None if seconds is None else request.left(), retries.limit(tried))
        except TridentError as error:
            again = retries.after(error, tried)
            tried += again
            again = again or (wait_if_full and isinstance(error, OverloadedError))
            pause = request.pause_in_time() if again else None
            if pause is None:
                raise
        time.sleep(pause)


def patient(seconds: float | None) -> _Request:
    """A request that is tried for so many seconds from now; None: for `PATIENCE`."""
    return _Request(0, time.monotonic() + (PATIENCE if seconds is None else seconds))


def least(*seconds: float | None) -> float | None:
    """The shortest of some limits; None: there is none."""
    return min((each for each in seconds if each is not None), default=None)


def was_full(call: Any) -> bool:
    """Whether a call ended because the server had no room for it."""
    return call.code() == grpc.StatusCode.UNAVAILABLE and says_full(call.details() or "")


async def send_all_async(
    start: Callable[[int, float | None], Awaitable[_Response]],
    count: int,
    seconds: float | None,
    again: Callable[[int, BaseException], bool],
) -> list[_Response]:
    """The same for calls that are awaited.

    Args:
        start: called with a request's index and the seconds it has; gives its response.
        seconds: see `send_all`.
        again: whether a request of an index is sent again that has ended with an error.

    Raises:
        TridentError: of the first request that failed; the others are cancelled.
    """
    plan = _Plan(count, seconds)
    responses: dict[int, _Response] = {}
    flying: dict[asyncio.Future[_Response], _Request] = {}
    try:
        while not plan.done():
            for request in plan.due():
                left = None if seconds is None else request.left()
                flying[asyncio.ensure_future(start(request.index, left))] = request
            if not flying:
                await asyncio.sleep(plan.wait() or 0.0)
                continue
            ended, _ = await asyncio.wait(flying, timeout=plan.wait(), return_when=asyncio.FIRST_COMPLETED)
            for call in ended:
                request = flying.pop(call)
                error = call.exception()
                if error is not None and again(request.index, error) and plan.refused(request):
                    continue
                responses[request.index] = call.result()
                plan.answered()
    finally:
        for call in flying:
            call.cancel()
        await asyncio.gather(*flying, return_exceptions=True)
    return [responses[index] for index in range(count)]
