"""One soak from its beginning to its end, against a server that runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.soak import answers, reloads, watch, workers
from benchmarks.soak.answers import Answer, Case
from benchmarks.soak.calls import SECONDS, Address, Caller, CallError
from benchmarks.soak.watch import Watch
from benchmarks.soak.workers import Entry, Plan
from trident_serving.launcher import admin_key
from trident_serving.launcher.local import LocalServer

# How long the last calls of the workers may take, and then the requests without a caller.
END_SECONDS = SECONDS + 30
SETTLE_SECONDS = 60.0
# The launcher's lines about things that it had to repair.
MENDED = re.compile(r"trident: .*(has died|did not answer|was ended by signal|ended with status|could not be loaded).*")
TOUCHED_SLOTS = 32


@dataclass
class Outcome:
    """What a soak has seen.

    Attributes:
        entries: every call.
        watch: the processes over time.
        left: gauges that are not 0 at the end.
        mended: the launcher's lines about processes that died.
        failed_workers: processes of the traffic that failed by themselves.
        stop_seconds: how long the server took to end; None if it was not ended.
        stop_status: its exit status.
    """

    seconds: float
    entries: list[Entry]
    watch: Watch
    reloaded: list[str]
    left: dict[str, float]
    mended: list[str]
    failed_workers: list[str] = field(default_factory=list)
    stop_seconds: float | None = None
    stop_status: int | None = None

    @property
    def restarts(self) -> list[str]:
        """Processes that were replaced by others, although no call asked for it."""
        stages = {stage for model in self.reloaded for stage in reloads.TRITON_MODELS[model]}
        return [
            f"{name}: {len(several)} processes"
            for name, several in self.watch.series.items()
            if name not in stages and len(several) > 1
        ]

    def count(self, outcome: str) -> int:
        """How many calls had this outcome."""
        return sum(entry.outcome == outcome for entry in self.entries)


def run(
    server: LocalServer,
    seconds: float,
    reloaded: Sequence[str],
    say: Callable[[str], None],
    *,
    touch: bool = True,
    cached: bool = True,
    period: float = 2.0,
    gateway_port: int = 0,
) -> Outcome:
    """Send traffic for a while.

    Args:
        seconds: how long new calls are made.
        reloaded: models that are unloaded and loaded meanwhile.
        say: prints progress.
        touch: fill the KV cache once before.
        cached: ask smollm2_int8_cache, too, which is exported on request.
        period: seconds between two samples of the processes.
        gateway_port: of the gateway in front of the server; 0: there is none.
    """
    address = Address(server.http_port, server.grpc_port, server.metrics_port, gateway_port)
    log_begins = server.log.stat().st_size
    say("asking for the answers that are right")
    expected = expect(address, reloaded, cached)
    if touch:
        say("filling the KV cache once")
        touch_slots(address, ["smollm2", "smollm2_int8_cache"] if cached else ["smollm2"])
    watching = Watch(server.launcher.pid, server.http_port, period)
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(address, time.monotonic() + seconds, expected, list(reloaded), find_key(server))
        say(f"{len(_roles(plan))} processes make traffic for {seconds / 60:.1f} minutes")
        failed, entries = _traffic(plan, Path(folder), say)
    watching.stop()
    left = _settled(address)
    with server.log.open() as log:
        log.seek(log_begins)
        mended = [line.strip() for line in log if MENDED.match(line)]
    return Outcome(seconds, entries, watching, list(reloaded), left, mended, failed)


def expect(address: Address, reloaded: Sequence[str], cached: bool) -> dict[str, Answer]:
    """The answers before there is any traffic, one request after the other.

    Raises:
        CallError: one of them fails.
    """
    cases = answers.GENERATIONS + (answers.CACHED if cached else []) + answers.TEMPLATES + answers.EMBEDDINGS
    cases += [case for model in reloaded for case in answers.RELOADED[model]]
    caller = Caller(address)
    try:
        return {case.name: _ask(caller, case) for case in cases}
    finally:
        caller.close()


def _ask(caller: Caller, case: Case) -> Answer:
    generates = case.model.startswith("smollm2")
    found = caller.http_generate(case) if generates else caller.grpc(case)
    if missing := [name for name in case.outputs if name not in found]:
        raise CallError("answer", f"{case.name} has no {missing[0]}")
    return found


def touch_slots(address: Address, models: Sequence[str]) -> None:
    """Fill every slot of the generators as far as the traffic will, so that their caches have all their memory."""

    def ask(number: int, model: str) -> None:
        caller = Caller(address)
        try:
            words = f"{number} is a number. " + f"The story of number {number} goes on and on. " * 24
            caller.http_generate(Case("", model, {"text_input": words, "max_tokens": 2}))
        finally:
            caller.close()

    with ThreadPoolExecutor(TOUCHED_SLOTS) as pool:
        for model in models:
            list(pool.map(ask, range(TOUCHED_SLOTS), [model] * TOUCHED_SLOTS))


def find_key(server: LocalServer) -> str:
    """The admin key of a server that this user has started."""
    given = os.environ.get(admin_key.ENVIRONMENT)
    return given or admin_key.default_file(server.grpc_port).read_text(encoding="ascii").strip()


def _roles(plan: Plan) -> list[str]:
    """The processes that make the traffic."""
    return [role for role in workers.ROLES if role != "gateway" or plan.address.gateway_port]


def _traffic(plan: Plan, folder: Path, say: Callable[[str], None]) -> tuple[list[str], list[Entry]]:
    plan.save(folder / "plan")
    started = {}
    for role in _roles(plan):
        command = [sys.executable, "-m", "benchmarks.soak.workers", role, str(folder / "plan"), str(folder / role)]
        started[role] = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    failed = []
    try:
        deadline, said = plan.ends + END_SECONDS, time.monotonic()
        while any(process.poll() is None for process in started.values()) and time.monotonic() < deadline:
            time.sleep(0.5)
            if time.monotonic() - said > 60:
                said = time.monotonic()
                say(f"{max(plan.ends - said, 0) / 60:.1f} minutes to go")
    finally:
        for role, process in started.items():
            if process.poll() is None:
                process.kill()
                failed.append(f"{role} did not end within {END_SECONDS:.0f} s")
            elif process.returncode:
                failed.append(f"{role} ended with status {process.returncode}; its traceback is above")
            process.wait()
    entries = [entry for role in started if (folder / role).exists() for entry in workers.read(folder / role)]
    return failed, entries


def _settled(address: Address) -> dict[str, float]:
    """The gauges that are not 0 after requests without a caller had time to end."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        try:
            left = {name: value for name, value in watch.gauges(address).items() if value}
        except OSError:
            return {"the number of metrics ports that do not answer": 1.0}
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.5)
