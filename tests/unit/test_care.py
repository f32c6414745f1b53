"""What the launcher does about failed models, by their states in the server's index. The server is a fake here; the
real one is in tests/integration/test_shell.py."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trident_serving import artefacts
from trident_serving.errors import ControlError, Refused
from trident_serving.launcher import care, leftovers, liveness, processes
from trident_serving.launcher.care import Care
from trident_serving.launcher.control import Control
from trident_serving.launcher.failures import IndexEntry
from trident_serving.launcher.liveness import Liveness
from trident_serving.launcher.supervisor import SERVER_SILENT_SECONDS
from trident_serving.runtime_folder import Record


class Server:
    """Records its calls."""

    def __init__(self, repository: Path, *entries: IndexEntry) -> None:
        self.entries = list(entries)
        self.done: list[str] = []
        self.refuses: list[Exception] = []
        self.options = SimpleNamespace(repository=repository, ready_seconds=1.0, grpc_address="")
        self.view = SimpleNamespace(refresh=list, refused={})
        self.control: Any = SimpleNamespace(
            index=lambda: self.entries,
            live=lambda seconds: True,
            load=self._load,
            unload=lambda model: self.done.append(f"unload {model}"),
            clear_failure=lambda model, version: self.done.append(f"clear {model} {version}"),
        )
        self.records: list[Record] = []
        self.runtime = SimpleNamespace(records=lambda: list(self.records))

    def _load(self, model: str, seconds: float) -> None:
        self.done.append(f"load {model}")
        if self.refuses:
            raise self.refuses.pop(0)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def reloaded(server: Server) -> Care:
    one: Care = Care(server)  # type: ignore[arg-type]
    one.reload("m")
    return one


def test_a_dead_model_is_unloaded_and_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = Server(tmp_path, IndexEntry("m", "READY"))
    one = reloaded(server)
    said = ""

    def answered() -> bool:
        nonlocal said
        said += capsys.readouterr().err
        return "m answers again" in said

    until(answered)
    one.stop()
    assert server.done[:2] == ["unload m", "load m"]


@pytest.mark.parametrize("entry", [IndexEntry("m", "UNLOADING"), IndexEntry("m", "UNAVAILABLE", "unloaded")])
def test_a_model_that_dies_while_a_client_unloads_it_stays_unloaded(
    tmp_path: Path, entry: IndexEntry, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(tmp_path, entry, IndexEntry("other", "UNAVAILABLE", "broken"))
    one = reloaded(server)
    until(lambda: "clear other 1" in server.done)  # its thread has been through the order by then
    one.stop()
    assert not [what for what in server.done if what.endswith(" m")]
    assert "m was unloaded meanwhile" in capsys.readouterr().err


def test_an_unload_that_triton_can_not_finish(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process is ended and the model cleared; a version beside one that answers only loses its process."""
    monkeypatch.setattr(leftovers, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(care, "CARE_SECONDS", 0.02)
    killed: list[int] = []
    monkeypatch.setattr(processes, "kill", killed.append)
    manifests = [SimpleNamespace(triton_models=("m", "kept"))]
    monkeypatch.setattr(artefacts, "read_manifests", lambda repository: manifests)
    server = Server(
        tmp_path,
        IndexEntry("m", "UNLOADING", unloading=("1",)),
        IndexEntry("kept", "READY", served=True, version="2", unloading=("1",)),
        IndexEntry("foreign", "UNLOADING", unloading=("1",)),
    )
    for pid, name in ((os.getpid(), "m"), (os.getppid(), "kept")):
        (tmp_path / name).touch()
        server.records.append(Record(tmp_path / name, pid, name, "1", 1.0, 0, 0))
    one: Care = Care(server)  # type: ignore[arg-type]
    until(lambda: "clear m 1" in server.done)
    one.stop()
    assert set(killed) == {os.getpid(), os.getppid()}
    assert not (tmp_path / "m").exists()
    assert set(server.done) == {"clear m 1"}
    assert "a backend process of kept served nothing any more" in capsys.readouterr().err


def test_a_refused_load_is_tried_again_and_a_silent_server_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(care, "PAUSE_SECONDS", 0.05)
    server = Server(tmp_path, IndexEntry("m", "READY"))
    server.refuses = [Refused("a broken template"), ControlError("timed out")]
    one = reloaded(server)
    until(lambda: bool(one.broken))
    one.stop()
    assert server.done.count("load m") == 2
    assert one.broken == "m could not be loaded again (timed out)"


def test_a_model_that_dies_while_http_is_silent_is_loaded_again_when_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(care, "CARE_SECONDS", 0.02)
    server = Server(tmp_path, IndexEntry("m", "READY"))
    failing = [ControlError("timed out"), ControlError("timed out")]

    def unload(model: str) -> None:
        if failing:
            raise failing.pop()
        server.done.append(f"unload {model}")

    server.control.unload = unload
    server.control.live = lambda seconds: False
    one: Care = Care(server)  # type: ignore[arg-type]
    one.liveness.stop()
    one.liveness.grpc_only = True
    server.refuses = [ControlError("timed out")]
    one.reload("m")
    until(lambda: not one._later and bool(server.done))
    one.stop()
    assert (one.broken, server.done) == ("", ["unload m", "load m", "load m"])
    said = "trident: m is loaded again once HTTP answers\ntrident: m answers again\n"
    assert capsys.readouterr().err == said


def test_a_server_that_answers_neither_door_is_found_as_soon_as_by_http(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ports take connections and nothing comes, as of a process that hangs."""
    faster = 10
    monkeypatch.setattr(liveness, "CARE_SECONDS", liveness.CARE_SECONDS / faster)
    monkeypatch.setattr(liveness, "HEALTH_SECONDS", liveness.HEALTH_SECONDS / faster)
    with socket.create_server(("127.0.0.1", 0)) as http, socket.create_server(("127.0.0.1", 0)) as grpc:
        began = time.monotonic()
        one = Liveness(
            Control(f"http://127.0.0.1:{http.getsockname()[1]}", "", Path()), f"127.0.0.1:{grpc.getsockname()[1]}"
        )
        until(lambda: one.silent_seconds > SERVER_SILENT_SECONDS / faster)
        waited = time.monotonic() - began
        one.stop()
    # Three looks of four seconds each, as long as HTTP alone was asked; a second is for a busy machine.
    assert 1.2 <= waited < 2.2
    assert one.silent_seconds == pytest.approx(1.2, abs=0.01)
    assert not one.grpc_only
