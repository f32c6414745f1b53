"""The engine of encoder-decoder models on a decoder of twenty lines: scores follow from the text and its tokens."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trident_serving.errors import DeadlineExceeded, Overloaded
from trident_serving.runtime.metrics import Recorder
from trident_serving.runtime.sampling.params import SamplingParams
from trident_serving.seq2seq.decoder import Copy, Row
from trident_serving.seq2seq.engine import Engine, Job
from trident_serving.seq2seq.rules import Rules
from trident_serving.seq2seq.search import Found, SearchParams

VOCABULARY = 40
EOS = 0
START = (1,)


class ListDecoder:
    """A `Seq2SeqDecoder` whose cache is a list of tokens for each slot."""

    def __init__(self, slots: int, seconds: float = 0.0) -> None:
        self.slots = slots
        self.cache: list[list[int]] = [[] for _ in range(slots)]
        self.texts: dict[Hashable, tuple[int, ...]] = {}
        self.seconds = seconds
        self.batches: list[int] = []
        self.encoded: list[int] = []
        self.copied = 0
        self.fail_on: int | None = None

    def encode_all(self, texts: Mapping[Hashable, Sequence[int]]) -> dict[Hashable, Exception]:
        failed: dict[Hashable, Exception] = {
            text: RuntimeError("the encoder failed") for text, ids in texts.items() if self.fail_on in ids
        }
        self.encoded.append(len(texts))
        self.texts |= {text: tuple(ids) for text, ids in texts.items() if text not in failed}
        return failed

    def remove(self, text: Hashable) -> None:
        del self.texts[text]

    def run(self, rows: Sequence[Row]) -> np.ndarray:
        time.sleep(self.seconds)
        self.batches.append(len(rows))
        found = []
        for held, row in zip(self.cache, rows, strict=False):
            assert len(held) >= row.position
            held[row.position :] = [row.token]
            seed = abs(hash((self.texts[row.text], tuple(held))))
            found.append(np.random.default_rng(seed).standard_normal(VOCABULARY) * 3)
        return np.array(found, np.float32)

    def move(self, copies: Sequence[Copy], length: int) -> None:
        assert not {copy.source for copy in copies} & {copy.target for copy in copies}
        for copy in copies:
            self.copied += length - copy.start
            self.cache[copy.target][copy.start :] = self.cache[copy.source][copy.start : length]


class Collector:
    """A `Consumer` that keeps its answer."""

    def __init__(self) -> None:
        self.found: Found | None = None
        self.error: Exception | None = None
        self.cancelled = False
        self.done = threading.Event()

    def finish(self, found: Found | None) -> None:
        assert not self.done.is_set()
        self.found = found
        self.done.set()

    def fail(self, error: Exception) -> None:
        assert not self.done.is_set()
        self.error = error
        self.done.set()


def params(max_tokens: int = 8, beams: int = 1, *, seed: int | None = None, endless: bool = False) -> SearchParams:
    rules = Rules(
        max_length=1 + max_tokens,
        min_new_tokens=max_tokens if endless else 0,
        eos_token_ids=(EOS,),
        no_repeat_ngram_size=2 if not endless else 0,
    )
    sampling = None if seed is None else SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=seed)
    return SearchParams(rules, beams, early_stopping=False, sampling=sampling)


def make(decoder: ListDecoder, **more: Any) -> Engine:
    return Engine(decoder, more.get("max_waiting", 100), more.get("recorder"))  # type: ignore[arg-type]


def answers(decoder: ListDecoder, asked: Sequence[tuple[list[int], SearchParams]]) -> list[Found | None]:
    engine = make(decoder)
    consumers = [Collector() for _ in asked]
    engine.submit([Job(ids, START, how, consumer) for (ids, how), consumer in zip(asked, consumers, strict=True)])
    assert all(consumer.done.wait(20) for consumer in consumers)
    assert [consumer.error for consumer in consumers] == [None] * len(asked)
    engine.stop()
    assert decoder.texts == {}
    return [consumer.found for consumer in consumers]


ASKED = st.tuples(
    st.lists(st.integers(2, 30), min_size=1, max_size=5), st.integers(1, 8), st.integers(1, 4), st.booleans()
)


@settings(deadline=None, max_examples=15)
@given(st.lists(ASKED, min_size=1, max_size=8), st.integers(4, 9))
def test_answers_do_not_depend_on_what_decodes_with_them(
    requests: list[tuple[list[int], int, int, bool]], slots: int
) -> None:
    """With beams that swap and free their slots, and slots that move up."""
    asked = [
        (ids, params(length, beams, seed=number if drawn and beams == 1 else None))
        for number, (ids, length, beams, drawn) in enumerate(requests)
    ]
    assert answers(ListDecoder(slots), asked) == [answers(ListDecoder(4), [one])[0] for one in asked]


def test_a_text_waits_for_as_many_slots_as_it_has_beams() -> None:
    decoder = ListDecoder(4)
    answers(decoder, [([5], params(4, 3, endless=True)), ([6], params(4, 2, endless=True)), ([7], params(4))])
    assert max(decoder.batches) == 3  # first come, first served: the third does not overtake the second


def test_texts_that_wait_are_encoded_together_and_few_beside_others_that_decode() -> None:
    decoder = ListDecoder(12, seconds=0.001)
    answers(decoder, [([5] * 100, params(6, endless=True))] * 12)
    assert decoder.encoded == [12]
    engine = make(decoder)
    consumers = [Collector() for _ in range(5)]
    engine.submit([Job([4], START, params(200, endless=True), consumers[0])])
    while len(decoder.encoded) < 2:
        time.sleep(0.001)
    engine.submit([Job([7] * 60, START, params(2), consumer) for consumer in consumers[1:]])
    assert all(consumer.done.wait(10) for consumer in consumers)
    engine.stop()
    assert decoder.encoded == [12, 1, 2, 2]  # of 60 tokens two at a time


def test_a_beam_takes_over_only_what_is_not_the_same_in_its_slot() -> None:
    decoder = ListDecoder(4)
    found = answers(decoder, [([5], params(40, 4, endless=True))])
    assert found[0] is not None
    assert len(found[0].tokens) == 40
    whole = sum(range(2, 42))  # of one beam that is copied in each step, from its first token on
    assert 0 < decoder.copied < whole / 2


def test_a_text_that_can_not_be_encoded_leaves_the_others() -> None:
    decoder = ListDecoder(4, seconds=0.001)
    decoder.fail_on = 13
    engine = make(decoder)
    good, bad, after = Collector(), Collector(), Collector()
    jobs = [([5], good), ([13], bad), ([6], after)]
    engine.submit([Job(ids, START, params(6), consumer) for ids, consumer in jobs])
    assert all(consumer.done.wait(10) for _, consumer in jobs)
    assert str(bad.error) == "the encoder failed"
    assert good.error is after.error is None
    engine.stop()


def test_cancelled_and_overdue_texts_end_where_they_are() -> None:
    decoder, recorder = ListDecoder(2, seconds=0.002), Recorder()
    engine = make(decoder, recorder=recorder)
    endless = params(10**6, endless=True)
    running, other, waiting, overdue = (Collector() for _ in range(4))
    engine.submit([Job([5], START, endless, running), Job([6], START, endless, other, seconds=0.3)])
    engine.submit([Job([7], START, endless, waiting), Job([8], START, endless, overdue, seconds=0.05)])
    assert overdue.done.wait(10)
    assert isinstance(overdue.error, DeadlineExceeded)
    assert str(overdue.error) == "the timeout of 0.05 s was over while it waited"
    waiting.cancelled = running.cancelled = True
    assert waiting.done.wait(10)
    assert running.done.wait(10)
    assert waiting.found is running.found is None
    assert waiting.error is running.error is None
    assert other.done.wait(10)
    assert "the timeout of 0.3 s was over after " in str(other.error)
    engine.stop()
    assert decoder.texts == {}
    recorded = recorder.drain()
    assert (recorded.counters["requests_cancelled"], recorded.counters["requests_failed"]) == (2, 2)
    assert recorded.gauges["slots_used"] == recorded.gauges["requests_waiting"] == 0
    assert recorded.gauges["slots"] == decoder.slots


def test_an_error_of_a_step_fails_what_it_holds_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, recorder = ListDecoder(2, seconds=0.001), Recorder()
    engine = make(decoder, recorder=recorder)
    held, later = Collector(), Collector()
    monkeypatch.setattr(decoder, "run", lambda rows: 1 / 0)
    engine.submit([Job([5], START, params(), held)])
    assert held.done.wait(10)
    assert isinstance(held.error, ZeroDivisionError)
    monkeypatch.undo()
    engine.submit([Job([6], START, params(), later)])
    assert later.done.wait(10)
    assert later.found == answers(ListDecoder(1), [([6], params())])[0]
    assert recorder.drain().counters["loop_restarts"] == 1
    engine.stop()


def test_a_full_queue_and_a_stopping_engine_refuse() -> None:
    engine = make(ListDecoder(1, seconds=0.005), max_waiting=1)
    consumers = [Collector() for _ in range(4)]
    endless = params(10**6, endless=True)
    engine.submit([Job([5], START, endless, consumers[0])])
    time.sleep(0.05)
    engine.submit([Job([6], START, endless, consumers[1])])
    with pytest.raises(Overloaded, match="the queue is full: 1 of 1 texts wait already"):
        engine.submit([Job([7], START, endless, consumers[2])])
    engine.stop()
    assert isinstance(consumers[0].error, Overloaded)
    assert isinstance(consumers[1].error, Overloaded)
    with pytest.raises(Overloaded, match="unloaded"):
        engine.submit([Job([8], START, endless, consumers[3])])
