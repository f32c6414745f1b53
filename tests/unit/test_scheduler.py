"""The scheduler with nothing but itself: rows stay dense, order is kept, nobody starves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trident_serving.errors import Overloaded
from trident_serving.generation.scheduler import RowMove, Scheduler, Sequence


def prefilled(scheduler: Scheduler[str], name: str, length: int = 3) -> Sequence[str]:
    sequence = Sequence(name, length)
    scheduler.add(sequence)
    while sequence.row is None or sequence.cached < length:
        step = scheduler.schedule()
        assert step.prefill is not None
        scheduler.advance(step.prefill.sequence, step.prefill.end - step.prefill.start)
    return sequence


def test_long_prompts_run_in_chunks_beside_the_running() -> None:
    scheduler: Scheduler[str] = Scheduler(slots=2, prefill_chunk=4, max_waiting=8)
    running = prefilled(scheduler, "running")
    long = Sequence("long", 10)
    scheduler.add(long)
    chunks = []
    for _ in range(3):
        step = scheduler.schedule()
        assert step.decode == (running,)
        assert step.prefill is not None
        chunks.append((step.prefill.start, step.prefill.end, step.prefill.is_last))
        scheduler.advance(long, step.prefill.end - step.prefill.start)
    assert chunks == [(0, 4, False), (4, 8, False), (8, 10, True)]
    assert scheduler.schedule().decode == (running, long)
    assert scheduler.schedule().prefill is None


def test_first_come_first_served_and_only_as_many_as_there_are_slots() -> None:
    scheduler: Scheduler[str] = Scheduler(slots=2, prefill_chunk=8, max_waiting=8)
    one, two = prefilled(scheduler, "one"), prefilled(scheduler, "two")
    three, four = Sequence("three", 3), Sequence("four", 3)
    scheduler.add(three)
    scheduler.add(four)
    assert scheduler.schedule().prefill is None
    scheduler.remove(one)
    step = scheduler.schedule()
    assert step.prefill is not None
    assert step.prefill.sequence is three
    assert step.decode == (two,)


def test_the_last_row_closes_the_hole_and_the_prefilling_row_follows() -> None:
    scheduler: Scheduler[str] = Scheduler(slots=4, prefill_chunk=2, max_waiting=8)
    first, second = prefilled(scheduler, "first"), prefilled(scheduler, "second", 5)
    third = Sequence("third", 6)
    scheduler.add(third)
    step = scheduler.schedule()
    assert step.prefill is not None
    scheduler.advance(third, 2)
    assert (first.row, second.row, third.row) == (0, 1, 2)
    assert scheduler.remove(first) == [RowMove(1, 0, 5), RowMove(2, 1, 2)]
    assert (second.row, third.row) == (0, 1)
    assert scheduler.remove(third) == []
    assert scheduler.remove(second) == []
    assert scheduler.idle


def test_a_full_queue_refuses() -> None:
    scheduler: Scheduler[str] = Scheduler(slots=1, prefill_chunk=2, max_waiting=1)
    scheduler.add(Sequence("one", 1))
    with pytest.raises(Overloaded, match="1 requests wait for 1 slots"):
        scheduler.add(Sequence("two", 1))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12)), max_size=60))
def test_rows_are_dense_and_follow_the_moves(actions: list[tuple[int, int]]) -> None:
    """A model of the cache: each row holds the name of its sequence, moves copy names."""
    scheduler: Scheduler[int] = Scheduler(slots=3, prefill_chunk=5, max_waiting=100)
    cache: dict[int, int] = {}
    for number, (action, length) in enumerate(actions):
        if action < 5:
            scheduler.add(Sequence(number, length))
        elif action < 7 and scheduler.sequences:
            for move in scheduler.remove(scheduler.sequences[length % len(scheduler.sequences)]):
                cache[move.target] = cache[move.source]
        step = scheduler.schedule()
        if step.prefill is not None:
            sequence = step.prefill.sequence
            assert sequence.row == len(step.decode) < 3
            cache[sequence.row] = sequence.payload
            scheduler.advance(sequence, step.prefill.end - step.prefill.start)
        assert [sequence.row for sequence in step.decode] == list(range(len(step.decode)))
        assert [cache[row] for row in range(len(step.decode))] == [s.payload for s in step.decode]
        for sequence in step.decode:
            scheduler.advance(sequence, 1)
