"""Drafts from other answers: what the pool finds, what it forgets, and what it costs where it is wrong."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trident_serving.generation.drafting import MAX_DRAFT, SequenceDrafts, StepCost, allot
from trident_serving.generation.ngram_pool import SIZE, TOKENS, NgramPool

COST = StepCost(base=5.0, sequence=1.0, token=0.6)
PROMPT = list(range(1, 21))
ANSWER = list(range(101, 121))


class HostilePool(NgramPool):
    """A pool that always proposes what no model says."""

    def draft(self, tokens: object, length: int) -> list[int]:
        return [99_999] * length


def test_an_answer_is_found_from_the_end_of_its_prompt_on() -> None:
    pool = NgramPool()
    assert pool.draft(PROMPT, 5) == []
    pool.add(PROMPT + ANSWER, len(PROMPT))
    assert pool.draft(PROMPT, 5) == ANSWER[:5]
    assert pool.draft([7, 7, *PROMPT[-SIZE + 1 :], ANSWER[0]], 50) == ANSWER[1:]
    assert pool.draft(PROMPT[:-1], 5) == []  # the prompt itself is not kept
    assert pool.draft(PROMPT[-SIZE + 1 :], 5) == []
    assert pool.draft(PROMPT + ANSWER, 5) == []  # nothing follows


def test_the_latest_answer_wins_and_empty_ones_are_not_kept() -> None:
    pool = NgramPool()
    pool.add(PROMPT + ANSWER, len(PROMPT))
    pool.add(PROMPT, len(PROMPT))
    assert pool.draft(PROMPT, 1) == [101]
    pool.add([*PROMPT, 55, 56], len(PROMPT))
    assert pool.draft(PROMPT, 5) == [55, 56]
    assert pool.draft(PROMPT[1:] + ANSWER[:1], 2) == [102, 103]


def test_old_answers_are_overwritten_and_memory_stays() -> None:
    pool = NgramPool(64)
    held = len(pool._ring), len(pool._ends)
    pool.add(PROMPT + ANSWER, len(PROMPT))
    pool.add([*range(201, 260)], 10)
    assert pool.draft(PROMPT, 5) == []
    assert pool.draft([*range(203, 259)], 3) == [259]  # the latest n-gram, whose entry no other took
    pool.add([*range(1000, 2000)], 1)  # longer than the ring
    assert pool.draft([*range(1900, 1930)], 100) == []
    assert pool.draft([*range(1900, 1999)], 100) == [1999]
    assert held == (len(pool._ring), len(pool._ends))
    assert TOKENS * 20 < 3 * 2**20


@given(
    st.integers(SIZE + 2, 80),
    st.lists(st.tuples(st.lists(st.integers(0, 1), max_size=40), st.integers(0, 12)), max_size=8),
    st.lists(st.integers(0, 1), max_size=20),
)
def test_a_proposal_followed_the_latest_tokens_in_an_answer(
    capacity: int, answers: list[tuple[list[int], int]], tokens: list[int]
) -> None:
    pool = NgramPool(capacity)
    for answer, prompt_length in answers:
        pool.add(answer, min(prompt_length, len(answer)))
    found = pool.draft(tokens, 6)
    whole = [*tokens[-SIZE:], *found]
    assert not found or any(
        answer[start : start + len(whole)] == whole for answer, _ in answers for start in range(len(answer))
    )


def cost_of(answer: list[int], pool: NgramPool | None) -> float:
    """Time for an answer behind PROMPT, in steps without drafts."""
    tokens = list(PROMPT)
    drafts = SequenceDrafts(tokens, pool)
    spent = 0.0
    while answer:
        chance, proposed = drafts.propose(min(MAX_DRAFT, len(answer) - 1))
        draft = proposed[: allot([chance], [len(proposed)], 1, COST)[0]]
        accepted = next((n for n, token in enumerate(draft) if token != answer[n]), len(draft))
        if draft:
            drafts.record(len(draft), accepted)
        tokens += answer[: accepted + 1]
        answer = answer[accepted + 1 :]
        spent += COST.of(1, len(draft))
    return spent / COST.of(1, 0)


@given(st.integers(1, 300))
def test_a_pool_that_is_always_wrong_costs_less_than_a_twentieth(length: int) -> None:
    assert cost_of(list(range(1000, 1000 + length)), HostilePool()) <= 1.05 * length + 0.2


def test_a_wrong_pool_does_not_silence_the_own_text() -> None:
    repeated = [1, 2, 3, 4, 5, 6, 7, 8] * 12
    assert cost_of(repeated, HostilePool()) <= cost_of(repeated, None) + 1
    assert cost_of(repeated, None) < len(repeated) / 2


def test_a_bad_own_text_does_not_silence_the_pool() -> None:
    answer = [token for number in range(60) for token in (1, 2, 100 + number)]  # 1, 2 is never followed by the same
    pool = NgramPool()
    assert cost_of(answer, pool) > 0.95 * len(answer)
    pool.add(PROMPT + answer, len(PROMPT))
    assert cost_of(answer, pool) < len(answer) / 3
