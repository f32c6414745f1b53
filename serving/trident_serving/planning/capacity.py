"""How many replicas are enough: a model of queues over a measured curve.

Prompts of one replica run one behind the other in chunks, each in a step in which the answers that run take a token.
So a prompt's first token comes after those before it (a queue with one server; its waits by Kingman's formula), and
each token of an answer takes a step, made longer by the prompts. Slots of all replicas are one pool, as requests go to
the replica with the fewest; the share that finds none is Erlang's, with Hayward's correction for bursts.
Sources: Erlang 1917; Kingman 1961; Fredericks 1980 for Hayward's approximation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from trident_serving.errors import InvalidRequest
from trident_serving.planning.curve import Curve
from trident_serving.planning.traffic import Targets, Traffic

MOST_REPLICAS = 100_000
_LENGTHS = 400  # quantiles of the prompts' lengths that stand for all
_MANY = 5000  # places from which on Erlang's formula is as good as its limit


@dataclass(frozen=True)
class Load:
    """One replica of several under traffic.

    Attributes:
        busy: its share of the rate at which no slot would ever be free.
        running: answers that run, on average.
        first_token: seconds until the targets' share of requests have theirs; infinity: they never do.
        token: seconds from one token of an answer to the next.
        waiting: share of requests that find no slot.
    """

    busy: float
    running: float
    first_token: float
    token: float
    waiting: float


NEVER = Load(1.0, math.inf, math.inf, math.inf, 1.0)


@dataclass(frozen=True)
class Plan:
    """What traffic needs.

    Attributes:
        replicas: the least number that meets the targets.
        load: of each.
        memory_bytes: of all.
        start_bytes: that all read when they start at once.
        spare: the share of the rate that comes on top before the targets are missed.
    """

    replicas: int
    load: Load
    memory_bytes: int
    start_bytes: int
    spare: float


def load(curve: Curve, traffic: Traffic, targets: Targets, replicas: int) -> Load:
    """One of so many replicas under the traffic."""
    rate = traffic.rate / replicas
    most = highest_rate(curve, traffic)
    if rate >= most:
        return NEVER
    prompts = rate * traffic.prompt_tokens * curve.prefill_seconds  # share of the time
    low, high = 0.0, float(curve.slots)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _running(curve, traffic, rate, middle) > middle else (low, middle)
    running = high
    token = curve.step(running) / (1 - prompts)
    waiting = _no_slot(running, curve.slots, replicas, traffic.burstiness)
    # What comes in a burst goes to different replicas.
    bursts = 1 + (traffic.burstiness**2 - 1) / replicas
    first = _first_token(curve, traffic, targets, rate, running, waiting, bursts)
    return Load(rate / most, running, first, token, waiting)


def highest_rate(curve: Curve, traffic: Traffic) -> float:
    """Requests a second at which all slots of a replica are always taken."""
    low, high = 0.0, 1 / (traffic.prompt_tokens * curve.prefill_seconds)
    for _ in range(50):
        middle = (low + high) / 2
        full = _running(curve, traffic, middle, curve.slots) >= curve.slots
        low, high = (low, middle) if full else (middle, high)
    return low


def plan(curve: Curve, traffic: Traffic, targets: Targets) -> Plan:
    """The least number of replicas that meets the targets.

    Raises:
        InvalidRequest: none does, however many there are; the message says which target is out of reach.
    """
    alone = load(curve, traffic, targets, MOST_REPLICAS)
    if alone.busy > targets.busy:
        raise InvalidRequest(
            f"{traffic.rate:g} requests a second are too many for {MOST_REPLICAS} replicas: one that is "
            f"{targets.busy:.0%} busy answers {targets.busy * highest_rate(curve, traffic):.3g} a second"
        )
    if not _meets(alone, targets):
        first = alone.first_token > targets.first_token
        found, wanted = (alone.first_token, targets.first_token) if first else (alone.token, targets.token)
        raise InvalidRequest(
            f"no number of replicas meets the targets: {'the first token' if first else 'a token'} takes {found:.3f} s "
            f"even where nothing else runs, {wanted:g} s is asked for"
        )
    low, high = 0, 1
    while not _meets(load(curve, traffic, targets, high), targets):
        low, high = high, min(2 * high, MOST_REPLICAS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _meets(load(curve, traffic, targets, middle), targets) else (middle, high)
    return Plan(
        high,
        load(curve, traffic, targets, high),
        high * curve.memory_bytes,
        high * curve.weights_bytes,
        _spare(curve, traffic, targets, high),
    )


def _meets(found: Load, targets: Targets) -> bool:
    soon = found.first_token <= targets.first_token and found.token <= targets.token
    return soon and found.busy <= targets.busy


def _spare(curve: Curve, traffic: Traffic, targets: Targets, replicas: int) -> float:
    low, high = 1.0, 4.0
    for _ in range(30):
        middle = (low + high) / 2
        more = replace(traffic, rate=traffic.rate * middle)
        low, high = (middle, high) if _meets(load(curve, more, targets, replicas), targets) else (low, middle)
    return low - 1


def _running(curve: Curve, traffic: Traffic, rate: float, running: float) -> float:
    """Slots that requests take where so many answers make the steps as long as they are."""
    token = curve.step(running) / (1 - rate * traffic.prompt_tokens * curve.prefill_seconds)
    return rate * (traffic.answer_tokens * token + _prompt_seconds(curve, traffic, running, traffic.prompt_tokens))


def _prompt_seconds(curve: Curve, traffic: Traffic, running: float, tokens: float) -> float:
    """From a prompt's first step to its last, with so many answers beside it."""
    steps = max(tokens / curve.prefill_chunk, 1.0)
    return tokens * curve.prefill_seconds + steps * (curve.step(running) if running >= 1 else running * curve.step(1))


