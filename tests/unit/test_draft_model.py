"""Drafts by a second model: answers stay what they are, and what does not pay is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_engine import (
    EOS,
    ORIGINAL,
    VOCABULARY,
    Collector,
    Forcing,
    ListDecoder,
    RotatingDecoder,
    expected,
    next_token,
)
from trident_serving.generation.answer import FinishReason, Job
from trident_serving.generation.batch import SlotTokens
from trident_serving.generation.draft_model import (
    FIRST_CHANCE,
    WARM_UP,
    DraftModel,
    History,
    ModelAcceptance,
    allot_rounds,
    best_rate,
)
from trident_serving.generation.drafting import MAX_DRAFT, StepCost
from trident_serving.generation.engine import Engine, EngineSettings
from trident_serving.runtime.metrics import Recorder
from trident_serving.runtime.sampling.params import SamplingParams

FAR = 10**6


def endless(tokens: list[int]) -> int:
    """Of a model whose answers do not end."""
    return 1 + hash(tuple(tokens)) % (VOCABULARY - 1)


def continued(prompt: list[int], max_tokens: int) -> list[int]:
    sequence = list(prompt)
    while len(sequence) < len(prompt) + max_tokens:
        sequence.append(endless(sequence))
    return sequence[len(prompt) :]


class Clock:
    """The time that the engine measures: runs take what a test says, whatever else the machine does."""

    now = 0.0

    def perf_counter(self) -> float:
        return Clock.now


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("engine", "draft_model"):
        monkeypatch.setattr(f"trident_serving.generation.{module}.time", Clock())


@pytest.fixture(autouse=True)
def _fails(caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest) -> Iterator[None]:
    """No draft fails, which would be in the log only, but where a test says so."""
    yield
    said = " ".join(record.getMessage() for record in caplog.get_records("call"))
    assert ("the draft model failed" in said) == ("failing" in request.fixturenames)


@pytest.fixture
def failing() -> None:
    """See `_fails`."""


class Model(ListDecoder):
    """A run takes one unit of time and a tenth for each token.

    Args:
        takes: what a unit is.
        follows: what it says.
    """

    def __init__(self, slots: int, follows: Callable[[list[int]], int] = endless, takes: float = 1.0) -> None:
        super().__init__(slots)
        self.takes = takes
        self.follows = follows

    def following(self, tokens: list[int]) -> int:
        return self.follows(tokens)

    def run(self, items: Sequence[SlotTokens]) -> np.ndarray:
        Clock.now += self.takes * (1 + 0.1 * sum(len(item.tokens) for item in items))
        return super().run(items)


class Draft(Model):
    """A draft that says what the model says, but for one of `wrong` tokens; 1: never."""

    def __init__(
        self, slots: int, wrong: int = 0, follows: Callable[[list[int]], int] = endless, takes: float = 0.1
    ) -> None:
        super().__init__(slots, follows, takes)
        self.wrong = wrong

    def following(self, tokens: list[int]) -> int:
        right = self.follows(tokens)
        return 1 + right % (VOCABULARY - 1) if self.wrong and hash(tuple(tokens)) % self.wrong == 0 else right

    def run(self, items: Sequence[SlotTokens]) -> np.ndarray:
        logits = super().run(items)
        return np.concatenate([logits, np.full((len(logits), 2), 0.5, np.float32)], axis=1)  # rows without a token


def make(slots: int, draft: Draft, *, context: int = FAR, **more: Any) -> Engine:
    options: dict[str, Any] = {"cache_tokens": 10**7, "prefill_chunk": 4, "max_waiting": 100} | more
    recorder = options.pop("recorder", None)
    return Engine(
        Model(slots, draft.follows),
        EngineSettings(slots=slots, **options),
        eos_token_ids=frozenset([EOS]),
        recorder=recorder,
        draft=DraftModel(draft, slots, context, (VOCABULARY, VOCABULARY + 2), options["prefill_chunk"]),
    )


def answer(engine: Engine, prompt: list[int], max_tokens: int, **more: Any) -> Collector:
    consumer = Collector()
    engine.submit(Job(list(prompt), SamplingParams(max_tokens=max_tokens), consumer, **more))
    return consumer


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 3), min_size=1, max_size=40), st.integers(1, 30), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 4),
    st.sampled_from([0, 1, 4]),
    st.sampled_from([FAR, 24]),
    st.integers(70, 200),
)
def test_answers_are_those_without_a_draft(
    requests: list[tuple[list[int], int, bool]], slots: int, wrong: int, context: int, cache_tokens: int
) -> None:
    """Shared beginnings, scarce memory, slots that are used again, and prompts beyond the draft's context."""
    engine = make(
        slots,
        Draft(slots, wrong=wrong, follows=next_token),
        context=context,
        cache_tokens=cache_tokens,
    )
    asked = [answer(engine, prompt, most, prompt_lookup=lookup) for prompt, most, lookup in requests]
    for (prompt, most, _), consumer in zip(requests, asked, strict=True):
        assert consumer.done.wait(10)
        assert consumer.error is None
        assert consumer.tokens == expected(prompt, most)
    engine.stop()


