"""Servers and models that the tests share; everything is real, nothing is mocked."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tritonclient.grpc import service_pb2 as pb

from tests import gateways, warm
from tests.gateways import Gateway
from trident_client import Client, _wire
from trident_serving import memory
from trident_serving.launcher import local
from trident_serving.launcher.local import LocalServer

ROOT = Path(__file__).parents[1]
NO_HEADERS: Mapping[str, str] = {}

# A proxy of the environment is not for the servers of the tests, whichever client a test asks them with.
os.environ["no_proxy"] = ",".join(filter(None, [os.environ.get("no_proxy"), "localhost,127.0.0.1"]))

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the other cores are the other workers'


SLOW = pytest.StashKey[bool]()

# Files whose tests ask the default models' server: one worker has them all, so that it is started once.
SERVED = (
    "tests/clients/test_clients.py",
    "tests/integration/test_bad_requests.py",
    "tests/integration/test_embeddings.py",
    "tests/integration/test_engine_limits.py",
    "tests/integration/test_examples.py",
    "tests/integration/test_generation.py",
    "tests/integration/test_launcher.py",
    "tests/integration/test_soak.py",
    "tests/integration/test_templates.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Which tests a worker of pytest-xdist gets together: those of a file, or of all that share a server."""
    from xdist.scheduler import LoadFileScheduling

    class BySharedFixtures(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            if file.startswith(("tests/integration/test_gateway", "tests/integration/test_command_line")):
                return "gateway"  # they share a server, too
            if file.startswith("tests/integration/image_prompts/"):
                return "images"  # and so do they
            return "server" if file in SERVED else file

    config.option.loadscopereorder = False
    return BySharedFixtures(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Say how a worker ended that should not have: nobody sees the status of a killed one otherwise."""
    if error is not None:
        room = f"{memory.available_bytes() >> 20} MiB of memory and {shutil.disk_usage('/tmp').free >> 20} MiB of /tmp"
        print(f"\nworker {node.gateway.id} ended with status {node.gateway._io.wait()}; {room} are free", flush=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a clean checkout the default models are exported for the tests of their server, which come first.

    Files that need them without the server would wait for the same export, so come last.
    """
    exported = [item for item in items if "default_repository" in getattr(item, "fixturenames", ())]
    for item in exported:
        item.add_marker(pytest.mark.timeout(900))
    if hasattr(config, "workerinput"):
        late = {item.path for item in exported}
        served = {ROOT / file for file in SERVED}
        items.sort(
            key=lambda item: (2 * (item.path in late) - 3 * (item.path in served), item.path.stem != "test_gates")
        )


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported by now stays: collecting garbage, as an export does several times, need not look at it.

    Nor need it look while the tests are imported, which would take a third of that time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[SLOW] = any(item.get_closest_marker("slow") for item in session.items)


def runs_slow_tests(config: pytest.Config) -> bool:
    """Whether tests marked `slow` were asked for, so that what they share must be there."""
    return config.stash[SLOW]


def some_slow(names: Iterable[str], slow: Collection[str]) -> list[Any]:
    """Names as the parameters of a test; some are slow ones."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


def run_export(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python -m trident_export` in a process of its own that has been imported before."""
    return warm.run(*arguments, cwd=cwd)


def run_export_cold(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The command as a person starts it, with five seconds of imports: once for each command, and where they count."""
    command = [sys.executable, "-m", "trident_export", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=dict(os.environ))


def post(
    url: str, body: Mapping[str, object], headers: Mapping[str, str] = NO_HEADERS, seconds: float = 60
) -> tuple[int, str]:
    """Status and text of an HTTP request, whether it succeeds or not."""
    try:
        request = urllib.request.Request(url, json.dumps(body).encode(), dict(headers))
        with urllib.request.urlopen(request, timeout=seconds) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def triton_request(model: str, tensors: Mapping[str, Any]) -> Any:
    """The client's request as a message of tritonclient, whose calls take no other."""
    return pb.ModelInferRequest.FromString(_wire.build_request(model, tensors).SerializeToString())


@contextlib.contextmanager
def on_one_thread() -> Iterator[None]:
    """Tiny models gain nothing from torch's threads, which wait for each other when the machine has other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """See `on_one_thread`."""
    with on_one_thread():
        yield


@pytest.fixture(scope="session")
def default_repository(request: pytest.FixtureRequest) -> Path:
    """The default models, exported where `make serve` has them too; with slow tests SmolLM2's variants on request."""
    slow: list[list[str]] = [["smollm2", "--variants", "all"]] if runs_slow_tests(request.config) else []
    for arguments in (*slow, []):
        done = run_export_cold("export", *arguments)
        assert done.returncode == 0, done.stderr
    return ROOT / "model_repository"


@pytest.fixture(scope="session")
def servers(default_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], LocalServer]]:
    """Gives the default models' server, which is started again where a test has ended it: its failure is its own."""
    started: list[LocalServer] = []

    def living() -> LocalServer:
        if not started or started[-1].launcher.poll() is not None:
            started.append(local.start(default_repository, tmp_path_factory.mktemp("server") / "log"))
        return started[-1]

    yield living
    if started:
        started[-1].stop()


@pytest.fixture
def server(servers: Callable[[], LocalServer]) -> LocalServer:
    """The default models behind the real server."""
    return servers()


@pytest.fixture
def client(server: LocalServer) -> Iterator[Client]:
    with Client(server.grpc_url, timeout=120) as connected:
        yield connected


@pytest.fixture(scope="session")
def smollm2_folder(default_repository: Path) -> Path:
    """SmolLM2 as a Hugging Face folder."""
    from trident_export import models_file
    from trident_export.huggingface import sources

    spec = models_file.select(models_file.load(ROOT / "models.toml"), "smollm2")[0]
    return sources.fetch(spec, ROOT, ROOT / ".cache", print).path


@pytest.fixture(scope="session")
def minilm_folder(default_repository: Path) -> Path:
    """all-MiniLM-L6-v2 as a Hugging Face folder."""
    from trident_export import models_file
    from trident_export.huggingface import sources

    spec = models_file.select(models_file.load(ROOT / "models.toml"), "minilm")[0]
    return sources.fetch(spec, ROOT, ROOT / ".cache", print).path


@pytest.fixture(scope="session")
def gateway_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hugging Face folders of the gateway's models, by name."""
    root = tmp_path_factory.mktemp("gateway-models")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings(action="ignore"):  # peft's, as in test_lora
        gateways.make_models(root)
    torch.set_num_threads(threads)
    return root


@pytest.fixture(scope="session")
def gateway_server(gateway_folder: Path) -> Iterator[LocalServer]:
    """The gateway's models behind a real server."""
    with warnings.catch_warnings(action="ignore"):
        repository = gateways.export_models(gateway_folder)
    with local.running(repository, gateway_folder / "log") as running:
        yield running


@pytest.fixture(scope="session")
def gateway(gateway_server: LocalServer, gateway_folder: Path) -> Iterator[Gateway]:
    """A gateway as it starts without any option."""
    with gateways.running(gateway_folder / "gateway.log", gateway_server.grpc_url) as running:
        yield running


@pytest.fixture
def direct(gateway_server: LocalServer) -> Iterator[Client]:
    """Our own client, past the gateway."""
    with Client(gateway_server.grpc_url, timeout=60) as connected:
        yield connected
