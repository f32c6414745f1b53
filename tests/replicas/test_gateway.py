"""Three servers behind the gateway: `make replicas`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests import gateways
from tests.gateways import Gateway
from tests.replicas.fleet import REPLICAS, SLOTS, Fleet, GatewayCallers, Load, in_all, settle

pytestmark = [pytest.mark.replicas, pytest.mark.timeout(1200)]

SYSTEM = "You answer in plain words. " * 12  # that all conversations share
TURNS = 5


@pytest.fixture(scope="module")
def gateway(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    log = tmp_path_factory.mktemp("gateway") / "log"
    with gateways.running(log, *(server.grpc_url for server in fleet.servers)) as made:
        wait_for(made, REPLICAS)
        yield made


@pytest.fixture(scope="module")
def callers(gateway: Gateway) -> GatewayCallers:
    return GatewayCallers(gateway)


def wait_for(gateway: Gateway, healthy: int, seconds: float = 30) -> float:
    """Wait until so many servers answer it; how long that took."""
    began = time.monotonic()
    while sum(each["healthy"] for each in gateway.ask("/admin/status")[2]["servers"]) != healthy:
        assert time.monotonic() - began < seconds
        time.sleep(0.1)
    return time.monotonic() - began


LOADS: list[Load] = []


@pytest.fixture(scope="module")
def quiet(gateway: Gateway, callers: GatewayCallers) -> Load:
    """Load without a fault."""
    with Load(callers.kinds()) as done:
        settle(5)
    return done


def check(done: Load, capsys: Any, what: str, lost: int) -> None:
    """Only answers that had begun may fail, and not more than a server has at once."""
    LOADS.append(done)
    failed = done.failed()
    with capsys.disabled():
        print(f"\n{what}: {len(failed)} answers that had begun were lost; {done.told()}")
    assert [each for each in failed if each.first is None] == []
    assert len(failed) <= lost, failed


def test_without_a_fault(quiet: Load, capsys: Any) -> None:
    check(quiet, capsys, "quiet", 0)
    LOADS.clear()


def test_a_killed_server_takes_only_what_it_had_begun(
    gateway: Gateway, callers: GatewayCallers, fleet: Fleet, capsys: Any
) -> None:
    with Load(callers.kinds()) as done:
        settle()
        fleet.kill(0)
        noticed = wait_for(gateway, REPLICAS - 1)
        settle(8)
        fleet.start_again(0)
        wait_for(gateway, REPLICAS)
        settle()
    check(done, capsys, f"kill, noticed after {noticed:.1f} s", SLOTS)


def test_what_waits_for_a_frozen_server_moves_on(
    gateway: Gateway, callers: GatewayCallers, fleet: Fleet, capsys: Any
) -> None:
    with Load(callers.kinds()) as done:
        settle()
        fleet.freeze(0)
        noticed = wait_for(gateway, REPLICAS - 1)
        settle(8)
        fleet.thaw()
        wait_for(gateway, REPLICAS)
        settle()
    check(done, capsys, f"freeze, noticed after {noticed:.1f} s", SLOTS)
    # What had not begun did not wait for the server, which was away for longer.
    begun_late = [each for each in done.requests if each.kind == "stream" and (each.first or 0) > noticed + 3]
    assert begun_late == []


def test_a_server_that_drains_loses_nothing(
    gateway: Gateway, callers: GatewayCallers, fleet: Fleet, capsys: Any
) -> None:
    with Load(callers.kinds()) as done:
        settle()
        assert fleet.drain(1) == 0
        settle()
        fleet.start_again(1)
        wait_for(gateway, REPLICAS)
    check(done, capsys, "drain", 0)


def test_a_rolling_update_loses_nothing(gateway: Gateway, callers: GatewayCallers, fleet: Fleet, capsys: Any) -> None:
    with Load(callers.kinds()) as done:
        settle()
        for index in range(REPLICAS):
            assert fleet.drain(index) == 0
            fleet.start_again(index)
            wait_for(gateway, REPLICAS)
        settle()
    check(done, capsys, "rolling update", 0)


def test_faults_in_all(quiet: Load, capsys: Any) -> None:
    told = in_all(quiet, LOADS or [quiet], "gateway")
    with capsys.disabled():
        print(f"\n{told}")


def talk(gateway: Gateway, name: str, turns: int = TURNS) -> int:
    """A conversation; the tokens of its prompts."""
    messages = [{"role": "system", "content": SYSTEM}]
    read = 0
    for turn in range(turns):
        messages.append({"role": "user", "content": f"{name}: the question {turn} of this conversation"})
        body = {"model": "talk", "messages": messages, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
        status, _, answer = gateway.ask("/v1/chat/completions", body)
        assert status == 200, answer
        messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
        read += answer["usage"]["prompt_tokens"]
    return read


@pytest.mark.parametrize(("conversations", "at_once"), [(3, 1), (12, 3)])
def test_conversations_find_their_beginnings_again(
    gateway: Gateway, fleet: Fleet, tmp_path: Path, capsys: Any, conversations: int, at_once: int
) -> None:
    """Of the tokens that one server reads from its cache, three read at least 80 %."""

    def share(behind: Gateway) -> float:
        nonce = secrets.token_hex(4)  # what the caches have of others does not count
        time.sleep(1)  # the servers publish their numbers four times a second
        before = fleet.counter("trident_prefix_hit_tokens_total")
        names = [f"{nonce}-{number}" for number in range(conversations)]
        with ThreadPoolExecutor(at_once) as pool:
            read = sum(pool.map(lambda name: talk(behind, name), names))
        time.sleep(1)
        return (fleet.counter("trident_prefix_hit_tokens_total") - before) / read

    with gateways.running(tmp_path / "log", fleet.servers[0].grpc_url) as single:
        talk(single, "warm", 1)  # the system prompt
        one = share(single)
    for number in range(12):  # all servers have seen the system prompt
        talk(gateway, f"warm {number}", 1)
    three = share(gateway)
    with capsys.disabled():
        print(
            f"\n{conversations} conversations: from its cache one server read {one:.1%} of prompts, three {three:.1%}"
        )
    assert one > 0.5
    assert three >= 0.8 * one
