"""The processes that make the traffic: `python -m benchmarks.soak.workers ROLE PLAN JOURNAL`.

Each has a few threads that make one call at a time, and writes a line of its journal for every call.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.soak import answers, faults, gateway, hostile, refusals, reloads
from benchmarks.soak.answers import Answer, Case
from benchmarks.soak.calls import STREAMS, UNARY, WHOLE, Address, Caller, CallError, Way
from benchmarks.soak.refusals import Refusal

# What a model that is being unloaded or loaded answers; only requests to such a model may get it.
AWAY = ("UNAVAILABLE", "HTTP 503")
# For UNAVAILABLE from a decoupled model the generate endpoint gives status 400 and the code's name in the text.
AWAY_WORDS = ("has no available versions", "UNAVAILABLE: ")
SILENT_CONNECTIONS = 100
# gRPC closes them after two minutes by itself.
SILENT_SECONDS = 60.0
# Pause after a call without a right answer, so that a server that has ended is not called thousands of times.
REST_SECONDS = 0.5


@dataclass(frozen=True)
class Plan:
    """What all processes know.

    Attributes:
        ends: when nothing new is begun, on the system's monotonic clock.
        expected: the right answers, by the names of their cases.
        reloaded: models that are unloaded and loaded meanwhile.
        key: the admin key.
    """

    address: Address
    ends: float
    expected: dict[str, Answer]
    reloaded: list[str]
    key: str

    def save(self, file: Path) -> None:
        """Write it to a file that only its owner can read."""
        file.touch(mode=0o600)
        file.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, file: Path) -> Plan:
        """Read it."""
        found = json.loads(file.read_text())
        return cls(**(found | {"address": Address(**found["address"])}))


@dataclass(frozen=True)
class Entry:
    """One call.

    Attributes:
        kind: what it was.
        outcome: "good", "wrong", "error", "away"; "refused", "known", "unexpected" for bad requests; "done" for others.
        detail: the error or the difference, in one line.
        when: its end, on the system's monotonic clock.
        seconds: how long it took.
    """

    kind: str
    outcome: str
    detail: str
    when: float
    seconds: float


class Journal:
    """Writes entries, from any thread."""

    def __init__(self, file: Path) -> None:
        self._output = file.open("w", buffering=1)
        self._lock = threading.Lock()

    def close(self) -> None:
        """Write no more."""
        self._output.close()

    def note(self, kind: str, since: float, outcome: str, detail: str = "") -> None:
        """Write one.

        Args:
            since: when the call began.
        """
        now = time.monotonic()
        line = json.dumps(asdict(Entry(kind, outcome, detail, now, now - since)))
        with self._lock:
            self._output.write(f"{line}\n")


def read(file: Path) -> list[Entry]:
    """The entries of a journal."""
    lines = file.read_text().splitlines(keepends=True)
    return [
        Entry(**json.loads(line)) for line in lines if line.endswith("\n")
    ]  # one that was killed may leave half a line


def good(plan: Plan, journal: Journal, picks: Sequence[tuple[Case, str, Way]], pause: float) -> None:
    """Make good requests and compare their answers, until the end."""
    caller = Caller(plan.address)
    try:
        while time.monotonic() < plan.ends:
            case, name, way = random.choice(picks)
            since = time.monotonic()
            outcome, detail = _asked(plan, caller, case, way)
            journal.note(f"{case.model} by {name}", since, outcome, f"{case.name}: {detail}" if detail else "")
            time.sleep(pause if outcome == "good" else pause + REST_SECONDS)
    finally:
        caller.close()


def _asked(plan: Plan, caller: Caller, case: Case, way: Way) -> tuple[str, str]:
    try:
        wrong = answers.difference(case, plan.expected[case.name], way(caller, case))
    except CallError as error:
        away = error.code in AWAY or any(words in error.message for words in AWAY_WORDS)
        return ("away" if away and case.model in plan.reloaded else "error"), str(error)
    return ("wrong" if wrong else "good"), wrong


def bad(plan: Plan, journal: Journal, several: list[Refusal], pause: float) -> None:
    """Make bad requests, one after the other, until the end."""
    random.shuffle(several)
    while time.monotonic() < plan.ends:
        for refusal in several:
            if time.monotonic() >= plan.ends:
                return
            since = time.monotonic()
            reply = refusal.send(plan.address)
            wrong = refusals.complaint(refusal, reply)
            outcome = "unexpected" if wrong else "known" if refusals.is_known(refusal, reply) else "refused"
            journal.note(f"bad request: {refusal.name}", since, outcome, wrong or reply.message[:200])
            time.sleep(pause)


def silent(plan: Plan, journal: Journal) -> None:
    """Hold connections that send nothing."""
    while (since := time.monotonic()) < plan.ends:
        held = faults.silent_connections(plan.address, SILENT_CONNECTIONS)
        time.sleep(max(min(plan.ends - time.monotonic(), SILENT_SECONDS), 0.0))
        for connection in held:
            connection.close()
        journal.note("a hundred silent connections", since, "done")


def break_off(plan: Plan, journal: Journal, known: Mapping[str, Callable[[Address], None]], pause: float) -> None:
    """Be a caller that does not wait for its answer, until the end."""
    names = list(known)
    while time.monotonic() < plan.ends:
        name = random.choice(names)
        since = time.monotonic()
        try:
            known[name](plan.address)
            journal.note(name, since, "done")
        except (CallError, OSError) as error:
            journal.note(name, since, "error", str(error))
        time.sleep(pause)


def reload(plan: Plan, journal: Journal, pause: float) -> None:
    """Unload and load models, until the end."""
    while time.monotonic() < plan.ends:
        for model in plan.reloaded:
            since = time.monotonic()
            try:
                reloads.reload(plan.address, plan.key, model)
                journal.note(f"{model} unloaded and loaded", since, "done")
            except CallError as error:
                journal.note(f"{model} unloaded and loaded", since, "error", str(error))
            time.sleep(pause)


def _picks(cases: Sequence[Case], ways: dict[str, Way]) -> list[tuple[Case, str, Way]]:
    return [(case, name, way) for case in cases for name, way in ways.items()]


def _reloaded(plan: Plan, generators: bool) -> list[Case]:
    cases = [case for model in plan.reloaded for case in answers.RELOADED[model]]
    return [case for case in cases if case.rows != generators]


def threads(role: str, plan: Plan, journal: Journal) -> list[Callable[[], None]]:
    """What the threads of a process do."""
    cached = [case for case in answers.CACHED if case.name in plan.expected]
    generations = answers.GENERATIONS + cached + _reloaded(plan, generators=True)
    streams, whole = _picks(generations, STREAMS), _picks(generations, WHOLE)
    tasks = _picks(answers.TEMPLATES, UNARY | WHOLE)
    encoders = _picks(answers.EMBEDDINGS + _reloaded(plan, generators=False), UNARY)
    completions = _picks(answers.GENERATIONS + cached, gateway.COMPLETIONS)
    others = _picks(answers.EMBEDDINGS, gateway.EMBEDDINGS)
    others += _picks(gateway.translations(), gateway.TRANSLATIONS)
    roles: dict[str, list[Callable[[], None]]] = {
        "streams": [lambda: good(plan, journal, streams, 0.0)] * 3,
        "answers": [lambda: good(plan, journal, whole, 0.1), lambda: good(plan, journal, tasks, 0.1)] * 2,
        "embeddings": [lambda: good(plan, journal, encoders, 0.1)] * 2,
        "hostile": [
            lambda: bad(plan, journal, refusals.build() + hostile.build(), 0.1),
            lambda: silent(plan, journal),
        ],
        "faults": [lambda: break_off(plan, journal, faults.FAULTS, 0.5)] * 2,
        "reloads": [lambda: reload(plan, journal, 5.0)],
        "gateway": [
            lambda: good(plan, journal, completions, 0.0),
            lambda: good(plan, journal, completions + others, 0.1),
            lambda: bad(plan, journal, gateway.refusals(), 0.2),
            lambda: break_off(plan, journal, gateway.FAULTS, 0.5),
        ],
    }
    return roles[role]


ROLES = ("streams", "answers", "embeddings", "hostile", "faults", "reloads", "gateway")


def main(arguments: Sequence[str]) -> int:
    """Run one process; its exit status is 1 where a thread of it failed by itself."""
    role, plan, journal = arguments[0], Plan.load(Path(arguments[1])), Journal(Path(arguments[2]))
    broken: list[Any] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException:
            broken.append(work)
            traceback.print_exc()

    several = [threading.Thread(target=guarded, args=(work,)) for work in threads(role, plan, journal)]
    for thread in several:
        thread.start()
    for thread in several:
        thread.join()
    journal.close()
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
