"""What Triton can't finish unloading, and which processes serve nothing any more: decided from records and states."""

from __future__ import annotations

from pathlib import Path

from trident_serving.launcher.leftovers import IDLE_SECONDS, Leftovers
from trident_serving.launcher.processes import ProcessState
from trident_serving.runtime_folder import Record

M, STAGE = ("m", "1"), ("m_model", "1")


class Looks:
    """Looks at processes whose pids are in the order of their starts."""

    def __init__(self) -> None:
        self.now = 100.0
        self.leftovers = Leftovers(lambda pid: ProcessState("S", 0, pid), lambda: self.now)

    def look(self, *records: Record, after: float = 1.0, unloading: tuple[tuple[str, str], ...] = ()) -> object:
        self.now += after
        left, models = self.leftovers.find(unloading, records)
        return [record.pid for record in left], models


def record(pid: int, model: str = "m", version: str = "1", beat: float = 1.0, open: int = 0) -> Record:
    return Record(Path(f"/nowhere/{pid}"), pid, model, version, beat, open, open)


def test_a_model_without_a_request_that_stays_unloading() -> None:
    looks = Looks()
    assert looks.look(record(1), unloading=(M,)) == ([], [])
    assert looks.look(record(1), unloading=(M,), after=IDLE_SECONDS - 0.1) == ([], [])
    assert looks.look(record(1), unloading=(M,), after=0.1) == ([1], [M])
    assert looks.look(unloading=(M,)) == ([], [])  # it is being cleared, which takes a second
    assert looks.look(record(2), after=60) == ([], [])  # loaded again
    assert looks.look(record(2), unloading=(M,)) == ([], [])  # the time begins anew


def test_a_request_that_runs_is_waited_for() -> None:
    looks = Looks()
    for _ in range(3):
        assert looks.look(record(1, open=1), unloading=(M,), after=60) == ([], [])
    assert looks.look(record(1), unloading=(M,)) == ([], [])
    assert looks.look(record(1), unloading=(M,), after=IDLE_SECONDS) == ([1], [M])


def test_an_ensemble_has_requests_while_its_stages_have() -> None:
    looks = Looks()
    for _ in range(2):
        assert looks.look(record(1, "m_model", open=1), unloading=(M,), after=60) == ([], [])
    assert looks.look(record(1, "m_model"), record(2, "other", open=3), unloading=(M,)) == ([], [])
    assert looks.look(record(1, "m_model"), unloading=(M,), after=IDLE_SECONDS) == ([], [M])
    # What ends as it should has no record any more, and may take its time; clearing the model costs it nothing.
    assert looks.look(unloading=(STAGE,)) == ([], [])
    assert looks.look(unloading=(STAGE,), after=IDLE_SECONDS) == ([], [STAGE])


def test_a_stage_waits_for_the_request_of_another_one() -> None:
    """A run of many long texts takes longer than a process may be idle, and the last stage still has its answer."""
    looks, last = Looks(), ("m_postprocess", "1")
    records = record(1, "m_model", open=1), record(2, "m_postprocess")
    for _ in range(3):
        assert looks.look(*records, unloading=(STAGE, last), after=60) == ([], [])
        assert looks.look(*records, unloading=(last,), after=60) == ([], [])  # a variant shares the stage that runs
    assert looks.look(record(1, "m_model"), records[1], unloading=(STAGE, last)) == ([], [])
    found = looks.look(record(1, "m_model"), records[1], unloading=(STAGE, last), after=IDLE_SECONDS)
    assert found == ([1, 2], [STAGE, last])


def test_a_model_does_not_wait_for_another_variant() -> None:
    looks = Looks()
    records = record(1), record(2, "m_int8", open=1), record(3, "m-2_model", open=1)
    assert looks.look(*records, unloading=(M,)) == ([], [])
    assert looks.look(*records, unloading=(M,), after=IDLE_SECONDS) == ([1], [M])


def test_a_process_in_whose_place_another_one_serves() -> None:
    looks = Looks()
    old, new, later = record(1), record(2), record(3, version="2")
    assert looks.look(old, new, later) == ([], [])
    assert looks.look(old, new, later, after=IDLE_SECONDS) == ([1], [])
    # Not while it answers, nor while another is on its way: until then it serves.
    looks = Looks()
    for records in ((record(1, open=2), new), (old, record(2, beat=0.0)), (old, new, record(3, beat=0.0, version="2"))):
        for _ in range(2):
            assert looks.look(*records, after=IDLE_SECONDS) == ([], [])
