"""The launcher's modules without a server: the admin key, the models that it shows, and the lines that it hides."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from trident_client import _admin_key
from trident_serving import artefacts
from trident_serving.artefacts import Manifest
from trident_serving.errors import StartError
from trident_serving.launcher import admin_key, cli, preflight, processes, server, server_log
from trident_serving.launcher.admin_key import AdminKey, PortLock
from trident_serving.launcher.failures import IndexEntry, one_line
from trident_serving.launcher.gateway import Gateway
from trident_serving.launcher.installation import Installation
from trident_serving.launcher.repository_view import RepositoryView
from trident_serving.launcher.server import ServerOptions, trace_flags
from trident_serving.launcher.supervisor import ending


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(admin_key.ENVIRONMENT, raising=False)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_key: None) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_only_its_owner_can_read_a_key_and_the_client_finds_it(temporary: Path) -> None:
    file = admin_key.default_file(8001)
    one = AdminKey(None, 8001)
    assert len(one.value) >= 32
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    for url in ("localhost:8001", "127.0.0.1:8001", "127.1.2.3:8001", "[::1]:8001"):
        assert _admin_key.find(url) == one.value
    for url in ("localhost:8002", "example.org:8001", "10.0.0.1:8001", "dns:///localhost:8001"):
        assert _admin_key.find(url) is None
    two = AdminKey(None, 8001)  # a server that was killed left its key
    assert _admin_key.find("localhost:8001") == two.value != one.value
    one.remove()
    assert _admin_key.find("localhost:8001") == two.value  # not its own any more
    two.remove()
    assert _admin_key.find("localhost:8001") is None
    chosen = temporary / "chosen.key"
    assert AdminKey(chosen, 8001).value == chosen.read_text()
    assert chosen.stat().st_mode & 0o777 == 0o600


def test_two_starts_on_one_port_do_not_overwrite_a_key(temporary: Path) -> None:
    lock = PortLock(8001)
    with pytest.raises(StartError, match="another server of this user starts or runs on port 8001"):
        PortLock(8001)
    other = PortLock(8002)
    lock.release()
    PortLock(8001).release()
    other.release()


def test_a_key_from_the_environment(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(admin_key.ENVIRONMENT, "0123456789abcdef")
    assert AdminKey(None, 8001).value == _admin_key.find("far.example.org:1") == "0123456789abcdef"
    assert list(temporary.iterdir()) == []
    for bad in ("short", "0123456789 abcdef", "0123456789:abcdef", "0123456789,abcdef", "0123456789abcdeé"):
        monkeypatch.setenv(admin_key.ENVIRONMENT, bad)
        with pytest.raises(StartError, match="TRIDENT_ADMIN_KEY must be 16 characters or more"):
            AdminKey(None, 8001)
    monkeypatch.setenv(admin_key.ENVIRONMENT, "")  # as docker compose passes a variable on that is not set
    assert AdminKey(None, 8001).value == _admin_key.find("localhost:8001")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_not_trusted(temporary: Path) -> None:
    file = admin_key.default_file(8001)
    file.parent.mkdir(mode=0o700)
    file.write_text("a key of the attacker")
    os.chown(file.parent, 65534, 65534)
    assert _admin_key.find("localhost:8001") is None
    with pytest.raises(StartError, match="is not a folder that only this user can read"):
        AdminKey(None, 8001)


@pytest.mark.parametrize("how", ["readable", "link"])
def test_a_folder_that_others_reach_is_not_trusted(temporary: Path, how: str) -> None:
    file = admin_key.default_file(8001)
    if how == "link":
        (temporary / "elsewhere").mkdir(mode=0o700)
        file.parent.symlink_to(temporary / "elsewhere")
    else:
        file.parent.mkdir(mode=0o755)
    with pytest.raises(StartError, match="is not a folder that only this user can read"):
        AdminKey(None, 8001)


def test_a_secret_is_taken_out_of_a_command_line() -> None:
    code = "import sys; print('up', flush=True); sys.stdin.read(); print(sys.argv[1])"
    command = [sys.executable, "-c", code, "--key=SECRET-OF-IT", "end"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    assert processes.hide_argument(child.pid, "SECRET-OF-IT")
    line = Path(f"/proc/{child.pid}/cmdline").read_bytes()
    assert b"--key=************\0end" in line
    assert child.communicate("")[0] == "--key=SECRET-OF-IT\n"  # the program had read it before
    assert not processes.hide_argument(child.pid, "SECRET-OF-IT")  # it is no more


def test_accepted_connections_of_another_process_are_closed() -> None:
    """Those on the port that is named, and no others: its own, those on another port, the listening socket."""
    code = (
        "import socket; a, b = (socket.create_server(('127.0.0.1', 0)) for _ in range(2));"
        "print(a.getsockname()[1], b.getsockname()[1], flush=True);"
        "kept = [a.accept()[0], b.accept()[0]]; print('accepted', flush=True);"
        "third = a.accept()[0]; third.sendall(b'still listening'); import sys; sys.stdin.read()"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    first, second = map(int, child.stdout.readline().split())
    try:
        with (
            socket.create_connection(("127.0.0.1", first)) as one,
            socket.create_connection(("127.0.0.1", second)) as two,
        ):
            child.stdout.readline()
            assert processes.close_connections(child.pid, {first})
            one.settimeout(5)
            assert one.recv(1) == b""
            two.settimeout(0.2)
            with pytest.raises(TimeoutError):
                two.recv(1)
            with socket.create_connection(("127.0.0.1", first)) as three:
                assert three.recv(100) == b"still listening"
    finally:
        child.communicate("")


def exported(repository: Path, name: str) -> None:
    (repository / name / "1").mkdir(parents=True, exist_ok=True)
    (repository / name / "config.pbtxt").write_text(artefacts.CONFIG_HEADER)
    Manifest(name, "text-generation", [name], {"fp32": name}, "f").write(repository / name / "1")


def test_the_server_sees_what_can_be_loaded(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    exported(repository, "one")
    (repository / "config_only").mkdir()
    (repository / "config_only" / "config.pbtxt").write_text(artefacts.CONFIG_HEADER)
    view = RepositoryView(repository, tmp_path / "view")

    def seen() -> list[str]:
        return sorted(path.name for path in (tmp_path / "view").iterdir() if path.exists())

    assert seen() == ["one"]
    exported(repository, "two")
    (repository / "plain" / "1").mkdir(parents=True)
    assert view.refresh() == ["one", "plain", "two"]
    assert seen() == ["one", "plain", "two"]
    # An export that is being installed: the model is served on.
    (repository / "two" / "1" / artefacts.MANIFEST).unlink()
    assert view.refresh() == ["one", "plain"]
    assert seen() == ["one", "plain", "two"]
    (repository / "plain" / "1").rmdir()
    (repository / "plain").rmdir()
    view.refresh()
    assert seen() == ["one", "two"]


def test_the_server_sees_no_link_into_nothing(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    exported(repository, "one")
    for variant in ("one_int8", "one_int4"):
        (repository / variant / "1").mkdir(parents=True)
    Manifest("one", "text-generation", ["one", "one_int8", "one_int4"], {}, "f").write(repository / "one" / "1")
    (repository / "one_int4" / "1").rmdir()
    (repository / "one_int4").rmdir()
    view = RepositoryView(repository, tmp_path / "view")

    def seen() -> list[str]:
        return sorted(path.name for path in (tmp_path / "view").iterdir())

    assert seen() == ["one", "one_int8"]
    assert (view.refresh(), view.missing) == (["one", "one_int4", "one_int8"], {"one_int4"})
    # Somebody removes a variant of a server that runs, and exports both again.
    (repository / "one_int8" / "1").rmdir()
    (repository / "one_int8").rmdir()
    view.refresh()
    assert (seen(), view.missing) == (["one"], {"one_int4", "one_int8"})
    for variant in ("one_int8", "one_int4"):
        (repository / variant / "1").mkdir(parents=True)
    view.refresh()
    assert (seen(), view.missing) == (["one", "one_int4", "one_int8"], set())


def test_what_is_noise() -> None:
    cuda = 'W1126 14:45:52 7182 pinned_memory_manager.cc:273] "Unable to allocate pinned system memory, pinned memory'
    assert server_log.is_noise(cuda)
    assert server_log.is_noise("Error: Failed to initialize NVML")
    broken = "E1126 14:49:31 25747 model_lifecycle.cc:642] \"failed to load 'broken' version 1: Internal: LoadError\""
    assert not server_log.is_noise(broken)
    assert not server_log.is_noise("trident: smollm2: 32 slots of 2048 tokens")


def test_sentences() -> None:
    text = (
        "Internal: LoadError: ONNX Runtime can't load model.onnx: broken\n\nAt:\n  onnx_session.py(101): open_session\n"
    )
    assert one_line(text) == "ONNX Runtime can't load model.onnx: broken"
    assert (ending(-9), ending(1)) == ("was ended by signal 9", "ended with status 1")
    assert not IndexEntry("m", "UNAVAILABLE", "unloaded").failed
    assert IndexEntry("m", "UNAVAILABLE", text).failed


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        (
            "nohost.invalid",
            0,
            r"nohost.invalid is no address to listen on \(.+\): give one of this machine's with --host",
        ),
        ("192.0.2.1", 0, r"192.0.2.1 is no address to listen on \(.+\): give one of this machine's with --host"),
        ("127.0.0.1", 70_000, r"--grpc-port 70000 \(GRPC_PORT of make\) is no port: choose one from 1 to 65535"),
    ],
)
def test_where_a_server_can_not_listen(host: str, port: int, message: str) -> None:
    with pytest.raises(StartError, match=f"^{message}$"):
        preflight.check_ports(host, {"--grpc-port": port})


@pytest.mark.parametrize(
    ("option", "value"), [("--grace", "-1"), ("--notice", "nan"), ("--restarts", "-3"), ("--grace", "soon")]
)
def test_options_that_are_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--check", f"{option}={value}"])
    assert ended.value.code == 2
    assert f"argument {option}" in (said := capsys.readouterr().err)
    assert value in said


def test_a_repository_that_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(server, "check_machine", lambda options: {})
    for name, why in (("file", "is no folder"), ("none", "does not exist")):
        with pytest.raises(StartError, match=f"{name} {why}: name a model repository with --repository"):
            server.Server(Installation(*[tmp_path] * 4), ServerOptions(tmp_path / name))


def test_the_welcome_of_a_container_works_outside_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported(tmp_path, "gen")
    options = ServerOptions(tmp_path, host="0.0.0.0", grpc_port=9001)
    (tmp_path / ".trident").mkdir()
    artefacts.write_failures(tmp_path, {"other": "there is no space left"})
    for container, trident in ((True, "trident"), (False, str(Path(sys.executable).with_name("trident")))):
        if container:
            monkeypatch.setenv("TRIDENT_CONTAINER", "1")
        else:
            monkeypatch.delenv("TRIDENT_CONTAINER", raising=False)
            monkeypatch.chdir(tmp_path)
        lines = [line.strip() for line in cli.welcome(options, []).splitlines()]
        assert f'{trident} generate --url 127.0.0.1:9001 --model gen "The capital of France is"' in lines
        assert any(line.startswith("HTTP     http://127.0.0.1:8000") for line in lines)
        assert ("published" in "".join(lines)) == container
        assert "EXPORT FAILED        other: there is no space left" in lines
        assert not any("0.0.0.0" in line for line in lines)


def test_a_gateway_for_other_machines_needs_keys(tmp_path: Path) -> None:
    everywhere = ServerOptions(tmp_path, host="0.0.0.0")
    with pytest.raises(StartError, match=r"0\.0\.0\.0 can be reached from other machines: give the gateway API keys"):
        Gateway(everywhere, 8080, None, 1.0)
    Gateway(everywhere, 8080, tmp_path / "keys.json", 1.0)
    Gateway(ServerOptions(tmp_path), 8080, None, 1.0)


def test_where_tritonserver_sends_its_spans() -> None:
    flags = {"--trace-config"}
    assert trace_flags(flags, {}) == []
    assert trace_flags(set(), {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}) == []
    found = trace_flags(flags, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318/"})
    assert "--trace-config=opentelemetry,url=http://collector:4318/v1/traces" in found
    assert "--trace-config=opentelemetry,resource=service.name=tritonserver" in found
    own = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://here/spans", "OTEL_SERVICE_NAME": "llm"}
    found = trace_flags(flags, own | {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://there"})
    assert "--trace-config=opentelemetry,url=http://here/spans" in found
    assert "--trace-config=opentelemetry,resource=service.name=llm" in found
