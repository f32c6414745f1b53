"""What is installed from a wheel: the server in an empty environment, and only the client in many.

The wheel is built from the files of the checkout; the environments get only it and the package index. One server
answers all tests: the installed one, started with proxies in its environment that do not exist.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from email.parser import BytesParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from transformers import AutoModel, AutoTokenizer

from tests import environments, tiny_models
from tests.conftest import ROOT, post
from tests.integration.test_architectures import hugging_face
from tests.integration.test_launcher import children
from trident_export import install, models_file
from trident_serving.launcher import local

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "The quick brown fox jumps over the"
TEXTS = ["a b c", "some longer text, 中文 too"]
TOKENS = 24
DEAD_PROXY = "http://127.0.0.1:9"
PROXIES = {
    name: DEAD_PROXY
    for lower in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
    for name in (lower, lower.upper())
}

# What lives in one environment with the client, one after the other: the lower ends of its ranges or, where numpy 1
# was never built, what a user of protobuf 5 has (tritonclient has no version for that), then today's packages.
CLIENTS = {
    "3.10": ("oldest", "newest"),
    "3.11": ("oldest", "newest"),
    "3.12": ("oldest", "newest"),
    "3.13": ("protobuf 5", "newest"),
    "3.14": ("protobuf 5", "newest"),
}
PROTOBUF_5 = ["grpcio==1.76.0", "protobuf==5.29.5", "numpy==2.3.3"]

ASK = """
import asyncio, json, sys
from importlib.metadata import version
from trident_client import AsyncClient, Client

async def awaited():
    async with AsyncClient(url, timeout=60) as client:
        chunks = [chunk.text async for chunk in client.stream(prompt, model="tiny", max_tokens=tokens)]
        return "".join(chunks), (await client.embed(texts, model="reader")).tolist()

url, prompt, tokens, texts = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
with Client(url, timeout=60) as client:
    print(json.dumps({
        "generated": client.generate(prompt, model="tiny", max_tokens=tokens).text,
        "streamed": "".join(chunk.text for chunk in client.stream(prompt, model="tiny", max_tokens=tokens)),
        "embedded": client.embed(texts, model="reader").tolist(),
        "awaited": asyncio.run(awaited()),
        "versions": {name: version(name) for name in ("numpy", "grpcio", "protobuf")},
    }))
"""


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
    return done


def stranger(**more: str) -> dict[str, str]:
    """The environment of a user who has none of this repository's settings."""
    dropped = {"ORT_DISABLE_TELEMETRY", "PYTHONPATH", "no_proxy", "NO_PROXY", "no_grpc_proxy", "VIRTUAL_ENV"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped and name not in PROXIES}
    return kept | more


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packaging")


@pytest.fixture(scope="module")
def wheel(folder: Path) -> Path:
    files = run("git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "-z").stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "checkout" / name)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder / "wheel", folder / "checkout")
    return next((folder / "wheel").glob("*.whl"))


@pytest.fixture(scope="module")
def repository(folder: Path) -> Path:
    causal = tiny_models.make_causal(folder / "tiny", "llama")
    reader = tiny_models.make_reader(folder / "reader", "bert", AutoModel)
    limits = "{ max_tokens = 96, buckets = [32], threads = 1, dimensions = 32 }"
    entries = {
        "tiny": tiny_models.causal_entry(causal),
        "reader": f'task = "feature-extraction"\nsource = {{ path = "{reader}" }}\n'
        f'variants = ["fp32"]\nlimits = {limits}\n',
    }
    (folder / "models.toml").write_text(tiny_models.models_toml(entries))
    specs = models_file.load(folder / "models.toml")
    install.export(specs, folder / "repository", folder, folder / "cache", lambda message: None)
    return folder / "repository"


@pytest.fixture(scope="module")
def expected(repository: Path, folder: Path) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder / "reader")
    model = AutoModel.from_pretrained(folder / "reader").eval()
    with torch.inference_mode():
        means = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in TEXTS]
    text = hugging_face(folder / "tiny", PROMPT, TOKENS)
    assert len(text) > TOKENS / 2
    return {"text": text, "vectors": np.stack([(mean / mean.norm()).numpy() for mean in means])}


@pytest.fixture(scope="module")
def programs(wheel: Path, folder: Path) -> Path:
    python = environments.make(sys.executable, folder / "served")
    environments.install(python, f"{wheel}[serve]")
    return python.parent


@pytest.fixture(scope="module")
def launched(programs: Path, repository: Path, folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[int], Path]]:
    """The installed server: its launcher, its ports (HTTP, gRPC, metrics) and its log."""
    ports = local.free_ports(3)
    flags = [f"--{name}-port={port}" for name, port in zip(("http", "grpc", "metrics"), ports, strict=True)]
    home = folder / "home"
    home.mkdir()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [str(programs / "trident-serve"), "--repository", str(repository), *flags],
            cwd=home,
            env=stranger(HOME=str(home), **PROXIES),
            stdout=log,
            stderr=log,
            text=True,
        )
    try:
        yield process, ports, folder / "log"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@pytest.fixture(scope="module")