@pytest.mark.parametrize("streams", [1, 4])
def test_a_draft_that_is_right_saves_runs(streams: int) -> None:
    recorder = Recorder()
    engine = make(streams, Draft(streams), recorder=recorder)
    asked = [answer(engine, [20 + index], 60, prompt_lookup=False) for index in range(streams)]
    for index, consumer in enumerate(asked):
        assert consumer.done.wait(10)
        assert consumer.tokens == continued([20 + index], 60)
    engine.stop()
    recorded = recorder.drain()
    assert len(recorded.histograms["batch_size"]) < 60 / 3
    drafted, accepted = (recorded.counters[f"model_draft_tokens{end}"] for end in ("", "_accepted"))
    assert drafted == recorded.counters["draft_tokens"] > 30 * streams
    assert accepted == recorded.counters["draft_tokens_accepted"] > 0.8 * drafted


def test_a_slot_holds_what_a_text_shares_with_it() -> None:
    draft = Draft(3)
    model = DraftModel(draft, 3, FAR, (VOCABULARY, VOCABULARY + 2), 16)
    text = list(range(1, 21))
    model.run([(0, 0, text)], wanted=0)
    assert [model.held(0, text), model.held(0, [*text, 5]), model.held(0, [*text[:7], 50, 51])] == [19, 20, 7]
    model.reuse(1, [*text[:12], 60, 61])
    assert draft.slots[1] == text[:12]
    assert model.held(1, [*text, 5]) == 12
    model.reuse(2, [*text[:7], 60])  # too little
    assert model.held(2, text) == 0
    model.release(0, 5)
    assert model.held(0, text) == 5
    model.copy(0, 2, 9)  # it holds no more than five
    assert draft.slots[2] == text[:5]


def test_what_was_refused_is_overwritten() -> None:
    """One of eight tokens is refused; those behind it are right again, and so they are in a slot's next texts."""
    recorder, draft = Recorder(), Draft(1, wrong=8)
    engine = make(1, draft, recorder=recorder)
    for prompt in ([20, 21], [20, 22], [31]):
        consumer = answer(engine, prompt, 100, prompt_lookup=False)
        assert consumer.done.wait(10)
        assert consumer.tokens == continued(prompt, 100)
    engine.stop()
    assert recorder.drain().counters["model_draft_tokens_accepted"] > 150


@pytest.mark.parametrize(("wrong", "takes"), [(1, 0.1), (0, 1.0)])
def test_a_draft_that_is_wrong_or_slow_is_left(wrong: int, takes: float) -> None:
    """One that is never right, and one that is always right and takes as long as the model."""
    recorder, draft = Recorder(), Draft(1, wrong, takes=takes)
    engine = make(1, draft, recorder=recorder)
    consumer = answer(engine, [20], 300, prompt_lookup=False)
    assert consumer.done.wait(20)
    engine.stop()
    counters = recorder.drain().counters
    assert counters["generated_tokens"] == 300
    assert counters["model_draft_tokens"] < 40
    assert len(draft.runs) < 45


def time_of(engine: Engine, prompts: int, length: int, tokens: int) -> float:
    """Of answers to prompts that are asked in turns, four at once."""
    started = Clock.now
    for first in range(0, prompts, 4):
        consumers = [Collector() for _ in range(4)]
        prompt = [1 + (first + index) % (VOCABULARY - 1) for index in range(length)]
        jobs = [Job(prompt, SamplingParams(max_tokens=tokens), each, prompt_lookup=False) for each in consumers]
        engine.submit(*jobs)
        for each in consumers:
            assert each.done.wait(20)
            assert each.tokens == continued(prompt, tokens)
    engine.stop()
    return Clock.now - started


