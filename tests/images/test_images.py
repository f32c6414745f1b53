"""The images are built and run as production runs them: without privileges, read-only, with 64 MiB of /dev/shm.

`make image` runs these; they take minutes. Where a base image can't be had, `engine` makes a stand-in.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.images.engine import DEBIAN, Container, NoEngine, Podman, engine
from trident_client import Client
from trident_serving import artefacts

pytestmark = [pytest.mark.image, pytest.mark.timeout(3600)]

DOCKERFILES = {"native": "deploy/Dockerfile", "cpu": "deploy/Dockerfile.cpu"}
CAPITAL = "What is the capital of France?"
PARIS = "The capital of France is Paris."
# Of all-MiniLM-L6-v2 in float32, as docs/quickstart.md shows it.
TEXT, VECTOR = "A text to compare with others", [0.0150, 0.0809, -0.0329, -0.0246, -0.0007, 0.0260]
LONG_ANSWER = 480  # tokens: several seconds


@pytest.fixture(scope="session")
def podman() -> Podman:
    try:
        return engine()
    except NoEngine as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module", params=DOCKERFILES)
def image(request: pytest.FixtureRequest, podman: Podman) -> str:
    tag = f"localhost/trident:{request.param}"
    podman.build(DOCKERFILES[request.param], tag)
    return tag


@pytest.fixture(scope="module")
def container(image: str, podman: Podman, default_repository: Path) -> Iterator[Container]:
    """The default models, with no more than the image and its restrictions."""
    started = Container.run(podman, image, f"trident-test-{image.split(':')[1]}", default_repository)
    try:
        took = started.wait_healthy()
        print(f"\n{image}: ready after {took:.0f} s")
        yield started
    finally:
        started.remove()


@pytest.fixture
def running(container: Container) -> Container:
    """The container, started again if the test before ended it."""
    if container.state()[0] != "running":
        container.podman("start", container.name)
    now = container.with_ports()
    now.wait_healthy()
    return now


def client(container: Container) -> Client:
    return Client(f"127.0.0.1:{container.ports[8001]}", timeout=120)


def check_answers(container: Container) -> None:
    with client(container) as connected:
        assert connected.chat(CAPITAL, max_tokens=16).text == PARIS
        np.testing.assert_allclose(connected.embed([TEXT])[0][: len(VECTOR)], VECTOR, atol=1e-4)


def test_what_is_in_the_image(image: str, podman: Podman) -> None:
    found = json.loads(podman("inspect", "--type=image", image))[0]
    assert found["Config"]["User"] == "1000:1000"
    assert found["Healthcheck"]["Test"][-1] == "trident_serving.launcher.health"
    environment = dict(entry.split("=", 1) for entry in found["Config"]["Env"])
    assert environment["TRIDENT_CONTAINER"] == "1"
    assert environment["ORT_DISABLE_TELEMETRY"] == "1"
    base = json.loads(podman("inspect", "--type=image", DEBIAN))[0]["Size"] if image.endswith(":cpu") else 0
    print(f"\n{image}: {found['Size'] / 1e6:.0f} MB, its base {base / 1e6:.0f} MB")
    if base:  # what is ours and Python's
        assert found["Size"] - base < 600e6
    code = "import importlib.util as u; print([n for n in ('torch', 'transformers', 'onnx', 'pip') if u.find_spec(n)])"
    assert (
        podman("run", "--rm", "--ulimit=host", "--entrypoint=/opt/trident/venv/bin/python", image, "-c", code) == "[]"
    )


def test_the_server_answers_behind_every_restriction(running: Container) -> None:
    check_answers(running)
    with client(running) as connected:
        assert connected.translate(["Le chat est sur la table."], target_lang="English", max_tokens=12)[0].text
    seen: dict[str, Any] = json.loads(running.python(INSIDE))
    assert seen["uid"] == seen["gid"] == 1000
    assert seen["capabilities"] == 0
    assert seen["no_new_privileges"] == 1
    assert seen["writable"] == ["/tmp"]
    assert 60 <= seen["shared_memory_mib"] <= 64
    assert running.healthy()


INSIDE = """
import json, os, pathlib
lines = pathlib.Path("/proc/1/status").read_text().splitlines()
status = dict(line.split(":\\t", 1) for line in lines if ":\\t" in line)
def writable(folder):
    try:
        path = pathlib.Path(folder, "trident-test")
        path.write_text("x")
        path.unlink()
        return True
    except OSError:
        return False
