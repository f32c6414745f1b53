"""`python -m trident_serving`: what it starts, what it stops, and what it refuses to start."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests import tiny_models
from tests.conftest import run_export
from trident_client import Client
from trident_serving import artefacts
from trident_serving.launcher import local, temporary_folder
from trident_serving.launcher.control import Control
from trident_serving.launcher.local import LocalServer


def children(pid: int) -> dict[int, str]:
    """Every process below `pid`, with its command line."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
            parents[int(status.parent.name)] = int(fields[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found: dict[int, str] = {}
    wanted = {pid}
    while wanted:
        wanted = {child for child, parent in parents.items() if parent in wanted} - set(found)
        for child in wanted:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                found[child] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def alive(pids: list[int]) -> list[int]:
    """Those of the processes that still run."""

    def runs(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    return [pid for pid in pids if runs(pid)]


@pytest.fixture(scope="module")
def tiny_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("launcher")
    entry = tiny_models.causal_entry(tiny_models.make_causal(root / "llama", "llama"))
    (root / "models.toml").write_text(tiny_models.models_toml({"tiny": entry}))
    repository = root / "repository"
    done = run_export("export", "--models-file", str(root / "models.toml"), "--repository", str(repository))
    assert done.returncode == 0, done.stderr
    return repository


def test_the_serving_path_has_neither_torch_nor_transformers(server: LocalServer, client: Client) -> None:
    client.generate("Hello", max_tokens=1)
    client.embed("Hello")
    processes = children(server.launcher.pid)
    stubs = [pid for pid, command in processes.items() if "triton_python_backend_stub" in command]
    assert len(stubs) >= 6
    for pid in [server.launcher.pid, *processes]:
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "/torch/" not in maps, processes.get(pid)
        assert "libtorch" not in maps
    assert any("onnxruntime" in Path(f"/proc/{pid}/maps").read_text() for pid in stubs)
    code = (
        "import sys, trident_serving.generation.service, trident_serving.triton.onnx_backend, trident_serving.encoders,"
        " trident_serving.seq2seq.service,"
        " trident_serving.templates, trident_serving.launcher.cli;"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'trident_export'}))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_welcome_names_models_ports_and_commands(server: LocalServer) -> None:
    for _ in range(50):  # the launcher sees that the server is ready no sooner than this test does
        log = server.log.read_text()
        if "Trident is ready." in log:
            break
        time.sleep(0.1)
    assert "Trident is ready." in log
    for line in (
        "minilm (fp32), minilm_int8",
        "smollm2 (int8), smollm2_fp32",
        "translate (template)",
        f"gRPC     127.0.0.1:{server.grpc_port}",
        "trident generate",
        "trident embed",
        "curl -s",
    ):
        assert line in log


@pytest.mark.parametrize(("number", "notice"), [(signal.SIGINT, 0), (signal.SIGTERM, 2)])
def test_a_signal_drains_and_stops_everything(tiny_repository: Path, tmp_path: Path, number: int, notice: int) -> None:
    server = local.start(tiny_repository, tmp_path / "log", flags=("--notice", str(notice)) if notice else ())
    pids = list(children(server.launcher.pid))
    assert len(pids) >= 2
    results: list[str] = []
    with Client(server.grpc_url, timeout=60) as client:
        request = {"model": "tiny", "max_tokens": 100}
        expected = client.generate("A", **request).text
        stream = client.stream("A", **request)
        first = next(stream).text
        server.launcher.send_signal(number)
        if notice:  # those who balance requests see that it is not ready, and what they still send is answered
            while client.health().ready:
                time.sleep(0.02)
            assert client.generate("A", **request).text == expected
        reader = threading.Thread(target=lambda: results.append(first + "".join(c.text for c in stream)))
        reader.start()
        assert server.launcher.wait(60) == 0
        reader.join()
    assert results == [expected]  # the request in flight was answered to its end
    assert alive(pids) == []
    assert list(Path("/dev/shm").glob(f"trident-{server.launcher.pid}-*")) == []
    assert "shutting down" in server.log.read_text()
    server.stop()


def test_a_killed_launcher_leaves_nothing(tiny_repository: Path, tmp_path: Path) -> None:
    server = local.start(tiny_repository, tmp_path / "log")
    processes = children(server.launcher.pid)
    with Client(server.grpc_url, timeout=60) as client:  # its metrics change, and are told to a server that is gone
        client.generate("A", model="tiny", max_tokens=8)
        control = Control(server.http_url, *server.admin_headers.values(), own_folder(server) / "models")
        control.load_placeholder("tiny")  # from files of the request, which tritonserver writes to /tmp
    folder = own_folder(server)
    made = [code.parents[1] for code in Path("/tmp").glob("folder*/1/model.py") if str(folder) in code.read_text()]
    assert len(made) == 1
    assert (folder / "backends").is_dir()
    os.kill(server.launcher.pid, signal.SIGKILL)
    server.launcher.wait()
    server.stop()
    deadline = time.monotonic() + 30  # two seconds, where no other tests keep the cores busy
    while time.monotonic() < deadline and alive(list(processes)):
        time.sleep(0.2)
    assert [processes[pid] for pid in alive(list(processes))] == []
    temporary_folder.remove_abandoned()  # as the next launcher does
    assert [path for path in (folder, *made) if path.exists()] == []


def own_folder(server: LocalServer) -> Path:
    """The folder of a launcher in /tmp, of which it holds the lock."""
    files = [Path(os.readlink(link)) for link in Path(f"/proc/{server.launcher.pid}/fd").iterdir()]
    (lock,) = [file for file in files if file.name == temporary_folder.LOCK]
    return lock.parent


def test_two_servers_on_one_machine(tiny_repository: Path, tmp_path: Path) -> None:
    servers = [local.start(tiny_repository, tmp_path / name) for name in ("one", "two")]
    try:
        answers = []
        for server in servers:
            with Client(server.grpc_url, timeout=60) as client:
                answers.append(client.generate("A", model="tiny", max_tokens=8).text)
        assert answers[0] == answers[1]
    finally:
        for server in servers:
            server.stop()


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trident_serving", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_a_taken_port(tiny_repository: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = launch("--repository", str(tiny_repository), "--http-port", str(port))
    assert done.returncode == 1
    assert (
        f"port {port} on 127.0.0.1 can't be used (Address already in use): stop what listens there, or choose another "
        "with --http-port (HTTP_PORT=... of make)\n"
    ) in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_same_port_twice(tiny_repository: Path) -> None:
    port = str(local.free_ports(1)[0])
    done = launch("--repository", str(tiny_repository), "--http-port", port, "--grpc-port", port)
    assert done.returncode == 1
    assert f"--http-port and --grpc-port can't both be {port}" in done.stderr


def test_a_check_starts_nothing(tmp_path: Path) -> None:
    ports = local.free_ports(3)
    options = ["--http-port", str(ports[0]), "--grpc-port", str(ports[1]), "--metrics-port", str(ports[2])]
    done = launch("--check", "--repository", str(tmp_path / "none"), *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "trident: a server can start on this machine: Python, the packages and the ports are right\n"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports[1]))
        taken.listen()
        done = launch("--check", *options)
    assert done.returncode == 1
    assert f"port {ports[1]} on 127.0.0.1 can't be used" in done.stderr


