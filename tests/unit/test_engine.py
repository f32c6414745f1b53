"""The engine on a decoder of ten lines: the next token is a function of the whole sequence in its cache."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trident_serving.errors import BrokenModel, DeadlineExceeded, Overloaded
from trident_serving.generation.answer import FinishReason, Job
from trident_serving.generation.batch import SlotTokens
from trident_serving.generation.engine import Engine, EngineSettings
from trident_serving.generation.ngram_pool import SIZE
from trident_serving.generation.scheduler import Scheduler
from trident_serving.runtime.log_probabilities import TokenLogProbs
from trident_serving.runtime.metrics import Recorder
from trident_serving.runtime.sampling.params import SamplingParams

VOCABULARY = 97
EOS = 0


def next_token(sequence: list[int]) -> int:
    """EOS only for sequences that end in 13."""
    return EOS if sequence[-1] == 13 else 1 + hash(tuple(sequence)) % (VOCABULARY - 1)


def expected(prompt: list[int], max_tokens: int) -> list[int]:
    sequence = list(prompt)
    while len(sequence) < len(prompt) + max_tokens and (len(sequence) == len(prompt) or sequence[-1] != EOS):
        sequence.append(next_token(sequence))
    return sequence[len(prompt) :]


class ListDecoder:
    """A `Decoder` whose cache is a list of tokens for each slot; positions that were released hold what is no token."""

    can_copy = True

    def __init__(self, slots: int, seconds: float = 0.0) -> None:
        self.slots: list[list[int]] = [[] for _ in range(slots)]
        self.seconds = seconds
        self.batches: list[int] = []
        self.runs: list[int] = []  # tokens of each
        self.fail_on: int | None = None
        self.nan_on: int | None = None

    def following(self, tokens: list[int]) -> int:
        return next_token(tokens)

    def run(self, items: Sequence[SlotTokens]) -> np.ndarray:
        time.sleep(self.seconds)
        if self.fail_on is not None and any(self.fail_on in item.tokens for item in items):
            raise RuntimeError("the model failed")
        self.batches.append(len(items))
        self.runs.append(sum(len(item.tokens) for item in items))
        logits = []
        for item in items:
            held = self.slots[item.slot]
            assert len(held) >= item.start
            assert -1 not in held[: item.start]
            held[item.start :] = item.tokens
            for end in range(len(held) - item.wanted + 1, len(held) + 1):
                one = np.zeros(VOCABULARY, np.float32)
                one[self.following(held[:end])] = 1.0
                if self.nan_on is not None and self.nan_on in held[:end]:
                    one[3] = np.nan
                logits.append(one)
        return np.array(logits, np.float32).reshape(len(logits), VOCABULARY)

    def copy(self, source: int, target: int, length: int) -> None:
        self.slots[target] = self.slots[source][:length]

    def release(self, slot: int, start: int) -> None:
        self.slots[slot][start:] = [-1] * len(self.slots[slot][start:])


class StatesDecoder(ListDecoder):
    """A `Decoder` whose slots can't be cut back."""

    def run(self, items: Sequence[SlotTokens]) -> np.ndarray:
        for item in items:
            if item.start == 0:
                self.slots[item.slot] = []
            assert item.start == len(self.slots[item.slot])
        return super().run(items)

    def copy(self, source: int, target: int, length: int) -> None:
        assert length == len(self.slots[source])
        super().copy(source, target, length)

    def release(self, slot: int, start: int) -> None:
        assert start in (0, len(self.slots[slot]))
        self.slots[slot] = self.slots[slot][:start]


ORIGINAL = 18


class RotatingDecoder(ListDecoder):
    """A `Decoder` of a model with two rotations: what a slot holds of both gives another token, of 1 and 2."""

    def following(self, tokens: list[int]) -> int:
        return 1 + hash(tuple(tokens)) % 2

    def run(self, items: Sequence[SlotTokens]) -> np.ndarray:
        assert all(item.rotation or item.start + len(item.tokens) <= ORIGINAL for item in items)
        rotated = [
            replace(item, tokens=[token + VOCABULARY * item.rotation for token in item.tokens]) for item in items
        ]
        return super().run(rotated)


