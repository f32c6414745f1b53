"""The scheduler with nothing but itself: chunks, order, nobody starves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trident_serving.errors import Overloaded
from trident_serving.generation.scheduler import Scheduler, Sequence, Step
from trident_serving.generation.slots import SlotPool


class Named(Sequence):
    def __init__(self, name: str | int, prompt: list[int], max_tokens: int) -> None:
        super().__init__(prompt, max_tokens)
        self.name = name


def make(slots: int = 2, chunk: int = 8, max_waiting: int = 8, budget: int = 1000) -> Scheduler[Named]:
    return Scheduler(SlotPool(slots, budget), chunk, max_waiting)


def sequence(name: str, length: int, max_tokens: int = 10) -> Named:
    base = sum(map(ord, name)) * 1000
    return Named(name, list(range(base, base + length)), max_tokens)


def run(step: Step[Named]) -> None:
    """What the engine does: the cache grows by the chunks and by a token for each decoding sequence."""
    for chunk in step.prefill:
        chunk.sequence.cached = chunk.end
    for decoding in step.decode:
        decoding.cached = len(decoding.tokens)
        decoding.tokens.append(1)


def test_long_prompts_run_in_chunks_beside_the_running() -> None:
    scheduler = make(chunk=4)
    running, long = sequence("running", 3), sequence("long", 10)
    scheduler.add(running)
    run(scheduler.schedule())
    scheduler.add(long)
    chunks = []
    for _ in range(3):
        step = scheduler.schedule()
        assert step.decode == (running,)
        chunks += [(chunk.start, chunk.end, chunk.is_last) for chunk in step.prefill]
        run(step)
    assert chunks == [(0, 4, False), (4, 8, False), (8, 10, True)]
    step = scheduler.schedule()
    assert (step.prefill, step.decode) == ((), (running, long))


def test_short_prompts_share_a_step() -> None:
    scheduler = make(slots=4, chunk=10)
    sequences = [sequence(name, 4) for name in "abcd"]
    for each in sequences:
        scheduler.add(each)
    first = scheduler.schedule()
    assert [(chunk.sequence.name, chunk.start, chunk.end) for chunk in first.prefill] == [
        ("a", 0, 4),
        ("b", 0, 4),
        ("c", 0, 2),
    ]
    run(first)
    second = scheduler.schedule()
    assert [(chunk.sequence.name, chunk.start, chunk.end) for chunk in second.prefill] == [("c", 2, 4), ("d", 0, 4)]
    assert [decoding.name for decoding in second.decode] == ["a", "b"]


def test_first_come_first_served_and_only_as_many_as_there_are_slots() -> None:
    scheduler = make(slots=2)
    one, two, three, four = (sequence(name, 3) for name in ("one", "two", "three", "four"))
    for each in (one, two, three, four):
        scheduler.add(each)
    run(scheduler.schedule())
    assert scheduler.schedule().prefill == ()
    scheduler.remove(one)
    step = scheduler.schedule()
    assert [chunk.sequence for chunk in step.prefill] == [three]
    assert step.decode == (two,)


def test_nobody_overtakes_one_that_waits_for_memory() -> None:
    scheduler = make(slots=4, budget=100)
    small, large, tiny = sequence("small", 30, 30), sequence("large", 60, 20), sequence("tiny", 2, 2)
    scheduler.add(small)
    while not small.prefilled:
        run(scheduler.schedule())
    scheduler.add(large)
    scheduler.add(tiny)
    assert scheduler.schedule().prefill == ()
    assert scheduler.waiting == 2
    scheduler.remove(small)
    step = scheduler.schedule()
    assert [chunk.sequence for chunk in step.prefill] == [large]


def test_a_prompt_starts_behind_what_is_cached_of_it() -> None:
    scheduler = make()
    first = sequence("x", 20)
    scheduler.add(first)
    while not first.prefilled:
        run(scheduler.schedule())
    again = Named("again", [*first.tokens, 5, 6], 10)
    scheduler.remove(first)
    scheduler.add(again)
    step = scheduler.schedule()
    assert [(chunk.start, chunk.end) for chunk in step.prefill] == [(20, 22)]
    assert step.placed[0][1].reused == 20


def test_a_full_queue_refuses_with_its_size() -> None:
    scheduler = make(slots=1, max_waiting=1)
    scheduler.add(sequence("one", 1))
    with pytest.raises(Overloaded, match="the queue is full: 1 of 1 requests wait while 0 run"):
        scheduler.add(sequence("two", 1))


def test_removal_of_one_that_waits() -> None:
    scheduler = make(slots=1)
    one, two = sequence("one", 1), sequence("two", 1)
    scheduler.add(one)
    run(scheduler.schedule())
    scheduler.add(two)
    scheduler.remove(two)
    scheduler.remove(one)
    assert scheduler.sequences == []


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12)), max_size=80), st.integers(1, 6))
def test_everybody_is_served_in_order(actions: list[tuple[int, int]], chunk: int) -> None:
    scheduler: Scheduler[Named] = Scheduler(SlotPool(3, 90), chunk, 1000)
    waiting, placed = [], []
    for number, (action, length) in enumerate(actions):
        if action < 5:
            each = Named(number, [number * 50 + index for index in range(length)], 12)
            scheduler.add(each)
            waiting.append(each)
        elif action < 7 and scheduler.sequences:
            gone = scheduler.sequences[length % len(scheduler.sequences)]
            if gone in waiting:
                waiting.remove(gone)
            scheduler.remove(gone)
        step = scheduler.schedule()
        for each, _ in step.placed:
            assert each is waiting.pop(0)
            placed.append(each.name)
        slots = [each.slot for each in scheduler.sequences if each.slot is not None]
        assert len(slots) == len(set(slots)) <= 3
        assert sum(chunk.end - chunk.start for chunk in step.prefill) <= chunk
        assert {each.name for each in step.decode}.isdisjoint(c.sequence.name for c in step.prefill)
        run(step)
    assert placed == sorted(placed)