@pytest.mark.parametrize(("length", "tokens"), [(4, 120), (120, 30), (120, 4)])
@pytest.mark.parametrize("takes", [0.05, 0.3, 0.9])
def test_a_wrong_draft_costs_less_than_a_twentieth(takes: float, length: int, tokens: int) -> None:
    """Also with long prompts and short answers, and whatever a run of it takes."""
    with_draft = make(4, Draft(4, wrong=1, takes=takes), prefill_chunk=64)
    settings = EngineSettings(slots=4, cache_tokens=10**7, prefill_chunk=64, max_waiting=100)
    without = Engine(Model(4), settings, eos_token_ids=frozenset([EOS]))
    assert time_of(with_draft, 16, length, tokens) <= 1.05 * time_of(without, 16, length, tokens)


@pytest.mark.parametrize(("length", "tokens"), [(120, 30), (120, 4)])
def test_long_prompts_with_short_answers_are_no_slower(length: int, tokens: int) -> None:
    """With a draft that is right, whose run over the prompt takes as long as that of the model, a third or a tenth."""
    settings = EngineSettings(slots=4, cache_tokens=10**7, prefill_chunk=64, max_waiting=100)
    for takes in (0.1, 0.3, 1.0):
        with_draft = make(4, Draft(4, takes=takes), prefill_chunk=64)
        without = Engine(Model(4), settings, eos_token_ids=frozenset([EOS]))
        assert time_of(with_draft, 16, length, tokens) <= 1.05 * time_of(without, 16, length, tokens)


def test_a_draft_that_becomes_right_is_found_again() -> None:
    recorder, draft = Recorder(), Draft(1, wrong=1)
    engine = make(1, draft, recorder=recorder)
    assert answer(engine, [20], 200, prompt_lookup=False).done.wait(20)
    draft.wrong = 0
    recorder.drain()
    assert answer(engine, [21], 2000, prompt_lookup=False).done.wait(20)
    engine.stop()
    assert recorder.drain().counters["model_draft_tokens_accepted"] > 1000


def test_a_long_prompt_is_not_run_for_a_short_answer() -> None:
    """By the draft: it would take longer than all that it saves."""
    draft = Draft(1, takes=0.5)
    engine = make(1, draft, prefill_chunk=64)
    prompt = list(range(1, VOCABULARY)) * 20
    for _ in range(3):
        assert answer(engine, [5, 6], 30, prompt_lookup=False).done.wait(10)
    draft.runs.clear()
    consumer = answer(engine, prompt, 8, prompt_lookup=False)
    assert consumer.done.wait(30)
    assert consumer.tokens == continued(prompt, 8)
    assert sum(draft.runs) == 0
    engine.stop()


def test_answers_of_one_prompt_share_what_the_draft_ran() -> None:
    draft, prompt = Draft(3), list(range(1, 60))
    engine = make(3, draft, prefill_chunk=64)
    consumers = [Collector() for _ in range(3)]
    params = SamplingParams(max_tokens=30)
    engine.submit(*(Job(list(prompt), params, consumer, prompt_lookup=False) for consumer in consumers))
    for consumer in consumers:
        assert consumer.done.wait(10)
        assert consumer.tokens == continued(prompt, 30)
    assert sum(run for run in draft.runs if run > 20) < 2 * len(prompt)
    engine.stop()


@settings(deadline=None, max_examples=15)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 2), min_size=8, max_size=24), st.integers(1, 14)), min_size=1, max_size=9
    ),
    st.integers(1, 3),
)
def test_no_draft_goes_beyond_the_original_context(requests: list[tuple[list[int], int]], slots: int) -> None:
    """Of a model with two rotations; `RotatingDecoder` sees to it that each token has the right one."""

    class Timed(RotatingDecoder):
        def run(self, items: Sequence[SlotTokens]) -> np.ndarray:
            Clock.now += 1.0
            return super().run(items)

    decoder = Timed(slots)
    engine = Engine(
        decoder,
        EngineSettings(slots, cache_tokens=FAR, prefill_chunk=4, max_waiting=100, original_context=ORIGINAL),
        eos_token_ids=frozenset([EOS]),
        draft=DraftModel(Draft(slots, follows=decoder.following), slots, FAR, (VOCABULARY, VOCABULARY + 2), 4),
    )
    asked = [answer(engine, prompt, most, prompt_lookup=False) for prompt, most in requests]
    for (prompt, most), consumer in zip(requests, asked, strict=True):
        assert consumer.done.wait(10)
        assert consumer.error is None
        text = list(prompt)
        for token in consumer.tokens:
            assert token == decoder.following([each + VOCABULARY * (len(text) > ORIGINAL) for each in text])
            text.append(token)
        assert len(consumer.tokens) == most
    engine.stop()