class AdaptedDecoder(ListDecoder):
    """A `Decoder` of a model with adapters: each makes keys of its own, and those of a slot decide the next token."""

    def following(self, tokens: list[int]) -> int:
        return 1 + hash(tuple(tokens)) % 2

    def run(self, items: Sequence[SlotTokens]) -> np.ndarray:
        return super().run(
            [replace(item, tokens=[token + VOCABULARY * item.adapter for token in item.tokens]) for item in items]
        )


class Collector:
    """A `Consumer` that keeps its tokens."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.tokens: list[int] = []
        self.reason: FinishReason | None = None
        self.error: Exception | None = None
        self.cancelled = False
        self.done = threading.Event()
        self._stop_after = stop_after

    def accept(self, token: int, log_probs: TokenLogProbs | None) -> bool:
        self.tokens.append(token)
        return len(self.tokens) == self._stop_after

    def finish(self, reason: FinishReason) -> None:
        assert not self.done.is_set()
        self.reason = reason
        self.done.set()

    def fail(self, error: Exception) -> None:
        assert not self.done.is_set()
        self.error = error
        self.done.set()


def make(decoder: ListDecoder, **more: Any) -> Engine:
    options: dict[str, Any] = {"cache_tokens": 10**7, "prefill_chunk": 4, "max_waiting": 100} | more
    recorder = options.pop("recorder", None)
    settings = EngineSettings(slots=len(decoder.slots), **options)
    return Engine(decoder, settings, eos_token_ids=frozenset([EOS]), recorder=recorder)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=12), st.integers(1, 12)),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 4),
    st.integers(24, 80),
)
def test_answers_do_not_depend_on_the_batch(
    requests: list[tuple[list[int], int]], slots: int, cache_tokens: int
) -> None:
    """With reuse of prefixes, drafts and scarce memory."""
    engine = make(ListDecoder(slots), cache_tokens=cache_tokens)
    consumers = [Collector() for _ in requests]
    for (prompt, max_tokens), consumer in zip(requests, consumers, strict=True):
        engine.submit(Job(prompt, SamplingParams(max_tokens=max_tokens), consumer))
    for (prompt, max_tokens), consumer in zip(requests, consumers, strict=True):
        assert consumer.done.wait(10)
        assert consumer.tokens == expected(prompt, max_tokens)
        ends = consumer.tokens[-1] == EOS
        assert consumer.reason is (FinishReason.STOP if ends else FinishReason.LENGTH)
    engine.stop()


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 2), min_size=8, max_size=24), st.integers(1, 12), st.integers(0, 3)),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 4),
)
def test_states_are_never_cut_back(requests: list[tuple[list[int], int, int]], slots: int) -> None:
    """Prompts of two words share beginnings; some go on where the answer before them is."""
    engine = make(StatesDecoder(slots), whole_prefixes=True, prompt_lookup=False)
    consumers: list[tuple[list[int], int, Collector]] = []
    for prompt, max_tokens, follow in requests:
        if follow > len(consumers) or not follow:
            consumers.append((prompt, max_tokens, Collector()))
        else:
            before, _, consumer = consumers[-follow]
            assert consumer.done.wait(10)
            consumers.append(([*before, *consumer.tokens, *prompt], max_tokens, Collector()))
        text, _, latest = consumers[-1]
        engine.submit(Job(list(text), SamplingParams(max_tokens=max_tokens), latest))
    for text, max_tokens, consumer in consumers:
        assert consumer.done.wait(10)
        assert consumer.error is None
        assert consumer.tokens == expected(text, max_tokens)
    engine.stop()


def test_a_conversation_goes_on_from_its_state() -> None:
    decoder = StatesDecoder(2)
    engine = make(decoder, whole_prefixes=True, prompt_lookup=False)
    first, second = Collector(), Collector()
    prompt = list(range(20, 40))
    engine.submit(Job(list(prompt), SamplingParams(max_tokens=5, min_tokens=5), first))
    assert first.done.wait(10)
    decoder.runs.clear()
    engine.submit(Job([*prompt, *first.tokens, 7], SamplingParams(max_tokens=1), second))
    assert second.done.wait(10)
    assert decoder.runs == [2]  # the last token of the answer, and the new one
    engine.stop()


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 2), min_size=8, max_size=24), st.integers(1, 12)), min_size=1, max_size=9
    ),
    st.integers(1, 4),
)
def test_a_text_beyond_the_original_context_has_one_rotation(requests: list[tuple[list[int], int]], slots: int) -> None:
    """With reuse of prefixes and drafts: the longest texts are of 36 tokens, and some grow beyond 18. No draft does."""
    decoder = RotatingDecoder(slots)
    engine = make(decoder, original_context=ORIGINAL)
    consumers = [Collector() for _ in requests]
    for (prompt, max_tokens), consumer in zip(requests, consumers, strict=True):
        engine.submit(Job(list(prompt), SamplingParams(max_tokens=max_tokens), consumer))
    for (prompt, max_tokens), consumer in zip(requests, consumers, strict=True):
        assert consumer.done.wait(10)
        assert consumer.error is None
        text = list(prompt)
        for token in consumer.tokens:
            assert token == decoder.following([each + VOCABULARY * (len(text) > ORIGINAL) for each in text])
            text.append(token)
        assert len(consumer.tokens) == max_tokens
    engine.stop()


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 2), min_size=1, max_size=20), st.integers(1, 12), st.integers(0, 2)),
        min_size=1,
        max_size=9,
    ),
    st.integers(1, 4),
)
def test_each_request_has_its_own_adapter(requests: list[tuple[list[int], int, int]], slots: int) -> None:
    """With reuse of prefixes, drafts from its own text and from answers of other adapters."""
    decoder = AdaptedDecoder(slots)
    engine = make(decoder)
    consumers = [Collector() for _ in requests]
    for (prompt, max_tokens, adapter), consumer in zip(requests, consumers, strict=True):
        engine.submit(Job(list(prompt), SamplingParams(max_tokens=max_tokens), consumer, adapter=adapter))
    for (prompt, max_tokens, adapter), consumer in zip(requests, consumers, strict=True):
        assert consumer.done.wait(10)
        assert consumer.error is None
        text = list(prompt)
        for token in consumer.tokens:
            assert token == decoder.following([each + VOCABULARY * adapter for each in text])
            text.append(token)
        assert len(consumer.tokens) == max_tokens
    engine.stop()


def test_requests_are_batched() -> None:
    decoder = ListDecoder(4, seconds=0.002)
    engine = make(decoder)
    consumers = [Collector() for _ in range(4)]
    for row, consumer in enumerate(consumers):
        engine.submit(Job([row + 20], SamplingParams(max_tokens=30, min_tokens=30), consumer))
    assert all(consumer.done.wait(10) for consumer in consumers)
    assert max(decoder.batches) == 4
    engine.stop()


def test_a_consumer_can_stop_and_cancel() -> None:
    engine = make(ListDecoder(1, seconds=0.001))
    stopping, endless, later = Collector(stop_after=2), Collector(), Collector()
    engine.submit(Job([5], SamplingParams(max_tokens=50, min_tokens=50), stopping))
    assert stopping.done.wait(10)
    assert (len(stopping.tokens), stopping.reason) == (2, FinishReason.STOP)
    engine.submit(Job([5], SamplingParams(max_tokens=10**6, min_tokens=10**6), endless))
    engine.submit(Job([6], SamplingParams(max_tokens=3), later))
    time.sleep(0.05)
    assert not later.done.is_set()
    endless.cancelled = True
    assert endless.done.wait(10)
    assert endless.reason is FinishReason.CANCELLED
    assert later.done.wait(10)
    assert later.tokens == expected([6], 3)
    engine.stop()


def test_cancelled_while_waiting() -> None:
    decoder = ListDecoder(1, seconds=0.001)
    engine = make(decoder)
    running, waiting = Collector(), Collector()
    engine.submit(Job([5], SamplingParams(max_tokens=200, min_tokens=200), running))
    waiting.cancelled = True
    engine.submit(Job([6], SamplingParams(max_tokens=3), waiting))
    assert waiting.done.wait(10)
    assert (waiting.tokens, waiting.reason) == ([], FinishReason.CANCELLED)
    assert running.done.wait(10)
    engine.stop()


def test_a_failing_prompt_fails_alone() -> None:
    decoder = ListDecoder(2, seconds=0.001)
    decoder.fail_on = 42
    engine = make(decoder)
    good, bad, after = Collector(), Collector(), Collector()
    engine.submit(Job([5, 6], SamplingParams(max_tokens=5), good))
    engine.submit(Job([7, 42, 8], SamplingParams(max_tokens=5), bad))
    engine.submit(Job([9], SamplingParams(max_tokens=5), after))
    for consumer in (good, bad, after):
        assert consumer.done.wait(10)
    assert str(bad.error) == "the model failed"
    assert good.tokens == expected([5, 6], 5)
    assert after.tokens == expected([9], 5)
    engine.stop()


def test_a_failing_consumer_fails_alone() -> None:
    class Broken(Collector):
        def accept(self, token: int, log_probs: TokenLogProbs | None) -> bool:
            raise RuntimeError("no text for this token")

    engine = make(ListDecoder(2, seconds=0.001))
    good, bad = Collector(), Broken()
    engine.submit(Job([5, 6], SamplingParams(max_tokens=20, min_tokens=20), good))
    engine.submit(Job([7], SamplingParams(max_tokens=5), bad))
    assert bad.done.wait(10)
    assert good.done.wait(10)
    assert str(bad.error) == "no text for this token"
    assert len(good.tokens) == 20
    engine.stop()


def test_a_consumer_that_can_not_finish_fails_alone() -> None:
    class Broken(Collector):
        def finish(self, reason: FinishReason) -> None:
            raise RuntimeError("no end for this text")

    engine = make(ListDecoder(2, seconds=0.001))
    good, bad = Collector(), Broken()
    engine.submit(Job([5, 6], SamplingParams(max_tokens=20, min_tokens=20), good))
    engine.submit(Job([7], SamplingParams(max_tokens=3), bad))
    assert bad.done.wait(10)
    assert good.done.wait(10)
    assert str(bad.error) == "no end for this text"
    assert (len(good.tokens), good.error) == (20, None)
    engine.stop()


def test_a_full_queue_and_a_stopping_engine_refuse() -> None:
    engine = make(ListDecoder(1, seconds=0.01), max_waiting=1)
    consumers = [Collector() for _ in range(3)]
    engine.submit(Job([5], SamplingParams(max_tokens=1000, min_tokens=1000), consumers[0]))
    time.sleep(0.05)
    engine.submit(Job([5], SamplingParams(max_tokens=3), consumers[1]))
    with pytest.raises(Overloaded, match="the queue is full: 1 of 1 requests wait while 1 run"):
        engine.submit(Job([5], SamplingParams(max_tokens=3), consumers[2]))
    engine.stop()
    assert isinstance(consumers[0].error, Overloaded)
    assert isinstance(consumers[1].error, Overloaded)
    with pytest.raises(Overloaded, match="unloaded"):
        engine.submit(Job([5], SamplingParams(max_tokens=3), consumers[2]))


def test_log_probabilities_on_request() -> None:
    class WithLogProbs(Collector):
        def __init__(self) -> None:
            super().__init__()
            self.log_probs: list[TokenLogProbs | None] = []

        def accept(self, token: int, log_probs: TokenLogProbs | None) -> bool:
            self.log_probs.append(log_probs)
            return super().accept(token, log_probs)

    engine = make(ListDecoder(1))
    asked, not_asked = WithLogProbs(), WithLogProbs()
    params = SamplingParams(max_tokens=2, min_tokens=2)
    engine.submit(Job([5], params, asked, log_probs=True, top_log_probs=2))
    engine.submit(Job([5], params, not_asked))
    assert asked.done.wait(10)
    assert not_asked.done.wait(10)
    certain = 1.0 - np.log(np.e + VOCABULARY - 1)  # logit 1 among zeros
    for token, found in zip(asked.tokens, asked.log_probs, strict=True):
        assert found is not None
        assert found.chosen == pytest.approx(certain)
        assert found.top[0] == (token, pytest.approx(certain))
        assert found.top[1][1] == pytest.approx(certain - 1.0)
    assert not_asked.log_probs == [None, None]
    engine.stop()


def test_broken_logits_fail_alone_and_are_not_reused() -> None:
    decoder = ListDecoder(2, seconds=0.001)
    decoder.nan_on = 42
    engine = make(decoder)
    good, bad, again = Collector(), Collector(), Collector()
    engine.submit(Job([5, 6], SamplingParams(max_tokens=20, min_tokens=20), good))
    engine.submit(Job([*range(60, 80), 42], SamplingParams(max_tokens=5), bad))
    assert bad.done.wait(10)
    assert isinstance(bad.error, BrokenModel)
    decoder.nan_on = None
    recorder = engine._recorder
    recorder.drain()
    engine.submit(Job([*range(60, 80), 43], SamplingParams(max_tokens=5), again))
    assert good.done.wait(10)
    assert again.done.wait(10)
    assert len(good.tokens) == 20
    assert again.tokens == expected([*range(60, 80), 43], 5)
    assert recorder.drain().counters["prefix_hit_tokens"] == 0
    engine.stop()


def test_an_error_of_the_loop_fails_what_it_holds_and_the_loop_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    engine = make(ListDecoder(2, seconds=0.001), recorder=recorder)
    held, later = Collector(), Collector()
    engine.submit(Job([5], SamplingParams(max_tokens=10**6, min_tokens=10**6), held))
    while not held.tokens:
        time.sleep(0.001)

    def broken(self: Scheduler[Any]) -> None:
        monkeypatch.undo()
        raise RuntimeError("the scheduler failed")

    monkeypatch.setattr(Scheduler, "schedule", broken)
    assert held.done.wait(10)
    assert str(held.error) == "the scheduler failed"
    engine.submit(Job([6], SamplingParams(max_tokens=3), later))
    assert later.done.wait(10)
    assert later.tokens == expected([6], 3)
    assert recorder.drain().counters["loop_restarts"] == 1
    engine.stop()


def test_timeouts_while_running_and_while_waiting() -> None:
    engine = make(ListDecoder(1, seconds=0.002))
    running, waiting, later = Collector(), Collector(), Collector()
    params = SamplingParams(max_tokens=10**6, min_tokens=10**6)
    engine.submit(Job([5], params, running, seconds=0.2))
    engine.submit(Job([6], params, waiting, seconds=0.05))
    engine.submit(Job([7], SamplingParams(max_tokens=3), later, seconds=60))
    assert waiting.done.wait(10)
    assert not running.done.is_set()
    assert isinstance(waiting.error, DeadlineExceeded)
    assert "0.05 s was over while it waited" in str(waiting.error)
    assert running.done.wait(10)
    assert f"0.2 s was over after {len(running.tokens)} tokens" in str(running.error)
    assert later.done.wait(10)
    assert later.tokens == expected([7], 3)
    engine.stop()


def test_a_shared_beginning_is_run_once() -> None:
    decoder, recorder = ListDecoder(3), Recorder()
    engine = make(decoder, recorder=recorder, prefill_chunk=64)
    system = list(range(20, 60))
    for last in range(5):
        consumer = Collector()
        engine.submit(Job([*system, 70 + last], SamplingParams(max_tokens=3), consumer, prompt_lookup=False))
        assert consumer.done.wait(10)
        assert consumer.tokens == expected([*system, 70 + last], 3)
    counters = recorder.drain().counters
    assert counters["prompt_tokens"] == 5 * 41
    assert counters["prefix_hit_tokens"] == 4 * 40
    assert [run for run in decoder.runs if run > 1] == [41]  # the other prompts ran one token each
    engine.stop()


def repeating(sequence: list[int]) -> int:
    """A model that copies: the token that followed the last pair, else 1 more."""
    for end in range(len(sequence) - 1, 1, -1):
        if sequence[end - 2 : end] == sequence[-2:]:
            return sequence[end]
    return sequence[-1] % (VOCABULARY - 1) + 1


def test_drafts_save_runs_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.unit.test_engine.next_token", repeating)
    prompt = [*range(10, 40), 10, 11]
    answers, runs = [], []
    for lookup in (False, True):
        decoder, consumer = ListDecoder(1), Collector()
        engine = make(decoder)
        engine.submit(Job(prompt, SamplingParams(max_tokens=25), consumer, prompt_lookup=lookup))
        assert consumer.done.wait(10)
        answers.append(consumer.tokens)
        runs.append(len(decoder.runs))
        engine.stop()
    assert answers[0] == answers[1] == expected(prompt, 25)
    assert runs[1] < runs[0] / 2


@settings(deadline=None, max_examples=15)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 2), min_size=6, max_size=14), st.integers(1, 30)), min_size=1, max_size=9
    ),
    st.integers(1, 4),
)
def test_other_answers_change_no_answer(requests: list[tuple[list[int], int]], slots: int) -> None:
    """Prompts of two words, with answers of two words, so that the pool often proposes, and often wrongly."""

    class Words(ListDecoder):
        def following(self, tokens: list[int]) -> int:
            return 1 + hash(tuple(tokens[-SIZE - 2 :])) % 2  # two tokens more than the pool compares

    found = []
    for pool in (False, True):
        engine = make(Words(slots), ngram_pool=pool)
        consumers = [Collector() for _ in requests]
        for (prompt, max_tokens), consumer in zip(requests, consumers, strict=True):
            engine.submit(Job(list(prompt), SamplingParams(max_tokens=max_tokens), consumer))
        assert all(consumer.done.wait(10) for consumer in consumers)
        found.append([consumer.tokens for consumer in consumers])
        engine.stop()
    assert found[0] == found[1]


def steps_of(engine: Engine, decoder: ListDecoder, prompt: list[int], **more: Any) -> int:
    """Runs of an answer of 40 tokens, which is compared."""
    before, consumer = len(decoder.runs), Collector()
    engine.submit(Job(list(prompt), SamplingParams(max_tokens=40, **more), consumer))
    assert consumer.done.wait(10)
    if not more:
        assert consumer.tokens == expected(prompt, 40)
    return len(decoder.runs) - before


def counting(sequence: list[int]) -> int:
    """A model that says nothing twice."""
    return sequence[-1] % (VOCABULARY - 1) + 1


def test_a_second_request_is_drafted_from_the_answer_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.unit.test_engine.next_token", counting)
    prompt = list(range(20, 30))
    for pool in (True, False):
        decoder, recorder = ListDecoder(1, seconds=0.0005), Recorder()
        engine = make(decoder, ngram_pool=pool, recorder=recorder)
        first, second = (steps_of(engine, decoder, prompt) for _ in range(2))
        assert first >= 40
        assert (second < 15) if pool else (second >= 40)
        counters = recorder.drain().counters
        assert (counters["pool_draft_tokens_accepted"] > 25) == pool
        assert counters["pool_draft_tokens"] == counters["draft_tokens"]  # none from its own text
        engine.stop()


def test_requests_without_drafts_neither_give_to_the_pool_nor_take_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.unit.test_engine.next_token", counting)
    prompt, decoder = list(range(20, 30)), ListDecoder(1, seconds=0.0005)
    engine = make(decoder)
    silent = Collector()
    engine.submit(Job(list(prompt), SamplingParams(max_tokens=40), silent, prompt_lookup=False))
    assert silent.done.wait(10)
    steps_of(engine, decoder, prompt, temperature=1.0, seed=1)
    assert steps_of(engine, decoder, prompt) >= 40  # of which there is nothing in the pool
    before = len(decoder.runs)
    again = Collector()
    engine.submit(Job(list(prompt), SamplingParams(max_tokens=40), again, prompt_lookup=False))
    assert again.done.wait(10)
    assert len(decoder.runs) - before >= 40
    engine.stop()


def test_a_pool_of_wrong_answers_costs_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.unit.test_engine.next_token", counting)
    prompt, decoder, recorder = list(range(20, 30)), ListDecoder(1, seconds=0.0005), Recorder()
    engine = make(decoder, recorder=recorder)
    pool = engine._ngram_pool
    assert pool is not None
    text = [*prompt, *expected(prompt, 40)]
    for end in range(len(prompt), len(text)):  # behind each n-gram of the answer, what the model does not say
        pool.add([*text[:end], 3, 3, 3], end)
    assert steps_of(engine, decoder, prompt) == 42
    counters = recorder.drain().counters
    assert counters["pool_draft_tokens_accepted"] == 0
    # In pauses that become longer; how long depends on what a step takes here.
    assert 0 < counters["pool_draft_tokens"] <= 20
    engine.stop()


def test_a_sampled_request_is_not_drafted() -> None:
    recorder = Recorder()
    engine = make(ListDecoder(1), recorder=recorder)
    consumer = Collector()
    engine.submit(Job([5, 6] * 9, SamplingParams(max_tokens=30, min_tokens=30, temperature=1.0, seed=1), consumer))
    assert consumer.done.wait(10)
    assert recorder.drain().counters["draft_tokens"] == 0
    engine.stop()


def test_what_is_counted() -> None:
    recorder = Recorder()
    engine = make(ListDecoder(2), recorder=recorder)
    first, cancelled = Collector(), Collector()
    cancelled.cancelled = True
    engine.submit(Job([5, 6, 7], SamplingParams(max_tokens=4, min_tokens=4), first, prompt_lookup=False))
    engine.submit(Job([5], SamplingParams(max_tokens=4), cancelled))
    assert first.done.wait(10)
    assert cancelled.done.wait(10)
    engine.stop()
    recorded = recorder.drain()
    assert recorded.counters["prompt_tokens"] == 3
    assert recorded.counters["generated_tokens"] == 4
    assert recorded.counters["requests_cancelled"] == 1
    sizes = {name: len(values) for name, values in recorded.histograms.items()}
    assert sizes["time_to_first_token"] == sizes["queue_time"] == 1
    assert sizes["inter_token_latency"] == sizes["batch_size"] == 3
    assert sizes["request_duration"] == 2
    assert recorded.gauges["requests_running"] == recorded.gauges["slots_used"] == 0
    assert recorded.gauges["kv_cache_tokens_reserved"] == 0
    assert recorded.gauges["slots"] == 2
    assert recorded.gauges["kv_cache_tokens_limit"] == 10**7
    assert recorder.drain().counters == {}


class Forcing:
    """A guide that allows every token, and says that some come next, which the model does not choose."""

    def forced(self, limit: int) -> list[int]:
        return [VOCABULARY - 1, VOCABULARY - 2][: max(limit, 0)]

    def fits(self, draft: Sequence[int]) -> list[int]:
        return list(draft)

    def masks(self, draft: Sequence[int]) -> np.ndarray:
        return np.ones((1 + len(draft), VOCABULARY), bool)

    def accept(self, token: int) -> bool:
        return False


@pytest.mark.parametrize("kind", [ListDecoder, StatesDecoder])
def test_what_a_grammar_forces_changes_no_answer(kind: type[ListDecoder]) -> None:
    """Where slots can't be cut back nothing is drafted: a token that is refused would stay in the state."""
    decoder = kind(1)
    engine = make(decoder, whole_prefixes=kind is StatesDecoder)
    consumer = Collector()
    engine.submit(Job([1, 2, 3], SamplingParams(max_tokens=12), consumer, guide=Forcing()))  # type: ignore[arg-type]
    assert consumer.done.wait(10)
    engine.stop()
    assert consumer.error is None
    assert consumer.tokens == expected([1, 2, 3], 12)
    assert (max(decoder.runs[1:]) == 1) == (kind is StatesDecoder)
