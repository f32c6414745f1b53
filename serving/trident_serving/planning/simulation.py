"""Replicas request by request, to check the model of `capacity` by.

Each replica does what the engine does, in continuous time: prompts run one behind the other in chunks, every step gives
each running answer a token, and a request without a slot waits for one, first come, first served. A request goes to the
replica with the fewest of two that are drawn, as Envoy's least-request balancing does it.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trident_serving.planning.curve import Curve
from trident_serving.planning.traffic import Traffic

_CHOICES = 2


@dataclass(frozen=True)
class Simulated:
    """What requests saw.

    Attributes:
        first_token: seconds until the first token of each.
        token: seconds from one token to the next, the mean of each answer.
        running: answers that ran in a replica, on average over time.
        busy: share of the time in which a replica had work, on average.
    """

    first_token: NDArray[np.float64]
    token: NDArray[np.float64]
    running: float
    busy: float


class _Request:
    __slots__ = ("answer", "begun", "came", "prompt")

    def __init__(self, came: float, prompt: float, answer: float) -> None:
        self.came, self.prompt, self.answer = came, prompt, answer
        self.begun = math.nan


class _Replica:
    """One engine; `tokens` counts those that every answer that runs has been given since the beginning."""

    def __init__(self, curve: Curve) -> None:
        self.curve = curve
        self.now = self.tokens = self.done = 0.0  # `done`: tokens of the first prompt that have run
        self.prompts: deque[_Request] = deque()
        self.waiting: deque[_Request] = deque()
        self.answers: list[tuple[float, int, _Request]] = []  # by the count of tokens at which they end
        self.version = 0
        self.answer_seconds = self.busy_seconds = 0.0

    @property
    def requests(self) -> int:
        return len(self.prompts) + len(self.waiting) + len(self.answers)

    @property
    def _step(self) -> float:
        """Seconds of a step as it is now."""
        step = self.curve.step(len(self.answers)) if self.answers else 0.0
        return step + (self.curve.prefill_chunk * self.curve.prefill_seconds if self.prompts else 0.0)

    def advance(self, now: float) -> None:
        """Let time pass in which nothing begins or ends."""
        passed, self.now = now - self.now, now
        self.answer_seconds += passed * len(self.answers)
        if not (self.prompts or self.answers):
            return
        self.busy_seconds += passed
        steps = passed / self._step
        if self.answers:
            self.tokens += steps
        if self.prompts:
            self.done += steps * self.curve.prefill_chunk

    def next_event(self) -> float:
        """When the first prompt or the next answer ends, as things are."""
        steps = math.inf
        if self.answers:
            steps = self.answers[0][0] - self.tokens
        if self.prompts:
            steps = min(steps, (self.prompts[0].prompt - self.done) / self.curve.prefill_chunk)
        return self.now + max(steps, 0.0) * self._step if math.isfinite(steps) else math.inf

    def admit(self, request: _Request) -> None:
        """A request comes."""
        self.waiting.append(request)
        self._fill()

    def end(self, number: int) -> tuple[_Request, bool]:
        """What ends now: a prompt, whose answer begins, or an answer; returns which, and whether it was an answer."""
        answer = self.answers[0][0] - self.tokens if self.answers else math.inf
        prompt = (self.prompts[0].prompt - self.done) / self.curve.prefill_chunk if self.prompts else math.inf
        if answer <= prompt:
            request = heapq.heappop(self.answers)[2]
            self._fill()
            return request, True
        request = self.prompts.popleft()
        self.done = 0.0
        request.begun = self.now
        heapq.heappush(self.answers, (self.tokens + request.answer, number, request))
        return request, False

    def _fill(self) -> None:
        while self.waiting and len(self.prompts) + len(self.answers) < self.curve.slots:
            self.prompts.append(self.waiting.popleft())


def simulate(
    curve: Curve, traffic: Traffic, replicas: int, seconds: float, seed: int = 0, warm: float = 0.25
) -> Simulated:
    """Run replicas for a time.

    Args:
        seconds: in which requests come; those that have come are answered.
        seed: of all that is drawn.
        warm: share of the time whose requests are not counted.
    """
    random = np.random.default_rng(seed)
    arrivals = _arrivals(traffic, seconds, random)
    prompts = _lengths(traffic.prompt_tokens, traffic.prompt_variation, len(arrivals), random)
    answers = _lengths(traffic.answer_tokens, traffic.answer_variation, len(arrivals), random)
    drawn = random.integers(replicas, size=(len(arrivals), _CHOICES))
    fleet = [_Replica(curve) for _ in range(replicas)]
    events: list[tuple[float, int, int]] = []  # when, replica, version
    first: list[float] = []
    token: list[float] = []
    coming, number, warmed = 0, 0, warm * seconds

    def touch(index: int) -> None:
        replica = fleet[index]
        replica.version += 1
        if math.isfinite(at := replica.next_event()):
            heapq.heappush(events, (at, index, replica.version))

    while coming < len(arrivals) or events:
        if coming < len(arrivals) and (not events or arrivals[coming] <= events[0][0]):
            index = min((int(one) for one in drawn[coming]), key=lambda one: fleet[one].requests)
            fleet[index].advance(float(arrivals[coming]))
            fleet[index].admit(_Request(float(arrivals[coming]), float(prompts[coming]), float(answers[coming])))
            coming += 1
            touch(index)
            continue
        at, index, version = heapq.heappop(events)
        replica = fleet[index]
        if version != replica.version:
            continue
        replica.advance(at)
        number += 1
        request, ended = replica.end(number)
        if request.came >= warmed and ended:
            token.append((at - request.begun) / request.answer)
        elif request.came >= warmed:
            first.append(at - request.came)
        touch(index)
    spent = max(replica.now for replica in fleet) * replicas
    running = sum(replica.answer_seconds for replica in fleet) / spent
    busy = sum(replica.busy_seconds for replica in fleet) / spent
    return Simulated(np.array(first), np.array(token), running, busy)


def _arrivals(traffic: Traffic, seconds: float, random: np.random.Generator) -> NDArray[np.float64]:
    """Moments of a renewal process with gamma-distributed gaps."""
    shape = 1 / traffic.burstiness**2
    count = int(traffic.rate * seconds * 1.2) + 100
    moments: NDArray[np.float64] = np.cumsum(random.gamma(shape, 1 / (traffic.rate * shape), count))
    return moments[: int(np.searchsorted(moments, seconds))]


def _lengths(mean: float, variation: float, count: int, random: np.random.Generator) -> NDArray[np.float64]:
    """Lengths of a lognormal distribution, at least 1."""
    spread = math.sqrt(math.log(1 + variation**2))
    found: NDArray[np.float64] = random.lognormal(math.log(mean) - spread**2 / 2, spread, count)
    return found.clip(min=1.0)
