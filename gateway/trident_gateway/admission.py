"""Who may ask now: so many requests of a model at once, so many that wait, so many with one key.

A queue is first come, first served. The server has one of its own; this one keeps what the server would refuse, and
forgets at once who has hung up.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from trident_gateway.errors import overloaded

_WEIGHT = 0.2  # of the newest answer in the mean time of one


class _Queue:
    """The requests of one model.

    Attributes:
        running: requests that were let in, each as often as it has answers.
        waiting: those that were not, each with its number of answers.
        seconds: that an answer takes, on average.
    """

    def __init__(self) -> None:
        self.running = 0
        self.limit = 1
        self.waiting: deque[tuple[asyncio.Future[None], int]] = deque()
        self.seconds = 1.0

    def fits(self, answers: int) -> bool:
        """Whether there is room; a request with more answers than the limit goes in when nothing else runs."""
        return self.running + answers <= self.limit or self.running == 0

    def retry_after(self) -> int:
        """Seconds until there may be room."""
        rounds = (len(self.waiting) + 1) / max(self.limit, 1)
        return min(max(math.ceil(rounds * self.seconds), 1), 60)

    def release(self, answers: int) -> None:
        """A request has ended."""
        self.running -= answers
        self.advance()

    def advance(self) -> None:
        """Let in the first ones that wait, as long as there is room."""
        while self.waiting:
            turn, answers = self.waiting[0]
            if not turn.done():  # else its client has hung up
                if not self.fits(answers):
                    return
                self.running += answers
                turn.set_result(None)
            self.waiting.popleft()


class Admission:
    """The queues of a gateway.

    Args:
        max_waiting: requests of one model that may wait.
        queue_seconds: that one may wait.
    """

    def __init__(self, max_waiting: int, queue_seconds: float) -> None:
        self._max_waiting = max_waiting
        self._queue_seconds = queue_seconds
        self._queues: defaultdict[str, _Queue] = defaultdict(_Queue)
        self._by_key: defaultdict[str, Counter[int]] = defaultdict(Counter)  # of each key's requests, their turns

    @property
    def running(self) -> int:
        """Requests that were let in."""
        return sum(queue.running for queue in self._queues.values())

    def depths(self) -> dict[str, tuple[int, int]]:
        """Requests that run, and that wait, by model."""
        return {model: (queue.running, len(queue.waiting)) for model, queue in self._queues.items()}

    @asynccontextmanager
    async def slot(
        self, model: str, limit: int, *, answers: int = 1, key: str = "", per_key: int = 0, request: object = None
    ) -> AsyncIterator[None]:
        """Let a request in, after it has waited for its turn.

        Args:
            model: its name.
            limit: answers of this model at once.
            answers: of this request.
            key: the name of its key.
            per_key: requests at once with this key; 0: no limit.
            request: to which this belongs, of which several may ask for a turn; None: one of its own.

        Raises:
            ApiError: the key has too many, the queue is full, or it took too long.
        """
        request = object() if request is None else request  # kept until the end, so that its id is nobody else's
        requests = self._by_key[key]
        if per_key and id(request) not in requests and len(requests) >= per_key:
            raise overloaded(f"this key has {per_key} requests at once already, its limit", 1)
        queue = self._queues[model]
        queue.limit = limit
        requests[id(request)] += 1
        try:
            await self._enter(queue, answers)
            began = time.monotonic()
            try:
                yield
            finally:
                queue.seconds += _WEIGHT * (time.monotonic() - began - queue.seconds)
                queue.release(answers)
        finally:
            requests[id(request)] -= 1
            if not requests[id(request)]:
                del requests[id(request)]

    async def _enter(self, queue: _Queue, answers: int) -> None:
        if not queue.waiting and queue.fits(answers):
            queue.running += answers
            return
        if len(queue.waiting) >= self._max_waiting:
            raise overloaded(f"{len(queue.waiting)} requests wait already: try again later", queue.retry_after())
        turn = asyncio.get_running_loop().create_future()
        queue.waiting.append((turn, answers))
        try:
            async with asyncio.timeout(self._queue_seconds):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                queue.release(answers)  # it was let in at the same moment
            else:
                with suppress(ValueError):
                    queue.waiting.remove((turn, answers))
                queue.advance()  # what this one kept from going in
            if isinstance(error, TimeoutError):
                wait = queue.retry_after()
                raise overloaded(f"no room within {self._queue_seconds:g} s: try again later", wait) from None
            raise
