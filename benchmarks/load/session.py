"""Measures models with our own driver: every door in turn, and every answer compared with that of a lone request."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.load import arrivals
from benchmarks.load.doors import Door
from benchmarks.load.figures import Figures, Limits, Run, summarize
from benchmarks.load.workloads import Generation, Workload, candidates

DRIVER = "trident"
# Where no rate is given: this share of what the first door answered with the most streams.
SHARE = 0.7
EXAMPLES = 3
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How long and how much.

    Attributes:
        seconds: of one measurement.
        streams: requests at a time, one measurement each.
        rates: requests a second of Poisson arrivals, one measurement each; None: one, see `SHARE`.
        rounds: of each measurement with streams; the doors take turns within a round.
        tokens: of a generated answer.
        limits: for goodput.
    """

    seconds: float = 10.0
    streams: Sequence[int] = (1, 4, 16)
    rates: Sequence[float] | None = None
    rounds: int = 1
    tokens: int = 32
    limits: Limits = field(default_factory=Limits)


@dataclass
class Found:
    """What was measured.

    Attributes:
        runs: the figures of each round.
        workloads: by model, of those that were measured.
        left_out: what was not measured, and why.
        faults: answers that are wrong or missing, as sentences.
    """

    runs: dict[Run, list[Figures]] = field(default_factory=dict)
    workloads: dict[str, Workload | Generation] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def add(self, run: Run, figures: Figures) -> None:
        """Keep a round of a measurement."""
        self.runs.setdefault(run, []).append(figures)

    def speed(self, run: Run) -> float | None:
        """Requests a second, the median of the rounds; None where it was not measured."""
        several = self.runs.get(run)
        return statistics.median(each.requests_per_second for each in several) if several else None


async def measure(
    model: str,
    parameters: Mapping[str, str],
    alone: Door,
    doors: Sequence[Door],
    settings: Settings,
    found: Found,
    say: Say,
) -> None:
    """Measure one model over each door that it can be asked at.

    Args:
        parameters: of the model's config.
        alone: gives the answers that all doors must give; it opens for every task.
        doors: are measured.
        found: is added to.
    """
    task = parameters["task"]
    say(f"{model}: the answers of lone requests")
    accepted = await _accepted(model, candidates(task, parameters, max(settings.streams), settings.tokens), alone)
    if isinstance(accepted, str):
        found.left_out.append(f"{model} ({task}): {accepted}")
        return
    workload, right = accepted
    found.workloads[model] = workload
    open_doors = [door for door in doors if door.opens(workload)]
    found.left_out += [
        f"{model} over {door.name}: there is no endpoint for {task}" for door in doors if door not in open_doors
    ]
    driver = _Driver(model, workload, right, settings, found, say)
    for door in open_doors:  # connections, and what a server makes ready for its first requests
        await driver.closed(door, Run(model, task, DRIVER, door.name, max(settings.streams)), 0.0, kept=False)
    for number in range(settings.rounds):
        for streams in settings.streams:
            for door in open_doors[:: 1 if number % 2 == 0 else -1]:
                await driver.closed(door, Run(model, task, DRIVER, door.name, streams), settings.seconds)
    rates = settings.rates
    if rates is None and open_doors:
        speed = found.speed(Run(model, task, DRIVER, open_doors[0].name, max(settings.streams)))
        rates = [float(f"{SHARE * speed:.2g}")] if speed else []
    for rate in rates or ():
        for door in open_doors:
            await driver.poisson(door, Run(model, task, DRIVER, door.name, None, rate))


async def _accepted(
    model: str, tried: Sequence[Workload | Generation], door: Door
) -> tuple[Workload | Generation, list[Any]] | str:
    """The first requests that a model answers, with the answer to each, asked one after the other; else why not."""
    refusal = "no requests are known for this task"
    for workload in tried:
        alone = replace(workload, greedy=True) if isinstance(workload, Generation) else workload
        try:
            answers = [(await door.ask(model, alone, item, lambda: None)).answer for item in workload.items]
        except Exception as error:
            refusal = f"{type(error).__name__}: {error}"
        else:
            return workload, answers
    return refusal


class _Driver:
    """Sends the requests of one model, whose items go round from one measurement to the next."""

    def __init__(
        self,
        model: str,
        workload: Workload | Generation,
        right: Sequence[Any],
        settings: Settings,
        found: Found,
        say: Say,
    ) -> None:
        self._model = model
        self._workload = workload
        self._right = right
        self._settings = settings
        self._found = found
        self._say = say
        self._first = 0

    async def closed(self, door: Door, run: Run, seconds: float, *, kept: bool = True) -> None:
        """One measurement with so many requests at a time."""
        assert run.streams is not None
        timed = await arrivals.closed(self._ask(door), self._workload.items, run.streams, seconds, self._first)
        self._note(run, timed, kept)

    async def poisson(self, door: Door, run: Run) -> None:
        """One measurement with random arrivals."""
        assert run.rate is not None
        items, seconds = self._workload.items, self._settings.seconds
        timed = await arrivals.poisson(self._ask(door), items, run.rate, seconds, first=self._first)
        self._note(run, timed, kept=True)

    def _ask(self, door: Door) -> arrivals.Ask:
        return lambda item, note: door.ask(self._model, self._workload, item, note)

    def _note(self, run: Run, timed: list[arrivals.Timed], kept: bool) -> None:
        self._first = (self._first + len(timed)) % len(self._workload.items)
        least = 0.0 if run.rate is None else self._settings.seconds
        figures = summarize(run, timed, self._right, self._settings.limits, least)
        if kept:
            self._say(f"{run.told()}: {figures.requests_per_second:.1f} requests/s")
            self._found.add(run, figures)
        self._found.faults += faults(run, timed, self._right, self._workload.items)


def faults(run: Run, timed: Sequence[arrivals.Timed], right: Sequence[Any], items: Sequence[Any]) -> list[str]:
    """Wrong and missing answers of one measurement, a sentence for each kind. A full queue is none of them."""
    failed = [each.error for each in timed if each.error]
    wrong = [each for each in timed if not each.full and not each.error and each.answer != right[each.item]]
    found = []
    if failed:
        shown = "; ".join(sorted(set(failed))[:EXAMPLES])
        found.append(f"{run.told()}: {len(failed)} of {len(timed)} requests failed: {shown}")
    if wrong:
        one = wrong[0]
        found.append(
            f"{run.told()}: {len(wrong)} of {len(timed)} answers are not those of a lone request, such as that to "
            f"{_short(items[one.item])}: {_short(one.answer)}, expected {_short(right[one.item])}"
        )
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
