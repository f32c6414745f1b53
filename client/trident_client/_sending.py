"""Many requests at once: so many in flight, and those that find a queue full are sent again.

Only a refusal of the server itself is answered by another try: it means that nothing of the request was done.
"""

from __future__ import annotations

import heapq
import queue
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

IN_FLIGHT = 16
FIRST_PAUSE = 0.05  # seconds; doubled with each try, and drawn between half and all of it
LONGEST_PAUSE = 2.0
PATIENCE = 300.0  # seconds that a request without a deadline is tried
_FULL = re.compile(r"queue is full|requests are being answered already")


@dataclass
class _Request:
    index: int
    until: float  # by time.monotonic
    tries: int = 0

    def pause(self) -> float:
        """Seconds until it is sent again; longer each time."""
        self.tries += 1
        return min(FIRST_PAUSE * 2.0 ** min(self.tries, 10), LONGEST_PAUSE) * random.uniform(0.5, 1.0)


def send_all(start: Callable[[int, float | None], Any], count: int, seconds: float | None) -> list[Any]:
    """The responses to `count` requests, in their order.

    Args:
        start: called with a request's index and the seconds it has; gives a future of gRPC.
        seconds: for each request, from when it is first sent, tries and pauses included; None: no limit.

    Raises:
        grpc.RpcError: of the first request that failed; the others are cancelled.
    """
    responses: list[Any] = [None] * count
    done: queue.SimpleQueue[tuple[_Request, Any]] = queue.SimpleQueue()
    flying: dict[int, Any] = {}
    waiting: list[tuple[float, int, _Request]] = []  # those that are sent again, by when
    fresh, answered, limit = iter(range(count)), 0, IN_FLIGHT

    def send(request: _Request) -> None:
        left = None if seconds is None else max(request.until - time.monotonic(), 1e-3)
        call = flying[request.index] = start(request.index, left)
        call.add_done_callback(lambda ended: done.put((request, ended)))

    try:
        while answered < count:
            now = time.monotonic()
            while len(flying) < limit and waiting and waiting[0][0] <= now:
                send(heapq.heappop(waiting)[2])
            while len(flying) + len(waiting) < limit and (index := next(fresh, None)) is not None:
                send(_Request(index, now + (PATIENCE if seconds is None else seconds)))
            try:
                request, call = done.get(timeout=max(waiting[0][0] - now, 0.0) if waiting else None)
            except queue.Empty:
                continue
            del flying[request.index]
            if _refused(call) and (again := time.monotonic() + request.pause()) < request.until:
                heapq.heappush(waiting, (again, request.index, request))
                limit = max(limit // 2, 1)
                continue
            responses[request.index] = call.result()
            answered += 1
            limit = min(limit + 1, IN_FLIGHT)
    finally:
        for call in flying.values():
            call.cancel()
    return responses


def _refused(call: Any) -> bool:
    """Whether the server had no room for a request."""
    full = call.code() == grpc.StatusCode.UNAVAILABLE and _FULL.search(call.details() or "")
    return bool(full)
