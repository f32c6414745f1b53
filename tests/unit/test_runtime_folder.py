"""Records of backend processes: what is written, and what the launcher concludes from it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trident_serving import runtime_folder
from trident_serving.launcher import processes
from trident_serving.launcher.process_watch import ProcessWatch
from trident_serving.launcher.processes import ProcessState
from trident_serving.runtime_folder import Process, Record, RuntimeFolder


@pytest.fixture
def folder(tmp_path: Path) -> RuntimeFolder:
    return RuntimeFolder(tmp_path / "runtime")


def test_counts_and_heartbeat(folder: RuntimeFolder) -> None:
    process = Process("my_model-1", "1", folder.folder)
    assert [(r.pid, r.model, r.version, r.beat, r.open) for r in folder.records()] == [
        (os.getpid(), "my_model-1", "1", 0.0, 0)
    ]
    process.opened()
    with process.answering(3):
        assert (folder.records()[0].open, folder.records()[0].held) == (4, 1)
    process.closed()
    assert (folder.records()[0].open, folder.records()[0].held) == (0, 0)
    process.start()
    deadline = time.monotonic() + 5
    while not folder.records()[0].beat and time.monotonic() < deadline:
        time.sleep(0.01)
    assert time.monotonic() - folder.records()[0].beat < 2
    process.stop()
    assert folder.records() == []


def test_a_process_that_is_replaced_knows_it(folder: RuntimeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    own = os.getpid()
    process = Process("gen", "1", folder.folder)
    Process("gen", "2", folder.folder)
    Process("gen_draft", "1", folder.folder)
    assert not process.replaced
    monkeypatch.setattr(os, "getpid", lambda: own + 1)
    other = Process("gen", "1", folder.folder)
    assert (process.replaced, other.replaced) == (True, True)
    other.ends()
    assert (process.replaced, len(folder.records())) == (False, 3)
    assert Process("gen", "1", None).replaced  # nobody can tell


def test_a_stalled_engine_does_not_beat(folder: RuntimeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_folder, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(runtime_folder, "BEAT_SECONDS", 0.02)
    busy, steps = [False], [0]
    process = Process("gen", "1", folder.folder)
    process.start(lambda: steps[0], lambda: busy[0])

    def beats(seconds: float = 0.6) -> bool:
        time.sleep(seconds)
        return time.monotonic() - folder.records()[0].beat < 0.2

    assert beats()  # nothing to do
    busy[0] = True
    assert not beats()  # work, and no step
    steps[0] += 1
    assert beats(0.1)
    process.stop()


LAUNCHER = """
import subprocess, sys, time
from pathlib import Path
from trident_serving.runtime_folder import RuntimeFolder
RuntimeFolder(Path(sys.argv[1]))
print(subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1]]).pid, flush=True)
time.sleep(60)
"""
BACKEND = """
import ctypes, sys
from pathlib import Path
from trident_serving.runtime_folder import Process
process = Process("gen", "1", Path(sys.argv[1]))
process.start()
process.opened()
ctypes.PyDLL(None).pause()  # holds Python's lock for ever, as a call into a server that was killed
"""


def test_a_process_that_is_stuck_ends_with_its_launcher_and_a_frozen_one_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "runtime"
    command = [sys.executable, "-c", LAUNCHER, str(folder), BACKEND]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        pid = int(launcher.stdout.readline())

        def living(seconds: float) -> bool:
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                if processes.state(pid).dead:
                    return False
                time.sleep(0.02)
            return True

        deadline = time.monotonic() + 20
        while not any(path.read_bytes()[8:9] == b"\1" for path in (folder / "processes").iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.5)
        os.kill(pid, signal.SIGCONT)
        assert living(0.5)
        launcher.kill()
        assert not living(10)


def test_draining_and_the_pass(folder: RuntimeFolder) -> None:
    process = Process("gen", "1", folder.folder)
    assert not process.draining
    folder.drain()
    assert process.draining
    assert process.holds_pass(Process("tr", "1", folder.folder).own_pass)
    assert not any(process.holds_pass(value) for value in ("", None, "x", 1, process.own_pass + "x"))
    alone = Process("gen", "1", None)
    assert not alone.draining
    assert not alone.holds_pass("")


class Machine:
    """Processes and a clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0
        self.states: dict[int, ProcessState] = {}
        self.killed: list[int] = []
        self.watch = ProcessWatch(lambda pid: self.states[pid], self.killed.append, lambda: self.now)

    def look(self, *records: Record, after: float = 0.2) -> list[tuple[int, str]]:
        self.now += after
        return [(record.pid, why) for record, why in self.watch.fallen(list(records))]


def record(pid: int, beat: float, model: str = "gen", held: int = 0) -> Record:
    return Record(Path(f"/nowhere/{pid}"), pid, model, "1", beat, held, held)


def test_a_dead_process_is_found_once_and_only_if_no_other_serves_its_model() -> None:
    machine = Machine()
    machine.states = {1: ProcessState("S", 1), 2: ProcessState("Z"), 3: ProcessState(""), 4: ProcessState("X")}
    assert machine.look(record(1, 100.0), record(2, 99.0, "other")) == [(2, "has died")]
    # Loaded again meanwhile: process 1 serves the model of process 3. Never ready: Triton tells of process 4.
    assert machine.look(record(1, 100.2), record(3, 99.0), record(4, 0.0, "new")) == []


def test_a_process_that_hangs_is_ended() -> None:
    machine = Machine()
    machine.states[1] = ProcessState("S", 7)
    assert machine.look(record(1, machine.now)) == []
    machine.states[1] = ProcessState("T", 7)
    assert machine.look(record(1, machine.now)) == [(1, "did not answer and was ended")]
    assert machine.killed == [1]


@pytest.mark.parametrize(("letter", "ticks", "seconds"), [("S", 0, 2.0), ("R", 1, 10.0), ("D", 0, 10.0)])
def test_how_long_silence_may_last(letter: str, ticks: int, seconds: float) -> None:
    """Two seconds for an idle process; ten for one that uses the processor or waits for a disk."""
    machine = Machine()
    beat, used = machine.now, 5
    while machine.now - beat < 20:
        used += ticks
        machine.states[1] = ProcessState(letter, used)
        if machine.look(record(1, beat)):
            break
    assert seconds <= machine.now - beat <= seconds + 0.5


def test_a_launcher_that_was_suspended_itself_reports_no_process() -> None:
    machine = Machine()
    machine.states[1] = ProcessState("S", 5)
    beat = machine.now
    assert machine.look(record(1, beat)) == []
    assert machine.look(record(1, beat), after=30.0) == []
    assert machine.killed == []