def test_an_empty_or_missing_repository(tmp_path: Path) -> None:
    ports = [str(port) for port in local.free_ports(3)]
    options = ["--http-port", ports[0], "--grpc-port", ports[1], "--metrics-port", ports[2]]
    done = launch("--repository", str(tmp_path), *options)
    assert done.returncode == 1
    assert "holds no exported model: run make export" in done.stderr
    done = launch("--repository", str(tmp_path / "none"), *options)
    assert done.returncode == 1
    assert f"{tmp_path / 'none'} does not exist: name a model repository with --repository" in done.stderr


def test_a_model_that_does_not_load_ends_the_start(tiny_repository: Path, tmp_path: Path) -> None:
    broken = tmp_path / "repository"
    shutil.copytree(tiny_repository, broken)
    (broken / "tiny/1/model.onnx").write_bytes(b"no graph")
    ports = [str(port) for port in local.free_ports(3)]
    done = launch(
        *("--repository", str(broken), "--http-port", ports[0], "--grpc-port", ports[1], "--metrics-port", ports[2])
    )
    assert done.returncode == 1
    assert "trident: no model could be loaded: tiny can't be loaded (" in done.stderr


def test_the_other_models_are_served_if_one_does_not_load(tiny_repository: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(tiny_repository, repository)
    shutil.copytree(tiny_repository / "tiny", repository / "broken")
    config = (repository / "broken/config.pbtxt").read_text()
    (repository / "broken/config.pbtxt").write_text(config.replace('name: "tiny"', 'name: "broken"'))
    manifest = artefacts.read_manifest(repository, "tiny")
    assert manifest is not None
    named = dataclasses.replace(manifest, name="broken", triton_models=["broken"], public_models={"fp32": "broken"})
    named.write(repository / "broken/1")
    (repository / "broken/1/model.onnx").write_bytes(b"no graph")
    with local.running(repository, tmp_path / "log") as server, Client(server.grpc_url, timeout=60) as client:
        assert client.generate("A", model="tiny", max_tokens=2).num_output_tokens == 2
        deadline = time.monotonic() + 5
        while "Trident is ready." not in server.log.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        line = next(line for line in server.log.read_text().splitlines() if "NOT SERVED" in line)
        assert "broken can't be loaded (" in line
        assert "model.onnx" in line


@pytest.mark.slow
def test_spans_go_on_in_the_caller_s_trace(
    tiny_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    trace = "0af7651916cd43dd8448eb211c80319c"
    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}/")
        with (
            local.running(tiny_repository, tmp_path / "log") as server,
            Client(server.grpc_url, timeout=60, headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"}) as client,
        ):
            assert client.generate("A", model="tiny", max_tokens=4).num_output_tokens == 4
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline and not received:
                time.sleep(0.1)
            collector.shutdown()
            collector.server_close()  # a collector that is gone harms no request
            assert client.generate("A", model="tiny", max_tokens=4).num_output_tokens == 4
    path, body = received[0]
    assert path == "/v1/traces"
    spans = [
        span for part in json.loads(body)["resourceSpans"] for scope in part["scopeSpans"] for span in scope["spans"]
    ]
    assert {span["traceId"] for span in spans} == {trace}
    assert "tiny" in {span["name"] for span in spans}
