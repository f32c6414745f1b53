"""Servers and models that the tests share; everything is real, nothing is mocked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from tests import warm
from trident_client import Client
from trident_serving.launcher import local
from trident_serving.launcher.local import LocalServer

ROOT = Path(__file__).parents[1]

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the other cores are the other workers'


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What a worker of pytest-xdist gets together: the tests of a file, or all that ask the default models' server.

    Those come first: on a clean checkout the models are exported for them. Who needs them without a server would wait
    for the same export, so comes last.
    """
    groups = {item: _group(item) for item in items}
    for item in items:
        if "default_repository" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(900))
        if hasattr(config, "workerinput"):
            item.add_marker(pytest.mark.xdist_group(groups[item]))
    if hasattr(config, "workerinput"):
        folders = {"server": 0, "integration": 1, "contract": 2, "unit": 3, "default": 4}
        items.sort(key=lambda item: folders.get(groups[item].split()[0], 3))


def _group(item: pytest.Item) -> str:
    fixtures = getattr(item, "fixturenames", ())
    if "server" in fixtures:
        return "server"
    folder = "default" if "default_repository" in fixtures else item.path.parent.name
    return f"{folder} {item.path.stem}"


def run_export(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python -m trident_export` in a process of its own that has been imported before."""
    return warm.run(*arguments, cwd=cwd)


def run_export_cold(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The command as a person starts it, with five seconds of imports: once for each command, and where they count."""
    command = [sys.executable, "-m", "trident_export", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=dict(os.environ))


def post(url: str, body: Mapping[str, object]) -> tuple[int, str]:
    """Status and text of an HTTP request, whether it succeeds or not."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from torch's threads, and beside other work those wait for each other for long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def default_repository() -> Path:
    """The default models, exported where `make serve` has them too."""
    done = run_export_cold("export")
    assert done.returncode == 0, done.stderr
    return ROOT / "model_repository"


@pytest.fixture(scope="session")
def server(default_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """The default models behind the real server."""
    with local.running(default_repository, tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.fixture
def client(server: LocalServer) -> Iterator[Client]:
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