def server(launched: tuple[subprocess.Popen[str], list[int], Path]) -> list[int]:
    """The ports of the server, once the launcher has seen it ready through no proxy."""
    process, ports, log = launched
    deadline = time.monotonic() + 90
    while "Trident is ready." not in log.read_text() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    assert "Trident is ready." in log.read_text(), log.read_text()
    return ports


def test_the_installed_server_answers(server: list[int], expected: Mapping[str, Any]) -> None:
    status, body = post(
        f"http://127.0.0.1:{server[0]}/v2/models/tiny/generate", {"text_input": PROMPT, "max_tokens": TOKENS}
    )
    assert (status, json.loads(body)["text_output"]) == (200, expected["text"])


def test_loopback_is_called_without_proxies(programs: Path, server: list[int], expected: Mapping[str, Any]) -> None:
    for host in ("127.0.0.1", "localhost"):
        options = ["--url", f"{host}:{server[1]}", "--timeout", "20"]
        done = run(programs / "trident", "health", *options, env=stranger(**PROXIES))
        assert done.stdout == "ready\n"
        words = ["--json", "--model", "tiny", "--max-tokens", str(TOKENS), PROMPT]
        done = run(programs / "trident", "generate", *options, *words, env=stranger(**PROXIES))
        assert json.loads(done.stdout)["text"] == expected["text"]


def test_telemetry_is_off_in_every_process(
    launched: tuple[subprocess.Popen[str], list[int], Path], server: list[int], folder: Path
) -> None:
    processes = children(launched[0].pid)
    backends = [pid for pid, command in processes.items() if "triton_python_backend_stub" in command]
    assert len(backends) >= 3
    for pid in processes:
        assert b"ORT_DISABLE_TELEMETRY=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"), processes[pid]
    assert list((folder / "home").rglob("*")) == []  # a device id or a cache would be there


def test_a_check_of_the_installed_server(programs: Path, tmp_path: Path) -> None:
    ports = [
        f"--{name}-port={port}" for name, port in zip(("http", "grpc", "metrics"), local.free_ports(3), strict=True)
    ]
    done = run(programs / "trident-serve", "--check", *ports, cwd=tmp_path, env=stranger())
    assert (done.stdout.startswith("trident: a server can start on this machine"), done.stderr) == (True, "")


@functools.cache
def interpreter(version: str) -> str | None:
    """A working interpreter of this version, wherever one is usually found; None if there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    names = [sys.executable, shutil.which(f"python{version}"), f"/usr/bin/python{version}"]
    names += [f"/usr/local/bin/python{version}", *map(str, sorted(pyenv.glob(f"{version}.*/bin/python{version}")))]
    for name in filter(None, names):
        ask = [name, "-c", "import sys, ensurepip, venv; print('%d.%d' % sys.version_info[:2])"]
        if Path(name).exists() and subprocess.run(ask, capture_output=True, text=True).stdout.strip() == version:
            return name
    return None


def oldest(wheel: Path) -> list[str]:
    """The lower ends of the ranges that the wheel declares for the client."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        declared = [Requirement(line) for line in BytesParser().parsebytes(archive.read(name)).get_all("Requires-Dist")]
    ends = [
        f"{requirement.name}=={bound.version}.*"
        for requirement in declared
        for bound in requirement.specifier
        if not requirement.marker and bound.operator == ">="
    ]
    assert [end.partition("=")[0] for end in ends] == ["grpcio", "numpy", "protobuf"]
    return ends


def test_the_gateway_s_page_is_in_the_wheel(wheel: Path) -> None:
    page = ROOT / "gateway" / "trident_gateway" / "page"
    with zipfile.ZipFile(wheel) as archive:
        found = {name.rpartition("/")[2]: archive.read(name) for name in archive.namelist() if "/page/" in name}
    assert found == {file.name: file.read_bytes() for file in page.iterdir()}


@pytest.mark.parametrize("version", CLIENTS)
def test_only_the_client(
    wheel: Path, server: list[int], expected: Mapping[str, Any], tmp_path: Path, version: str
) -> None:
    found = interpreter(version)
    if found is None:
        pytest.skip(f"this machine has no Python {version} with venv and pip")
    python = environments.make(found, tmp_path / "client")
    for kind in CLIENTS[version]:
        pins = {"oldest": oldest(wheel), "protobuf 5": PROTOBUF_5, "newest": ["grpcio", "numpy", "protobuf"]}[kind]
        environments.install(python, str(wheel), *pins)
        words = [f"127.0.0.1:{server[1]}", PROMPT, str(TOKENS), json.dumps(TEXTS)]
        # Old packages use what newer Pythons call deprecated; any other warning is ours.
        flags = ["-W", "error", "-W", "ignore::DeprecationWarning"]
        answer = json.loads(run(python, *flags, "-c", ASK, *words, cwd=tmp_path, env=stranger()).stdout)
        assert answer["generated"] == answer["streamed"] == expected["text"]
        np.testing.assert_allclose(answer["embedded"], expected["vectors"], atol=1e-5)
        assert answer["awaited"] == [answer["streamed"], answer["embedded"]]
        majors = [answer["versions"][name].partition(".")[0] for name in ("numpy", "protobuf")]
        assert majors == {"oldest": ["1", "4"], "protobuf 5": ["2", "5"], "newest": ["2", "7"]}[kind]