def test_a_cancelled_answer_leaves_its_slot_to_the_next() -> None:
    engine = make(1, Draft(1))
    endless = answer(engine, [5, 6, 7], FAR, prompt_lookup=False)
    later = answer(engine, [5, 6, 8], 40, prompt_lookup=False)
    while len(endless.tokens) < 20:
        time.sleep(0.001)
    endless.cancelled = True
    assert later.done.wait(10)
    assert endless.reason is FinishReason.CANCELLED
    assert later.tokens == continued([5, 6, 8], 40)
    engine.stop()


@pytest.mark.usefixtures("failing")
def test_a_draft_that_fails_ends_no_answer() -> None:
    draft = Draft(2)
    engine = make(2, draft)
    draft.fail_on = 21
    first, second = (answer(engine, [20, last], 40, prompt_lookup=False) for last in (21, 22))
    for consumer in (first, second):
        assert consumer.done.wait(10)
        assert consumer.error is None
    assert [first.tokens, second.tokens] == [continued([20, last], 40) for last in (21, 22)]
    engine.stop()


def test_tokens_that_the_draft_does_not_have_are_verified() -> None:
    """A caller may bias the answer to a row of the model that stands for no token."""

    class Narrow(Draft):
        def run(self, items: Sequence[SlotTokens]) -> np.ndarray:
            return super().run(items)[:, :50]

    draft = Narrow(1)
    model = DraftModel(draft, 1, FAR, (VOCABULARY, 50), 4)  # the draft has half of the tokens
    engine = Engine(
        Model(1),
        EngineSettings(slots=1, cache_tokens=FAR, prefill_chunk=4, max_waiting=9),
        eos_token_ids=frozenset([EOS]),
        draft=model,
    )
    consumer = answer(engine, [90, 91], 40, prompt_lookup=False)
    assert consumer.done.wait(10)
    assert consumer.tokens == continued([90, 91], 40)
    assert max(token for slot in draft.slots for token in slot) < 50
    engine.stop()


def test_the_draft_knows_penalties_and_least_lengths() -> None:
    """It takes of its logits what the answer would: not the end, and no token twice."""
    recorder, draft = Recorder(), Draft(1)
    engine = make(1, draft, recorder=recorder)
    consumer = Collector()
    sampling = SamplingParams(max_tokens=60, min_tokens=60, repetition_penalty=2.0, logit_bias=((EOS, 5.0), (7, 0.6)))
    engine.submit(Job([20], sampling, consumer, prompt_lookup=False))
    assert consumer.done.wait(10)
    engine.stop()
    assert EOS not in consumer.tokens
    assert 7 in consumer.tokens
    counters = recorder.drain().counters
    assert counters["model_draft_tokens_accepted"] == counters["model_draft_tokens"] > 40


def test_sampled_answers_are_not_drafted() -> None:
    recorder = Recorder()
    engine = make(1, Draft(1), recorder=recorder)
    consumer = Collector()
    engine.submit(Job([5], SamplingParams(max_tokens=30, temperature=1.0, seed=1), consumer))
    assert consumer.done.wait(10)
    engine.stop()
    assert recorder.drain().counters["draft_tokens"] == 0


def test_what_a_grammar_forces_is_not_drafted() -> None:
    recorder, draft = Recorder(), Draft(1)
    engine = make(1, draft, recorder=recorder)
    consumer = answer(engine, [1, 2, 3], 12, guide=Forcing())
    assert consumer.done.wait(10)
    assert consumer.tokens == continued([1, 2, 3], 12)
    engine.stop()
    assert recorder.drain().counters["model_draft_tokens"] <= 1  # the last token has room for no draft
    assert sum(draft.runs[WARM_UP:]) <= 14


