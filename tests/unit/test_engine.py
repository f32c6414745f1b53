"""The engine on a decoder of ten lines: the next token is a function of the whole sequence in its cache."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trident_serving.errors import Overloaded
from trident_serving.generation.engine import Engine, FinishReason, Job
from trident_serving.generation.sampling import SamplingParams
from trident_serving.generation.scheduler import RowMove

VOCABULARY = 97
EOS = 0


def next_token(sequence: list[int]) -> int:
    """Never EOS but for sequences that end in 13."""
    return EOS if sequence[-1] == 13 else 1 + hash(tuple(sequence)) % (VOCABULARY - 1)


def expected(prompt: list[int], max_tokens: int) -> list[int]:
    sequence = list(prompt)
    while len(sequence) < len(prompt) + max_tokens and (len(sequence) == len(prompt) or sequence[-1] != EOS):
        sequence.append(next_token(sequence))
    return sequence[len(prompt) :]


class ListDecoder:
    """A `Decoder` whose cache is a list of tokens a row."""

    def __init__(self, slots: int, seconds: float = 0.0) -> None:
        self.slots = slots
        self.rows: list[list[int]] = [[] for _ in range(slots)]
        self.seconds = seconds
        self.batches: list[int] = []
        self.fail_on: int | None = None

    def run(self, first_row: int, input_ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
        time.sleep(self.seconds)
        if self.fail_on is not None and (input_ids == self.fail_on).any():
            raise RuntimeError("the model failed")
        self.batches.append(len(input_ids))
        logits = np.zeros((len(input_ids), VOCABULARY), np.float32)
        for index, (tokens, start) in enumerate(zip(input_ids.tolist(), starts.tolist(), strict=True)):
            row = self.rows[first_row + index]
            row[start:] = tokens
            logits[index, next_token(row)] = 1.0
        return logits

    def move(self, moves: list[RowMove]) -> None:
        for move in moves:
            self.rows[move.target] = self.rows[move.source][: move.length]


class Collector:
    """A `Consumer` that keeps its tokens."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.tokens: list[int] = []
        self.reason: FinishReason | None = None
        self.error: Exception | None = None
        self.cancelled = False
        self.done = threading.Event()
        self._stop_after = stop_after

    def accept(self, token: int, log_prob: float | None) -> bool:
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


def make(decoder: ListDecoder, max_waiting: int = 100, prefill_chunk: int = 4) -> Engine:
    return Engine(decoder, eos_token_ids=frozenset([EOS]), prefill_chunk=prefill_chunk, max_waiting=max_waiting)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=12), st.integers(1, 12)),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 4),
)
def test_answers_do_not_depend_on_the_company(requests: list[tuple[list[int], int]], slots: int) -> None:
    engine = make(ListDecoder(slots))
    consumers = [Collector() for _ in requests]
    for (prompt, max_tokens), consumer in zip(requests, consumers, strict=True):
        engine.submit(Job(prompt, SamplingParams(max_tokens=max_tokens), consumer))
    for (prompt, max_tokens), consumer in zip(requests, consumers, strict=True):
        assert consumer.done.wait(10)
        assert consumer.tokens == expected(prompt, max_tokens)
        ends = consumer.tokens[-1] == EOS
        assert consumer.reason is (FinishReason.STOP if ends else FinishReason.LENGTH)
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
        def accept(self, token: int, log_prob: float | None) -> bool:
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
    with pytest.raises(Overloaded, match="the queue holds no more"):
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
            self.log_probs: list[float | None] = []

        def accept(self, token: int, log_prob: float | None) -> bool:
            self.log_probs.append(log_prob)
            return super().accept(token, log_prob)

    engine = make(ListDecoder(1))
    asked, not_asked = WithLogProbs(), WithLogProbs()
    engine.submit(Job([5], SamplingParams(max_tokens=2, min_tokens=2), asked, want_log_probs=True))
    engine.submit(Job([5], SamplingParams(max_tokens=2, min_tokens=2), not_asked))
    assert asked.done.wait(10)
    assert not_asked.done.wait(10)
    certain = 1.0 - np.log(np.e + VOCABULARY - 1)  # logit 1 among zeros
    assert asked.log_probs == pytest.approx([certain, certain])
    assert not_asked.log_probs == [None, None]
    engine.stop()
