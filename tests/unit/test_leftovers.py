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
        self.zombies: set[int] = set()
        self.leftovers = Leftovers(
            lambda pid: ProcessState("Z" if pid in self.zombies else "S", 0, pid), lambda: self.now
        )

    def look(
        self,
        *records: Record,
        after: float = 1.0,
        unloading: tuple[tuple[str, str], ...] = (),
        present: tuple[str, ...] = (),
        shared: tuple[str, ...] = (),
    ) -> object:
        self.now += after
        left, models = self.leftovers.find(unloading, records, present, lambda: shared)
        return [record.pid for record in left], models


def record(pid: int, model: str = "m", version: str = "1", beat: float = 1.0, open: int = 0, taken: int = 1) -> Record:
    return Record(Path(f"/nowhere/{pid}"), pid, model, version, beat, open, open, taken)


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


def test_a_process_serves_until_a_later_one_has_taken_a_request() -> None:
    """Triton serves with the old processes of all versions until each version has a new one."""
    looks, old, second = Looks(), record(1), record(2, version="2")
    # The new process of the second version, which Triton also waits for, has not begun.
    for _ in range(3):
        assert looks.look(old, second, record(3, taken=0), after=60) == ([], [])
    new = record(3), record(4, version="2", taken=0)
    assert looks.look(old, second, *new) == ([], [])
    assert looks.look(old, second, *new, after=IDLE_SECONDS) == ([1], [])
    assert looks.look(second, new[0], record(4, version="2"), after=IDLE_SECONDS) == ([], [])
    assert looks.look(second, new[0], record(4, version="2"), after=IDLE_SECONDS) == ([2], [])


def test_a_replaced_stage_waits_for_a_request_that_began_before() -> None:
    looks, running, later = Looks(), record(1, "m_model", open=1), record(4, "m_model", open=1)
    old, new = record(2, "m_postprocess"), record(3, "m_postprocess")
    for _ in range(2):
        assert looks.look(running, old, new, after=60) == ([], [])
    assert looks.look(later, old, new) == ([], [])
    assert looks.look(later, old, new, after=IDLE_SECONDS) == ([2], [])


def test_what_runs_without_a_record_is_left_alone() -> None:
    """A server's own ONNX Runtime has none: nobody knows whether it computes."""
    looks, both = Looks(), (record(1, "m_tokenizer"), record(2, "m_postprocess"))
    unloading = (M, STAGE, ("m_tokenizer", "1"), ("m_postprocess", "1"))
    present = tuple(name for name, _ in unloading)
    for _ in range(3):
        assert looks.look(*both, unloading=unloading, present=present, after=60) == ([], [])
    replaced = *both, record(3, "m_postprocess")
    for _ in range(3):
        assert looks.look(*replaced, present=present, after=60) == ([], [])
    # Once it is unloaded, the others are what hangs.
    rest = unloading[2:]
    assert looks.look(*both, unloading=rest, present=("m_tokenizer", "m_postprocess")) == ([], [])
    found = looks.look(*both, unloading=rest, present=("m_tokenizer", "m_postprocess"), after=IDLE_SECONDS)
    assert found == ([1, 2], sorted(rest))
    # A stage that has had a record needs none while it ends.
    looks = Looks()
    assert looks.look(*both, record(3, "m_model"), unloading=unloading, present=present) == ([], [])
    assert looks.look(*both, unloading=unloading, present=present, after=60) == ([1, 2], sorted(unloading))


def test_what_a_foreign_ensemble_asks_is_left_alone() -> None:
    looks = Looks()
    for _ in range(3):
        assert looks.look(record(1), record(2), unloading=(M,), shared=("m",), after=60) == ([], [])


def test_a_zombie_is_no_process() -> None:
    looks = Looks()
    looks.zombies = {2}
    for _ in range(3):  # the later one has ended, so the earlier one is what there is
        assert looks.look(record(1), record(2), after=60) == ([], [])
    looks.zombies = {1}  # what it counted is not open any more
    assert looks.look(record(1, open=1), unloading=(M,)) == ([], [])
    assert looks.look(record(1, open=1), unloading=(M,), after=IDLE_SECONDS) == ([], [M])
