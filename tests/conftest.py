"""Servers and models that the tests share; everything is real, nothing is mocked."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from trident_client import Client

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class RunningServer:
    """A server that a test may call."""

    http_port: int
    grpc_port: int
    metrics_port: int
    launcher: subprocess.Popen[str]
    log: Path

    @property
    def grpc_url(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.metrics_port}/metrics"


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def start_server(repository: Path, log: Path, *arguments: str, ready_seconds: float = 120) -> RunningServer:
    http_port, grpc_port, metrics_port = free_ports(3)
    command = [sys.executable, "-m", "trident_serving", "--repository", str(repository)]
    command += ["--http-port", str(http_port), "--grpc-port", str(grpc_port), "--metrics-port", str(metrics_port)]
    with log.open("w") as output:
        launcher = subprocess.Popen([*command, *arguments], stdout=output, stderr=subprocess.STDOUT, text=True)
    server = RunningServer(http_port, grpc_port, metrics_port, launcher, log)
    deadline = time.monotonic() + ready_seconds
    while time.monotonic() < deadline:
        if launcher.poll() is not None:
            raise RuntimeError(f"the server ended: {log.read_text()}")
        try:
            with urllib.request.urlopen(f"{server.http_url}/v2/health/ready", timeout=2):
                return server
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    launcher.terminate()
    raise RuntimeError(f"the server was not ready in {ready_seconds} s: {log.read_text()}")


def stop_server(server: RunningServer) -> None:
    server.launcher.terminate()
    server.launcher.wait(60)


def run_export(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trident_export", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=dict(os.environ))


@pytest.fixture(scope="session")
def default_repository() -> Path:
    """The default models, exported where `make serve` has them too."""
    done = run_export("export")
    assert done.returncode == 0, done.stderr
    return ROOT / "model_repository"


@pytest.fixture(scope="session")
def server(default_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The default models behind the real server."""
    running = start_server(default_repository, tmp_path_factory.mktemp("server") / "log")
    yield running
    stop_server(running)


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.grpc_url, timeout=120) as connected:
        yield connected


@pytest.fixture(scope="session")
def smollm2_folder(default_repository: Path) -> Path:
    """SmolLM2 as a Hugging Face folder."""
    from trident_export import models_file, sources

    spec = models_file.select(models_file.load(ROOT / "models.toml"), "smollm2")[0]
    return sources.fetch(spec, ROOT, ROOT / ".cache", print)


@pytest.fixture(scope="session")
def minilm_folder(default_repository: Path) -> Path:
    """all-MiniLM-L6-v2 as a Hugging Face folder."""
    from trident_export import models_file, sources

    spec = models_file.select(models_file.load(ROOT / "models.toml"), "minilm")[0]
    return sources.fetch(spec, ROOT, ROOT / ".cache", print)
