"""Drafts from the sequence's own words, and how many of them pay."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trident_serving.generation.draft_model import History, ModelAcceptance
from trident_serving.generation.drafting import (
    EXPLORED,
    MAX_DRAFT,
    MAX_PAUSE,
    NGRAMS,
    Acceptance,
    PromptLookup,
    SequenceDrafts,
    StepCost,
    StepTimes,
    allot,
)

COST = StepCost(base=5.0, sequence=1.0, token=0.6)


def test_a_draft_is_what_followed_the_last_time() -> None:
    tokens = [1, 2, 3, 4, 5, 9, 1, 2, 3, 7, 8, 9, 1, 2, 3]
    lookup = PromptLookup(tokens)
    assert lookup.draft(4) == [7, 8, 9, 1]
    tokens.append(7)
    assert lookup.draft(2) == [8, 9]
    tokens.append(11)
    assert lookup.draft(2) == []


def test_a_repetition_is_drafted_beyond_its_end() -> None:
    assert PromptLookup([5, 6, 5, 6, 5, 6]).draft(5) == [5, 6, 5, 6, 5]


def test_nothing_is_drafted_for_new_words() -> None:
    assert PromptLookup([]).draft(3) == []
    assert PromptLookup([1]).draft(3) == []
    assert PromptLookup([1, 2, 3, 4]).draft(3) == []


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=10))
def test_the_index_finds_what_a_search_finds(start: list[int], more: list[int]) -> None:
    tokens = list(start)
    lookup = PromptLookup(tokens)
    for token in [*more, None]:
        expected: list[int] = []
        for size in NGRAMS:
            ends = [e for e in range(size, len(tokens)) if tokens[e - size : e] == tokens[len(tokens) - size :]]
            if ends and len(tokens) >= size:
                period = len(tokens) - ends[-1]
                expected = [tokens[ends[-1] + index % period] for index in range(6)]
                break
        assert lookup.draft(6) == expected
        if token is not None:
            tokens.append(token)


def test_likely_drafts_are_long_and_unlikely_ones_short() -> None:
    def one(chance: float) -> int:
        return allot([chance], [MAX_DRAFT], 1, COST)[0]

    assert [one(0.0), one(0.05)] == [0, 0]
    assert one(0.35) in (1, 2)
    assert one(0.98) == MAX_DRAFT
    lengths = [one(step / 20) for step in range(20)]
    assert lengths == sorted(lengths)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4)), min_size=1, max_size=3),
    st.integers(0, 5),
    st.floats(0.1, 3.0),
)
def test_no_other_lengths_make_more_tokens_a_second(
    rows: list[tuple[float, int]], others: int, token_cost: float
) -> None:
    from itertools import product

    cost = StepCost(5.0, 1.0, token_cost)
    chances, limits = [chance for chance, _ in rows], [limit for _, limit in rows]
    count = len(rows) + others

    def rate(lengths: tuple[int, ...]) -> float:
        expected = count + sum(c**n for c, k in zip(chances, lengths, strict=True) for n in range(1, k + 1))
        return expected / cost.of(count, sum(lengths))

    best = max(rate(lengths) for lengths in product(*(range(limit + 1) for limit in limits)))
    assert rate(tuple(allot(chances, limits, count, cost))) == pytest.approx(best)


def test_full_batches_draft_what_is_almost_certain() -> None:
    busy = StepCost(base=5.0, sequence=1.0, token=1.0)
    assert allot([0.5] * 16, [4] * 16, 16, busy) == [0] * 16
    assert allot([0.95] + [0.5] * 15, [4] * 16, 16, busy) == [4] + [0] * 15


def steps_for(tokens: int, right: list[bool] | None) -> float:
    """Time for an answer, in steps without drafts; `right` says whether drafts are, None: they never are."""
    acceptance, spent, generated, tries = Acceptance(), 0.0, 0, iter(right or [])
    while generated < tokens:
        chance = acceptance.chance()
        length = allot([chance], [MAX_DRAFT], 1, COST)[0] if chance else 0
        accepted = 0
        if length:
            if right is not None:
                while accepted < length and next(tries):
                    accepted += 1
            acceptance.record(length, accepted)
        spent += COST.of(1, length)
        generated += 1 + accepted
    return spent / COST.of(1, 0)


@pytest.mark.parametrize("tokens", [16, 32, 64, 128, 256, 1024])
def test_drafts_that_always_miss_cost_less_than_a_twentieth(tokens: int) -> None:
    assert steps_for(tokens, None) <= 1.05 * tokens


def test_drafts_that_hit_pay() -> None:
    assert steps_for(200, [True] * 400) < 200 / 2.5


@pytest.mark.parametrize("chance", [0.05, 0.2, 0.5, 0.8])
def test_drafts_that_hit_sometimes_do_not_cost_more_than_they_gain(chance: float) -> None:
    source = random.Random(1)
    assert steps_for(2000, [source.random() < chance for _ in range(10_000)]) <= 1.05 * 2000


def test_misses_make_pauses_twice_as_long_and_a_hit_ends_them() -> None:
    acceptance = Acceptance()
    pauses = []
    for _ in range(8):
        acceptance.record(1, 0)
        pause = 0
        while not acceptance.chance():
            pause += 1
        pauses.append(pause)
    assert pauses == [2, 4, 8, 16, 32, 64, MAX_PAUSE, MAX_PAUSE]
    assert acceptance.chance() == EXPLORED
    acceptance.record(2, 2)
    assert acceptance.chance() > EXPLORED


def test_texts_are_judged_while_a_model_drafts() -> None:
    """By what the sequence says then, so that a copy is found while the model drafts."""
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]
    drafts = SequenceDrafts(tokens, model=ModelAcceptance(History()))
    assert drafts.propose(4) == (EXPLORED, [3, 4, 5, 6])
    drafts.origin = "model"
    tokens += [3, 4, 5]
    drafts.record(2, 2)
    after_hits = drafts.propose(4)[0]
    assert after_hits > EXPLORED
    drafts.origin = "model"
    tokens += [9, 9]
    drafts.record(1, 0)
    assert drafts.propose(4) == (0.0, [])  # it pauses
    drafts.record(0, 0)
    assert SequenceDrafts(tokens, own_text=False).propose(4) == (0.0, [])


def run_steps(times: StepTimes, cost: StepCost, count: int, source: random.Random) -> None:
    """Steps as an engine has them: few drafts, changing numbers of rows, times a fifth more or less."""
    for _ in range(count):
        rows, drafted = source.randint(1, 4), source.choice([0, 0, 0, 1, 5])
        if drafted:
            times.cost()
        times.record(rows, drafted, cost.of(rows, drafted) * source.uniform(0.8, 1.2))


@pytest.mark.parametrize("token", [0.0003, 0.0006, 0.001])
def test_the_cost_of_steps_is_learned(token: float) -> None:
    times, cost = StepTimes(), StepCost(base=0.005, sequence=0.001, token=token)
    run_steps(times, cost, 200, random.Random(1))
    assert times.cost().of(1, 0) == pytest.approx(cost.of(1, 0), rel=0.1)
    assert times.cost().of(4, 0) == pytest.approx(cost.of(4, 0), rel=0.1)
    assert times.cost().token == pytest.approx(token, rel=0.25)


def test_the_cost_follows_a_machine_that_becomes_slower() -> None:
    times, source = StepTimes(), random.Random(1)
    run_steps(times, StepCost(0.005, 0.001, 0.0006), 200, source)
    run_steps(times, StepCost(0.015, 0.003, 0.0012), 200, source)
    assert times.cost().of(1, 0) == pytest.approx(0.018, rel=0.1)
    assert times.cost().token == pytest.approx(0.0012, rel=0.25)


@pytest.mark.parametrize("first", [1e-5, 5.0])
def test_steps_that_were_held_up_do_not_end_drafts(first: float) -> None:
    times, cost, source = StepTimes(), StepCost(0.005, 0.001, 0.0006), random.Random(1)
    times.record(1, 0, first)
    for _ in range(100):
        run_steps(times, cost, 20, source)
        times.record(1, 1, 5.0)
        assert allot([EXPLORED], [MAX_DRAFT], 1, times.cost()) != [0]
    assert allot([0.95], [MAX_DRAFT], 1, times.cost())[0] > 3


def test_a_lone_sequence_tries_a_token_whatever_it_cost_before() -> None:
    times = StepTimes()
    for _ in range(200):
        times.record(1, 0, 0.005)
        times.record(1, 4, 0.050)
    assert allot([EXPLORED], [MAX_DRAFT], 1, times.cost()) == [1]
    assert allot([0.3], [MAX_DRAFT], 1, times.cost()) == [0]