memory = os.statvfs("/dev/shm")
print(json.dumps({
    "uid": int(status["Uid"].split()[1]),
    "gid": int(status["Gid"].split()[1]),
    "capabilities": sum(int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")),
    "no_new_privileges": int(status["NoNewPrivs"]),
    "writable": [folder for folder in ("/", "/tmp", "/models", "/opt/trident", "/var/tmp", "/run") if writable(folder)],
    "shared_memory_mib": memory.f_blocks * memory.f_frsize // 2**20,
}))
"""


def test_the_health_check_tells_the_truth(running: Container) -> None:
    assert running.healthy()
    check = ("exec", running.name, "/opt/trident/venv/bin/python", "-m", "trident_serving.launcher.health")
    assert running.podman.try_(*check).returncode == 0
    proxy = ("exec", "--env=http_proxy=http://127.0.0.1:9", *check[1:])
    assert running.podman.try_(*proxy).returncode == 0
    elsewhere = running.podman.try_(*check, "8009")
    assert elsewhere.returncode == 1
    assert "not ready on port 8009" in elsewhere.stderr


def test_large_requests_fit_into_small_shared_memory(running: Container) -> None:
    """Four megabytes of texts in a request, from two callers at once, and many small requests at the same time."""
    text = "word " * 52_000

    def embed(_: int) -> Any:
        with client(running) as connected:
            return connected.embed([text] * 16, truncate=True)

    def answer(_: int) -> str:
        with client(running) as connected:
            return connected.chat(CAPITAL, max_tokens=16).text

    with ThreadPoolExecutor(18) as pool:
        vectors, answers = list(pool.map(embed, range(2))), list(pool.map(answer, range(16)))
    assert answers == [PARIS] * 16
    for vector in vectors:
        assert vector.shape == (16, 384)
        np.testing.assert_allclose(np.linalg.norm(vector, axis=1), 1, atol=1e-4)
        np.testing.assert_array_equal(vector, vectors[0][[0] * 16])
    assert running.healthy()


def test_a_stop_lets_answers_end(running: Container) -> None:
    """One streamed over gRPC, one over HTTP, one that is not streamed; each lasts several seconds."""
    body = {"text_input": "Once upon a time", "max_tokens": LONG_ANSWER, "min_tokens": LONG_ANSWER}
    started = threading.Semaphore(0)
    stopped_at: list[float] = []

    def grpc() -> tuple[int, float]:
        with client(running) as connected:
            count, last = 0, None
            for chunk in connected.stream(body["text_input"], max_tokens=LONG_ANSWER, min_tokens=LONG_ANSWER):
                count, last = count + 1, chunk
                if count == 3:
                    started.release()
            assert last is not None
            return last.num_output_tokens, time.monotonic()

    def http(kind: str) -> tuple[int, float]:
        url = f"http://127.0.0.1:{running.ports[8000]}/v2/models/smollm2/{kind}"
        more = {"stream": True} if kind == "generate_stream" else {}
        request = urllib.request.Request(url, json.dumps(body | more).encode())
        with urllib.request.urlopen(request, timeout=120) as response:
            if kind == "generate":
                started.release()
                return json.loads(response.read())["num_output_tokens"], time.monotonic()
            events = []
            for line in response:
                if line.startswith(b"data: "):
                    events.append(json.loads(line[len(b"data: ") :]))
                    if len(events) == 3:
                        started.release()
            return events[-1]["num_output_tokens"], time.monotonic()

    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(grpc), pool.submit(http, "generate_stream"), pool.submit(http, "generate")]
        for _ in range(2):  # the one that is not streamed shows nothing before its end
            assert started.acquire(timeout=60)
        stopped_at.append(time.monotonic())
        running.podman("stop", "--time=60", running.name)
        ended = time.monotonic()
        results = [answer.result() for answer in answers]
    assert [tokens for tokens, _ in results] == [LONG_ANSWER] * 3
    last = max(at for _, at in results)
    print(f"\nanswers ended {last - stopped_at[0]:.1f} s after the stop, the container {ended - last:.1f} s later")
    assert last > stopped_at[0] + 1  # they did run while it stopped
    assert running.state() == ("exited", 0)


def test_a_killed_container_starts_again(running: Container) -> None:
    running.podman("kill", running.name)
    assert running.wait_ended(10) == 137
    running.podman("start", running.name)
    again = running.with_ports()
    again.wait_healthy()
    check_answers(again)


def test_a_dead_tritonserver_ends_the_container(running: Container) -> None:
    """With an error status, so that the container engine starts it again."""
    running.python(KILL)
    code = running.wait_ended(30)
    assert code not in (0, 137)  # 137: killed from outside
    assert "tritonserver" in running.logs().splitlines()[-1]


KILL = """
import os, pathlib, signal
programs = {path.parent.name: path.read_text().strip() for path in pathlib.Path("/proc").glob("[0-9]*/comm")}
found = [number for number, name in programs.items() if name == "tritonserver"]
assert len(found) == 1, found
os.kill(int(found[0]), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def small(podman: Podman) -> str:
    """The small image, for what both have in common."""
    podman.build(DOCKERFILES["cpu"], "localhost/trident:cpu")
    return "localhost/trident:cpu"


def test_too_little_shared_memory_is_one_sentence(small: str, podman: Podman, default_repository: Path) -> None:
    started = Container.run(podman, small, "trident-test-shm", default_repository, "--shm-size=16m")
    try:
        assert started.wait_ended(30) == 1
        lines = started.logs().strip().splitlines()
        assert len(lines) == 1
        models = len(list(default_repository.glob("*/config.pbtxt")))
        assert lines[0].startswith(
            f"trident: /dev/shm has 16 MiB free, and {models} models need {models + 32} MiB (1 each, 32 for requests)"
        )
        assert "--shm-size=1g" in lines[0]
    finally:
        started.remove()


def test_a_memory_limit_decides_what_fits(small: str, podman: Podman, default_repository: Path, tmp_path: Path) -> None:
    """SmolLM2's KV cache of 1536 MiB is refused where the container may use 1 GiB, and taken where it may use 3."""
    shutil.copytree(default_repository / "smollm2", tmp_path / "smollm2")
    manifest = artefacts.read_manifest(tmp_path, "smollm2")
    assert manifest is not None
    only = replace(manifest, triton_models=["smollm2"], public_models={"int8": "smollm2"})
    only.write(tmp_path / "smollm2" / artefacts.VERSION)
    tmp_path.chmod(0o755)
    for limit in (1024, 3072):
        started = Container.run(podman, small, "trident-test-memory", tmp_path, f"--memory={limit}m")
        try:
            if limit == 1024:
                deadline = time.monotonic() + 60
                while "that are available" not in started.logs() and time.monotonic() < deadline:
                    time.sleep(0.5)
                sentence = next(line for line in started.logs().splitlines() if "that are available" in line)
                available = int(sentence.split("must fit into the ")[1].split(" MiB")[0])
                assert 0 < available < limit
                assert "1536 MiB of KV cache" in sentence
                assert not started.healthy()
            else:
                started.wait_healthy()
                with client(started) as connected:
                    assert connected.chat(CAPITAL, max_tokens=16).text == PARIS
        finally:
            started.remove()
