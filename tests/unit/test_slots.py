"""Slots of the cache: admission by memory, reuse of prefixes, the least recently used content first out."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trident_serving.generation.slots import MIN_REUSED, Placement, SlotPool, common_prefix

SYSTEM = list(range(100, 100 + 2 * MIN_REUSED))


@dataclass
class Text:
    tokens: list[int]
    cached: int = 0
    rotation: int = 0
    adapter: int = 0
    images: tuple[tuple[int, bytes], ...] = ()

    @classmethod
    def prompt(cls, *more: int) -> Text:
        return cls([*SYSTEM, *more])


def ended(pool: SlotPool, text: Text) -> Placement:
    """Place a text, run all of it, and end it."""
    placement = pool.place(text, len(text.tokens))
    assert placement is not None
    text.cached = len(text.tokens)
    pool.release(placement.slot)
    return placement


def test_a_conversation_goes_on_in_its_slot() -> None:
    pool = SlotPool(slots=2, budget=200)
    first = ended(pool, Text.prompt(1, 2))
    assert first == Placement(slot=0)
    assert pool.place(Text.prompt(1, 2, 3, 4), 30) == Placement(slot=0, reused=len(SYSTEM) + 2)


@pytest.mark.parametrize(
    ("images", "reused"),
    [
        (((18, b"a"), (22, b"b")), 29),
        (((18, b"a"), (22, b"c")), 22),
        (((18, b"c"), (22, b"b")), 18),
        (((18, b"a"),), 22),
        ((), 18),
        (((17, b"a"), (22, b"b")), 17),
        (((18, b"a"), (22, b"b"), (29, b"c")), 29),
    ],
)
def test_prefixes_end_before_another_image(images: tuple[tuple[int, bytes], ...], reused: int) -> None:
    """All tokens of images are the same."""
    pool = SlotPool(slots=2, budget=200)
    tokens = [*SYSTEM, 1, 2, *[9] * 12]
    ended(pool, Text(tokens, images=((18, b"a"), (22, b"b"))))
    placement = pool.place(Text(tokens, images=images), 40)
    assert placement is not None
    assert placement.reused == reused


def test_the_whole_prompt_is_never_reused() -> None:
    """One token must run, to give the first logits."""
    pool = SlotPool(slots=1, budget=200)
    ended(pool, Text.prompt(1, 2))
    assert pool.place(Text.prompt(1, 2), 30) == Placement(slot=0, reused=len(SYSTEM) + 1)


def test_a_shared_beginning_is_copied_from_a_running_slot() -> None:
    pool = SlotPool(slots=2, budget=200)
    running = Text.prompt(1)
    assert pool.place(running, 60) == Placement(slot=0)
    assert pool.place(Text.prompt(2), 60) == Placement(slot=1)  # nothing is cached yet
    pool.evict(1)
    running.cached = len(SYSTEM) + 1
    assert pool.place(Text.prompt(2), 60) == Placement(slot=1, reused=len(SYSTEM), source=0)


def test_content_is_kept_if_another_slot_is_free() -> None:
    pool = SlotPool(slots=2, budget=200)
    ended(pool, Text.prompt(1, 1, 1))
    assert pool.place(Text.prompt(2), 30) == Placement(slot=1, reused=len(SYSTEM), source=0)
    pool.evict(1)
    # ... and not where it is the only one.
    single = SlotPool(slots=1, budget=200)
    ended(single, Text.prompt(1, 1, 1))
    assert single.place(Text.prompt(2), 30) == Placement(slot=0, reused=len(SYSTEM))


def test_the_least_recently_used_content_goes_first() -> None:
    pool = SlotPool(slots=3, budget=3000)
    texts = [Text([slot * 1000 + index for index in range(40)]) for slot in range(3)]
    for text in texts:
        ended(pool, text)
    assert ended(pool, Text([*texts[0].tokens, 7])).slot == 0  # used again
    assert ended(pool, Text(list(range(5000, 5040)))).slot == 1
    assert ended(pool, Text(list(range(6000, 6040)))).slot == 2
    assert ended(pool, Text(list(range(7000, 7040)))).slot == 0


def test_admission_is_by_memory() -> None:
    pool = SlotPool(slots=4, budget=100)
    texts = [Text(list(range(base, base + 30))) for base in (0, 100, 200, 300)]
    placements = [pool.place(text, 45) for text in texts]
    assert placements == [Placement(0), Placement(1), None, None]
    assert (pool.running, pool.held) == (2, 90)
    pool.release(0)
    assert pool.place(texts[2], 50) is not None


def test_kept_content_makes_room() -> None:
    pool = SlotPool(slots=3, budget=100)
    for base in (0, 1000):
        ended(pool, Text(list(range(base, base + 40))))
    assert pool.held == 80
    placement = pool.place(Text(list(range(2000, 2020))), 30)
    assert placement == Placement(slot=2, evicted=(0,))
    assert pool.held == 70


def test_what_is_copied_from_may_be_evicted_by_it() -> None:
    pool = SlotPool(slots=2, budget=60)
    ended(pool, Text.prompt(1, 1, 1))
    assert pool.place(Text.prompt(2), 50) == Placement(slot=1, reused=len(SYSTEM), source=0, evicted=(0,))


def test_without_copies_content_is_reused_in_place() -> None:
    pool = SlotPool(slots=2, budget=200, can_copy=False)
    ended(pool, Text.prompt(1, 1, 1))
    assert pool.place(Text.prompt(2), 30) == Placement(slot=0, reused=len(SYSTEM))
    assert pool.place(Text.prompt(3), 30) == Placement(slot=1)


def test_what_can_not_be_cut_back_is_reused_whole() -> None:
    pool = SlotPool(slots=3, budget=300, whole=True)
    ended(pool, Text.prompt(1, 2))
    assert pool.place(Text.prompt(1, 3), 30) == Placement(slot=1)  # shares a beginning only
    assert pool.place(Text.prompt(1, 2), 30) == Placement(slot=2)  # one token must run
    pool.release(2)
    assert pool.place(Text.prompt(1, 2, 3), 30) == Placement(slot=0, reused=len(SYSTEM) + 2)


@pytest.mark.parametrize("whole", [False, True])
def test_a_slot_belongs_to_one_adapter(whole: bool) -> None:
    pool = SlotPool(slots=4, budget=300, whole=whole)
    prompt = [*SYSTEM, 1, 2]
    ended(pool, Text(prompt, adapter=1))
    assert ended(pool, Text([*prompt, 3])) == Placement(slot=1)
    assert ended(pool, Text([*prompt, 3], adapter=2)) == Placement(slot=2)
    assert pool.place(Text([*prompt, 3], adapter=1), 40) == Placement(slot=0, reused=len(prompt))


def test_what_runs_is_copied_whole() -> None:
    pool = SlotPool(slots=2, budget=300, whole=True)
    running = Text.prompt(1, 2)
    pool.place(running, 60)
    running.cached = len(SYSTEM) + 1
    assert pool.place(Text.prompt(1, 9), 60) == Placement(slot=1, reused=len(SYSTEM) + 1, source=0)


def test_without_reuse_nothing_is_kept() -> None:
    pool = SlotPool(slots=2, budget=200, reuse=False)
    ended(pool, Text.prompt(1))
    assert pool.held == 0
    assert pool.place(Text.prompt(1, 2), 30) == Placement(slot=0)


def test_what_can_not_be_trusted_is_not_reused() -> None:
    pool = SlotPool(slots=1, budget=200)
    text = Text.prompt(1)
    pool.place(text, 30)
    text.cached = len(text.tokens)
    pool.evict(0)
    assert pool.place(Text.prompt(1, 2), 30) == Placement(slot=0)


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40), st.integers(0, 50))
def test_common_prefix(a: list[int], b: list[int], limit: int) -> None:
    shared = 0
    while shared < min(len(a), len(b), limit) and a[shared] == b[shared]:
        shared += 1
    assert common_prefix(a, b, limit) == shared


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(1, 30)), max_size=60), st.booleans())
def test_a_slot_holds_what_a_placement_promises(actions: list[tuple[int, int, int]], can_copy: bool) -> None:
    """A model of the cache: lists of tokens, copied as placements say. Memory is never exceeded."""
    pool = SlotPool(slots=3, budget=150, can_copy=can_copy)
    cache: list[list[int]] = [[], [], []]
    running: dict[int, Text] = {}
    for action, seed, length in actions:
        if action == 0 and running:
            slot = sorted(running)[seed % len(running)]
            del running[slot]
            pool.release(slot)
        else:
            # A few families of texts with common beginnings.
            tokens = [seed % 3] * (2 * MIN_REUSED) + [(seed * 7 + index) % 5 for index in range(length)]
            text = Text(tokens)
            placement = pool.place(text, len(tokens) + action)
            if placement is None:
                assert len(running) == 3 or sum(len(t.tokens) + 2 for t in running.values()) + len(tokens) + 2 > 150
                continue
            assert placement.slot not in running
            if placement.source is not None:
                cache[placement.slot] = cache[placement.source][: placement.reused]
            assert cache[placement.slot][: placement.reused] == tokens[: placement.reused]
            for slot in placement.evicted:
                assert slot not in running
                cache[slot] = []
            assert placement.reused < len(tokens)
            cache[placement.slot] = list(tokens)
            text.cached = len(tokens)
            running[placement.slot] = text
        assert pool.running == len(running)
        assert pool.held <= 150


@pytest.mark.parametrize("shared", [MIN_REUSED - 1, MIN_REUSED])
def test_a_short_beginning_is_not_worth_it(shared: int) -> None:
    pool = SlotPool(slots=2, budget=200)
    ended(pool, Text([*range(shared), 50, 51]))
    placement = pool.place(Text([*range(shared), 60, 61]), 30)
    assert placement == (Placement(1, shared, source=0) if shared == MIN_REUSED else Placement(1))
