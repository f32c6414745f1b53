"""When requests are sent: so many at a time (closed loop), or at moments of their own (Poisson arrivals)."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from benchmarks.load.doors import Answered, FullError, Note

Ask = Callable[[Any, Note], Awaitable[Answered]]
Now = Callable[[], float]


@dataclass
class Timed:
    """One request; moments in seconds of `time.perf_counter`.

    Attributes:
        item: what was asked, by its index.
        due: when it was to be sent: its waits count from here, also where the sender was late.
        end: when all of its answer was there.
        moments: when parts of a streamed answer came.
        answer: what can be compared; None where there is none.
        full: there was no room for it.
        error: what else went wrong; "": nothing.
        tokens: generated.
    """

    item: int
    due: float
    end: float = 0.0
    moments: list[float] = field(default_factory=list)
    answer: Any = None
    full: bool = False
    error: str = ""
    tokens: int = 0


async def _send(ask: Ask, items: Sequence[Any], item: int, due: float, now: Now) -> Timed:
    timed = Timed(item, due)
    try:
        answered = await ask(items[item], lambda: timed.moments.append(now()))
        timed.answer, timed.tokens = answered.answer, answered.tokens
    except FullError:
        timed.full = True
    except Exception as error:  # whatever a library raises is what the report tells
        timed.error = f"{type(error).__name__}: {error}"
    timed.end = now()
    return timed


async def closed(
    ask: Ask, items: Sequence[Any], streams: int, seconds: float, first: int = 0, now: Now = time.perf_counter
) -> list[Timed]:
    """`streams` callers, each of which sends its next request when it has its answer; at least one each.

    Args:
        items: what is asked, one after the other.
        seconds: no request begins later than this; those that run are waited for.
        first: the index of the first item.
    """
    numbers = itertools.count(first)
    until = now() + seconds
    found: list[Timed] = []

    async def caller() -> None:
        while True:
            found.append(await _send(ask, items, next(numbers) % len(items), now(), now))
            if now() >= until:
                return

    await asyncio.gather(*(caller() for _ in range(streams)))
    return found


def moments(rate: float, seconds: float, seed: int) -> list[float]:
    """When requests of a Poisson process come, in seconds from its beginning; at least one."""
    random, found, moment = Random(seed), list[float](), 0.0
    while not found or moment < seconds:
        moment += random.expovariate(rate)
        found.append(moment)
    return found[:-1] or found


async def poisson(
    ask: Ask, items: Sequence[Any], rate: float, seconds: float, seed: int = 0, first: int = 0
) -> list[Timed]:
    """Requests come at random moments, `rate` a second on average, however long their answers take.

    Args:
        seed: of the moments; the same seed gives each door the same ones.
        items: see `closed`; `seconds` and `first` too.
    """
    now = time.perf_counter
    began = now()
    tasks = []
    for number, moment in enumerate(moments(rate, seconds, seed)):
        due = began + moment
        await asyncio.sleep(max(0.0, due - now()))
        tasks.append(asyncio.create_task(_send(ask, items, (first + number) % len(items), due, now)))
    return list(await asyncio.gather(*tasks))