def test_a_grammar_cuts_drafts() -> None:
    """Tokens above 60 are not allowed: the model is kept from them, and drafts end before them."""

    class Below(Forcing):
        def forced(self, limit: int) -> list[int]:
            return []

        def fits(self, tokens: Sequence[int]) -> list[int]:
            ends = [index for index, token in enumerate(tokens) if token > 60]
            return list(tokens[: ends[0]] if ends else tokens)

        def masks(self, tokens: Sequence[int]) -> np.ndarray:
            return np.tile(np.arange(VOCABULARY) <= 60, (1 + len(tokens), 1))

    answers = []
    for draft in (Draft(1), Draft(1, wrong=1)):
        recorder = Recorder()
        engine = make(1, draft, recorder=recorder)
        consumer = answer(engine, [1, 2, 3], 60, guide=Below(), ignore_eos=True)
        assert consumer.done.wait(10)
        engine.stop()
        assert consumer.error is None
        assert max(consumer.tokens) <= 60
        answers.append(consumer.tokens)
        assert recorder.drain().counters["model_draft_tokens"] > 0
    assert answers[0] == answers[1]


COST, DRAFT = StepCost(base=5.0, sequence=1.0, token=0.3), StepCost(base=0.5, sequence=0.1, token=0.05)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3)), min_size=1, max_size=3),
    st.integers(0, 5),
    st.floats(0.1, 4.0),
)
def test_lengths_are_nearly_the_best_there_are(rows: list[tuple[float, int]], others: int, draft_cost: float) -> None:
    """Rounds are added one after the other, so a tenth may be lost, and it never is worse than without drafts."""
    chances, limits = [chance for chance, _ in rows], [limit for _, limit in rows]
    count, draft = len(rows) + others, StepCost(draft_cost, 0.1 * draft_cost, 0.0)

    def rate(lengths: Sequence[int]) -> float:
        expected_tokens = count + sum(c**n for c, k in zip(chances, lengths, strict=True) for n in range(1, k + 1))
        rounds = [sum(length >= number for length in lengths) for number in range(1, max(lengths) + 1)]
        return expected_tokens / (COST.of(count, sum(lengths)) + sum(draft.of(each, 0) for each in rounds))

    found = rate(allot_rounds(chances, limits, (count, COST.of(count, 0)), COST.token, draft))
    assert found >= rate([0] * len(rows))
    assert found >= 0.9 * max(rate(lengths) for lengths in product(*(range(limit + 1) for limit in limits)))


def test_a_good_draft_is_long_and_a_bad_or_dear_one_is_none() -> None:
    def one(chance: float, draft: StepCost = DRAFT) -> int:
        return allot_rounds([chance], [MAX_DRAFT], (1, COST.of(1, 0)), COST.token, draft)[0]

    assert one(0.05) == 0
    assert one(0.97) >= 8
    assert [one(step / 20) for step in range(20)] == sorted(one(step / 20) for step in range(20))
    assert one(0.97, StepCost(6.0, 0.0, 0.0)) == 0
    assert best_rate(0.0, MAX_DRAFT, 5.0, 1.0) == 0.2
    assert best_rate(1.0, 4, 5.0, 1.0) == pytest.approx(5 / 9)


def test_a_sequence_begins_with_what_the_others_found() -> None:
    history = History()
    first = ModelAcceptance(history)
    assert first.chance() == FIRST_CHANCE
    for _ in range(200):
        first.record(4, 0)
    assert first.chance() < 0.01
    second = ModelAcceptance(history)
    assert second.chance() < 0.2
    other = ModelAcceptance(history)
    for _ in range(400):
        other.record(4, 4)
    assert ModelAcceptance(history).chance() > 0.9
    for _ in range(200):
        second.rest()
    assert second.chance() > 0.9


def test_what_an_answer_has_still_is_guessed_from_the_others() -> None:
    history = History()
    for _ in range(100):
        ModelAcceptance(history).ended(200)
    acceptance = ModelAcceptance(history)
    assert acceptance.left(0, 1000) == pytest.approx(200, abs=1)
    assert acceptance.left(50, 1000) == pytest.approx(150, abs=1)
    assert acceptance.left(400, 1000) == 400
    assert acceptance.left(0, 30) == 30