def _no_slot(running: float, slots: int, replicas: int, burstiness: float) -> float:
    """The share of requests that find no slot of any replica: Erlang C, in units of a burst."""
    burst = 1 + (max(burstiness, 1.0) ** 2 - 1) / 2
    offered, places = running * replicas / burst, slots * replicas / burst
    if places > _MANY:  # Halfin and Whitt 1981, who are exact in the limit
        free = (places - offered) / math.sqrt(offered)
        normal = NormalDist()
        return 1 / (1 + free * normal.cdf(free) / normal.pdf(free)) if free < 30 else 0.0
    blocked = 1.0
    for place in range(1, max(int(places), 1) + 1):
        blocked = offered * blocked / (place + offered * blocked)
    return min(places * blocked / (places - offered * (1 - blocked)), 1.0)


def _first_token(
    curve: Curve, traffic: Traffic, targets: Targets, rate: float, running: float, waiting: float, bursts: float
) -> float:
    """Seconds until the targets' share of the requests have their first token.

    Args:
        bursts: the squared variation of the time from one request of a replica to the next.
    """
    late = 1 - targets.share
    if waiting > late:
        return math.inf
    lengths = quantiles(
        traffic.prompt_tokens, traffic.prompt_variation, [(one + 0.5) / _LENGTHS for one in range(_LENGTHS)]
    )
    own = np.array([_prompt_seconds(curve, traffic, running, tokens) for tokens in lengths])
    mean = own.mean()
    busy = rate * mean
    if busy >= 1:
        return math.inf
    varied = (bursts + own.var() / mean**2) / 2
    decay = (1 - busy) / (mean * max(varied, 1e-9))

    def later(seconds: float) -> float:
        """The share that has none by then."""
        left = seconds - own
        return float(np.where(left < 0, 1.0, busy * np.exp(-decay * np.maximum(left, 0.0))).mean()) + waiting

    high = 1.0
    while later(high) > late:
        high *= 2
    low = 0.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if later(middle) > late else (low, middle)
    return high


def quantiles(mean: float, variation: float, shares: Sequence[float]) -> NDArray[np.float64]:
    """Lengths of a lognormal distribution, at least 1, below which these shares lie."""
    spread = math.sqrt(math.log(1 + variation**2))
    normal = [NormalDist().inv_cdf(share) for share in shares]
    found: NDArray[np.float64] = mean * np.exp(spread * np.array(normal) - spread**2 / 2)
    return found.clip(min=1.0)
