"""What the launcher does about failed models, by their states in the server's index. The server is a fake here; the
real one is in tests/integration/test_shell.py."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trident_serving import artefacts
from trident_serving.errors import ControlError, Refused
from trident_serving.launcher import care, leftovers, processes
from trident_serving.launcher.care import Care
from trident_serving.launcher.failures import IndexEntry
from trident_serving.runtime_folder import Record


class Server:
    """Records its calls."""

    def __init__(self, repository: Path, *entries: IndexEntry) -> None:
        self.entries = list(entries)
        self.done: list[str] = []
        self.refuses: list[Exception] = []
        self.options = SimpleNamespace(repository=repository, ready_seconds=1.0)
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
