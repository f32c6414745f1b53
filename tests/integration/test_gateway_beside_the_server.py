"""`--gateway-port`: the launcher starts the gateway beside the server, keeps it running, and ends it first."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny_models
from tests.conftest import post, run_export
from tests.integration.test_launcher import children
from trident_client import Client
from trident_serving.launcher import local
from trident_serving.launcher.local import LocalServer


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("beside")
    entry = tiny_models.causal_entry(tiny_models.make_causal(root / "gen", "llama", context=4096), context=4096)
    (root / "models.toml").write_text(tiny_models.models_toml({"gen": entry}))
    done = run_export("export", "--models-file", str(root / "models.toml"), "--repository", str(root / "repository"))
    assert done.returncode == 0, done.stderr
    return root / "repository"


@pytest.fixture
def served(repository: Path, tmp_path: Path) -> Iterator[tuple[LocalServer, str]]:
    (port,) = local.free_ports(1)
    server = local.start(repository, tmp_path / "log", flags=["--gateway-port", str(port)])
    yield server, f"http://127.0.0.1:{port}"
    server.stop()


def gateway_process(server: LocalServer) -> int:
    return next(pid for pid, command in children(server.launcher.pid).items() if "trident_gateway" in command)


def completion(url: str, tokens: int, seconds: float = 60) -> str:
    """The text, once the gateway is there."""
    body = {"model": "gen", "prompt": "A", "max_tokens": tokens, "temperature": 0}
    deadline = time.monotonic() + seconds
    while True:
        try:
            status, text = post(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
            if status == 200:
                return str(json.loads(text)["choices"][0]["text"])
        except OSError:
            text = "nothing listens"
        assert time.monotonic() < deadline, text
        time.sleep(0.1)


def test_it_is_restarted_and_ends_without_cutting_an_answer(served: tuple[LocalServer, str]) -> None:
    server, url = served
    with Client(server.grpc_url, timeout=60) as client:
        expected = client.generate("A", model="gen", max_tokens=8).text
        whole = client.generate("A", model="gen", max_tokens=3000, min_tokens=3000).text
    assert completion(url, 8) == expected
    killed = gateway_process(server)
    os.kill(killed, signal.SIGKILL)
    assert completion(url, 8) == expected
    assert "the gateway ended with status -9; it is started again" in server.log.read_text()

    body = {"model": "gen", "prompt": "A", "max_tokens": 3000, "min_tokens": 3000, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        first = response.readline()
        threading.Timer(0.1, server.launcher.terminate).start()
        lines = [first, *response]
    events = [line.removeprefix(b"data: ").strip() for line in lines if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == whole
    assert server.launcher.wait(60) == 0, server.log.read_text()
    assert not Path(f"/proc/{killed}").exists()


def test_a_gateway_that_can_not_start_leaves_the_server(repository: Path, tmp_path: Path) -> None:
    """Its file of keys is none: it is tried four times, and the server goes on."""
    (tmp_path / "keys").write_text("no keys")
    (port,) = local.free_ports(1)
    flags = ["--gateway-port", str(port), "--gateway-keys", str(tmp_path / "keys")]
    server = local.start(repository, tmp_path / "log", flags=flags)
    try:
        deadline = time.monotonic() + 120
        while "it stays down, the server goes on" not in server.log.read_text():
            assert time.monotonic() < deadline, server.log.read_text()
            time.sleep(0.2)
        with Client(server.grpc_url, timeout=60) as client:
            assert client.generate("A", model="gen", max_tokens=8).num_output_tokens == 8
    finally:
        server.stop()
