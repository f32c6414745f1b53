"""A real Prometheus scrapes a real server and its gateway under load: every query of every dashboard and rule has data.

The server runs as docker-compose.yml runs it, with the launcher's gateway and API keys; it is scraped twice a second.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy import keys as stack_keys
from deploy import watching
from deploy.watching import PROMETHEUS, Prometheus
from tests.conftest import post
from tests.integration.test_shell import backend_process
from trident_gateway import keys
from trident_serving.launcher import local
from trident_serving.launcher.local import LocalServer

WINDOW = "20s"
# Nobody is refused in time for these, and nothing fires at first.
EMPTY = {'ALERTS{alertstate="firing"}'}

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")), reason="prometheus is not installed"
)


@needs_prometheus
def test_the_configuration_and_the_rules_are_valid(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("x")
    targets = {"trident": "a:1", "gateway": "a:2", "collector": "a:3"}
    config = watching.configured(tmp_path, targets, key, "5s")
    assert "SUCCESS" in promtool("check", "config", str(config))
    rules = promtool("check", "rules", *map(str, sorted((PROMETHEUS / "rules").iterdir())))
    assert sum(int(line.split()[1]) for line in rules.splitlines() if "SUCCESS" in line) == len(watching.rules())


@needs_prometheus
def test_the_alerts_fire_when_they_should() -> None:
    assert "SUCCESS" in promtool("test", "rules", *map(str, sorted((PROMETHEUS / "tests").iterdir())))


def promtool(*arguments: str) -> str:
    run = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@dataclass
class Stack:
    server: LocalServer
    gateway: str
    prometheus: Prometheus
    key: str

    def ask(self, path: str, body: dict[str, object], *, key: str = "") -> int:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key or self.key}"}
        return post(self.gateway + path, body, headers)[0]


@pytest.fixture(scope="module")
def stack(
    gateway_server: LocalServer, gateway_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """`rank` is marked as a model that its gate refused."""
    folder = tmp_path_factory.mktemp("watched")
    shutil.copytree(gateway_folder / "repository", folder / "repository")
    with (folder / "repository/rank/config.pbtxt").open("a") as config:
        config.write('\nparameters { key: "unverified" value { string_value: "a test says so" } }\n')
    assert stack_keys.main(folder / "keys") == 0
    hashes = folder / "keys/gateway/keys.json"
    user = keys.add(hashes, "test", [keys.INFERENCE])
    (port,) = local.free_ports(1)
    flags = ["--gateway-port", str(port), "--gateway-keys", str(hashes)]
    server = local.start(folder / "repository", folder / "log", flags=flags)
    try:
        targets = {"trident": f"127.0.0.1:{server.metrics_port}", "gateway": f"127.0.0.1:{port}", "collector": ""}
        key = folder / "keys/prometheus/key"
        with watching.running(folder / "prometheus", targets, key, "500ms") as prometheus:
            yield Stack(server, f"http://127.0.0.1:{port}", prometheus, user)
    finally:
        server.stop()


def until(holds: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.3)
    return False


def load(stack: Stack, ended: threading.Event) -> None:
    """Every kind of request, good ones and wrong ones."""
    messages = [{"role": "user", "content": "one two three one two three one two three"}]
    while not ended.is_set():
        stack.ask("/v1/chat/completions", {"model": "talk", "messages": messages, "max_tokens": 24, "temperature": 0})
        stack.ask("/v1/completions", {"model": "talk", "prompt": "one two", "max_tokens": 4, "n": 2, "stream": True})
        for model in ("embed", "classify"):
            path = {"embed": "/v1/embeddings", "classify": "/v1/classify"}[model]
            stack.ask(path, {"model": model, "input": ["one", "two"]})
        stack.ask("/v1/rerank", {"model": "rank", "query": "one", "documents": ["one", "two"]})
        stack.ask("/v1/entities", {"model": "tag", "input": "one two"})
        stack.ask("/v1/embeddings", {"model": "embed", "input": 3})
        stack.ask("/v1/embeddings", {"model": "embed", "input": "one"}, key="trident-wrong")


@pytest.mark.slow
@needs_prometheus
def test_every_query_of_every_dashboard_and_rule_has_data(stack: Stack) -> None:
    ask = stack.prometheus.values
    assert until(lambda: {value for _, value in ask("up")} == {1.0} and len(ask("up")) == 3, 30), ask("up")
    wanted = {
        watching.filled(query.expression, WINDOW)
        for board in watching.dashboards()
        for query in watching.queries(board)
    }
    wanted |= {rule["record"] for rule in watching.rules() if "record" in rule}
    wanted |= {
        selector for rule in watching.rules() if "alert" in rule for selector in watching.selectors(rule["expr"])
    }
    ended = threading.Event()
    callers = [threading.Thread(target=load, args=(stack, ended)) for _ in range(2)]
    for caller in callers:
        caller.start()
    try:
        missing = wanted - EMPTY

        def have_data() -> bool:
            missing.difference_update([query for query in missing if ask(query)])
            return not missing

        assert until(have_data, 40), sorted(missing)
    finally:
        ended.set()
        for caller in callers:
            caller.join()
    for query in EMPTY:
        ask(query)  # Prometheus takes it
    for rule in watching.rules():
        ask(rule["expr"])


@pytest.mark.slow
@needs_prometheus
def test_the_numbers_are_those_of_the_load(stack: Stack) -> None:
    """Ten requests of four tokens: the counters that the dashboards show rise by ten and by forty."""
    ask = stack.prometheus.values

    def total(query: str) -> float:
        return sum(value for _, value in ask(f"sum({query})"))

    def seen() -> tuple[float, float, float]:
        return (
            total('trident_gateway_requests_total{model="talk", status="200"}'),
            total('trident_generated_tokens_total{model="talk"}'),
            total('nv_inference_request_success{model="embed"}'),
        )

    time.sleep(1.5)  # a scrape after what ran before
    before = seen()
    body: dict[str, object] = {"model": "talk", "prompt": "one two", "max_tokens": 4, "min_tokens": 4}
    for _ in range(10):
        assert stack.ask("/v1/completions", body) == 200
        assert stack.ask("/v1/embeddings", {"model": "embed", "input": "one"}) == 200
    expected = before[0] + 10, before[1] + 40, before[2] + 10
    assert until(lambda: seen() == expected, 10), (before, seen())
    assert ask('trident_slots{model="talk"}')[0][1] == 4
    limit, reserved = (ask(f'trident_kv_cache_tokens_{name}{{model="talk"}}')[0][1] for name in ("limit", "reserved"))
    assert limit > reserved == 0


@pytest.mark.slow
@needs_prometheus
def test_a_backend_that_dies_and_a_model_that_its_gate_refused_are_told(stack: Stack) -> None:
    firing = stack.prometheus.firing
    assert until(lambda: "TridentUnverified" in firing(), 10), firing()
    assert [labels["model"] for labels in firing()["TridentUnverified"]] == ["rank"]
    assert "TridentBackendDied" not in firing()
    os.kill(backend_process(stack.server, "talk"), signal.SIGKILL)
    assert until(lambda: "TridentBackendDied" in firing(), 40), firing()
    assert [labels["model"] for labels in firing()["TridentBackendDied"]] == ["talk"]
    ready = 'trident_gateway_model_ready{model="talk"}'
    assert until(lambda: [value for _, value in stack.prometheus.values(ready)] == [1.0], 40)
    assert "TridentModelMissing" not in firing()
