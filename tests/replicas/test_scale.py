"""One server, then three, behind Envoy and behind the gateway: how throughput grows. `make replicas`.

Two cores compute no faster with three servers than with one. So each step of these engines sleeps, as one that waits
for an accelerator: the step's time is made up, and everything else is real.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import gateways
from tests.replicas.fleet import (
    REPLICAS,
    SLOTS,
    Ask,
    Callers,
    Fleet,
    GatewayCallers,
    Load,
    make_models,
    proxy,
)
from tests.replicas.test_gateway import wait_for
from trident_serving.launcher.local import LocalServer

pytestmark = [pytest.mark.replicas, pytest.mark.timeout(1200)]

STEP_SECONDS = 0.05
TOKENS = 40  # of each answer
CALLERS = 2 * REPLICAS * SLOTS
SPREAD_SECONDS, MEASURED_SECONDS = 15.0, 15.0
WANTED = 2.6  # times the throughput of one server
Door = tuple[Ask, Callable[[int], Any]]


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    repository = make_models(tmp_path_factory.mktemp("models"), prompt_lookup=False)
    environment = {
        "PYTHONPATH": str(Path(__file__).with_name("slow_steps")),
        "STEP_SECONDS": str(STEP_SECONDS),
    }
    made = Fleet(repository, tmp_path_factory.mktemp("fleet"), environment)
    yield made
    made.stop()


@contextlib.contextmanager
def envoy(fleet: Fleet, certificates: Path, folder: Path) -> Iterator[Door]:
    with proxy(fleet, certificates, folder) as made, contextlib.closing(Callers(made, (TOKENS, TOKENS))) as callers:
        yield callers.stream(callers.grpc), lambda count: made.wait_for(fleet.servers[:count])


@contextlib.contextmanager
def gateway(fleet: Fleet, certificates: Path, folder: Path) -> Iterator[Door]:
    with gateways.running(folder / "log", *(server.grpc_url for server in fleet.servers)) as made:
        wait_for(made, REPLICAS)
        yield GatewayCallers(made, (TOKENS, TOKENS)).stream, lambda count: wait_for(made, count)


@pytest.mark.parametrize("door", [envoy, gateway], ids=["envoy", "gateway"])
def test_three_servers_give_nearly_three_times_as_much(
    door: Callable[[Fleet, Path, Path], contextlib.AbstractContextManager[Door]],
    slow: Fleet,
    certificates: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    def rate(servers: list[LocalServer]) -> float:
        """Tokens a second."""
        began, before = time.monotonic(), slow.counter("trident_generated_tokens_total", servers)
        time.sleep(MEASURED_SECONDS)
        made = slow.counter("trident_generated_tokens_total", servers) - before
        return made / (time.monotonic() - began)

    with door(slow, certificates, tmp_path) as (ask, wait):
        for index in range(1, REPLICAS):
            assert slow.drain(index) == 0
        wait(1)
        with Load({"stream": (CALLERS, ask)}) as done:
            time.sleep(5)
            one = rate(slow.servers[:1])
            for index in range(1, REPLICAS):
                slow.start_again(index)
            wait(REPLICAS)
            time.sleep(SPREAD_SECONDS)  # until what had waited for the only server is answered
            three = rate(slow.servers)
    with capsys.disabled():
        print(
            f"\nsteps of {STEP_SECONDS:g} s more, {CALLERS} callers: one server gives {one:.0f} tokens/s, three give"
            f" {three:.0f}, {three / one:.2f} times as many; {len(done.failed())} of {len(done.requests)} failed"
        )
    assert done.failed() == []
    assert three >= WANTED * one
