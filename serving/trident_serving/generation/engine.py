"""The loop that generates: schedule a step, run it, sample, hand out the tokens.

The engine knows token ids, not text; a `Consumer` turns them into text and says when it has enough. One
thread runs the loop; `submit` may be called from any thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trident_serving.errors import Overloaded
from trident_serving.generation import scheduler as scheduling
from trident_serving.generation.decoder import Decoder
from trident_serving.generation.sampling import Sampler, SamplingParams, log_probability
from trident_serving.generation.scheduler import Scheduler

logger = logging.getLogger(__name__)


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


class Consumer(Protocol):
    """Who receives the tokens of one request; called on the engine's thread, so it must be quick."""

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants the answer any more; read before each step."""
        ...

    def accept(self, token: int, log_prob: float | None) -> bool:
        """Take one token; True ends the answer (a stop string was found)."""
        ...

    def finish(self, reason: FinishReason) -> None:
        """The answer is complete; nothing follows."""
        ...

    def fail(self, error: Exception) -> None:
        """The answer can't be completed; nothing follows."""
        ...


@dataclass
class Job:
    """One request as the engine runs it."""

    prompt_ids: Sequence[int]
    sampling: SamplingParams
    consumer: Consumer
    want_log_probs: bool = False


class _Running:
    """A job with the state that changes while it runs."""

    def __init__(self, job: Job, eos_token_ids: frozenset[int]) -> None:
        self.job = job
        self.sampler = Sampler(job.sampling, job.prompt_ids, eos_token_ids)
        self.last_token = -1
        self.generated = 0


_Sequence = scheduling.Sequence[_Running]


class Engine:
    """Continuous batching over a decoder.

    Args:
        decoder: runs the model over rows of its cache.
        eos_token_ids: tokens that end an answer; they are not handed to the consumer as text.
        prefill_chunk: prompt tokens in one step at most.
        max_waiting: requests that may wait for a slot.
    """

    def __init__(
        self, decoder: Decoder, *, eos_token_ids: frozenset[int], prefill_chunk: int, max_waiting: int
    ) -> None:
        self._decoder = decoder
        self._eos_token_ids = eos_token_ids
        self._scheduler: Scheduler[_Running] = Scheduler(decoder.slots, prefill_chunk, max_waiting)
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job; its consumer hears of it from the engine's thread.

        Raises:
            Overloaded: the queue is full, or the engine is stopping.
        """
        with self._changed:
            if self._stopping:
                raise Overloaded("the model is being unloaded")
            self._scheduler.add(scheduling.Sequence(_Running(job, self._eos_token_ids), len(job.prompt_ids)))
            self._changed.notify()

    def stop(self) -> None:
        """End the loop; what still runs fails with `Overloaded`."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _loop(self) -> None:
        while True:
            with self._changed:
                while self._scheduler.idle and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    break
            self._drop_cancelled()
            with self._changed:
                step = self._scheduler.schedule()
            if step.prefill is not None:
                with self._failing_alone([step.prefill.sequence]):
                    self._prefill(step.prefill)
            if step.decode:
                with self._failing_alone(step.decode):
                    self._decode(step.decode)
        with self._changed:
            left = self._scheduler.sequences
        for sequence in left:
            sequence.payload.job.consumer.fail(Overloaded("the model was unloaded before the answer was complete"))

    @contextmanager
    def _failing_alone(self, sequences: Sequence[_Sequence]) -> Iterator[None]:
        """A step that fails takes its own sequences with it and nobody else's."""
        try:
            yield
        except Exception as error:
            logger.exception("a step of %d sequences failed", len(sequences))
            for sequence in sequences:
                if sequence.row is not None:
                    self._remove(sequence)
                    sequence.payload.job.consumer.fail(error)

    def _drop_cancelled(self) -> None:
        with self._changed:
            cancelled = [s for s in self._scheduler.sequences if s.payload.job.consumer.cancelled]
        for sequence in cancelled:
            self._end(sequence, FinishReason.CANCELLED)

    def _prefill(self, chunk: scheduling.PrefillChunk[_Running]) -> None:
        assert chunk.sequence.row is not None
        running = chunk.sequence.payload
        ids = np.array([running.job.prompt_ids[chunk.start : chunk.end]], np.int64)
        logits = self._decoder.run(chunk.sequence.row, ids, np.array([chunk.start], np.int64))
        with self._changed:
            self._scheduler.advance(chunk.sequence, chunk.end - chunk.start)
        if chunk.is_last:
            self._take(chunk.sequence, logits[0])

    def _decode(self, sequences: Sequence[_Sequence]) -> None:
        tokens = np.array([[s.payload.last_token] for s in sequences], np.int64)
        lengths = np.array([s.cached for s in sequences], np.int64)
        logits = self._decoder.run(0, tokens, lengths)
        with self._changed:
            for sequence in sequences:
                self._scheduler.advance(sequence, 1)
        for row, sequence in enumerate(sequences):
            self._take(sequence, logits[row])

    def _take(self, sequence: _Sequence, logits: NDArray[np.float32]) -> None:
        """Choose the sequence's next token and hand it out; what goes wrong here concerns it alone."""
        try:
            reason = self._next_token(sequence.payload, logits)
        except Exception as error:
            logger.exception("a token could not be chosen")
            self._remove(sequence)
            sequence.payload.job.consumer.fail(error)
            return
        if reason is not None:
            self._end(sequence, reason)

    def _next_token(self, running: _Running, logits: NDArray[np.float32]) -> FinishReason | None:
        job = running.job
        token = running.sampler.choose(logits)
        log_prob = log_probability(logits, token) if job.want_log_probs else None
        running.last_token = token
        running.generated += 1
        stopped = job.consumer.accept(token, log_prob)
        if stopped or token in self._eos_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if running.generated >= job.sampling.max_tokens else None

    def _end(self, sequence: _Sequence, reason: FinishReason) -> None:
        self._remove(sequence)
        consumer = sequence.payload.job.consumer
        try:
            consumer.finish(reason)
        except Exception as error:
            logger.exception("an answer could not be finished")
            consumer.fail(error)

    def _remove(self, sequence: _Sequence) -> None:
        with self._changed:
            moves = self._scheduler.remove(sequence)
        self._decoder.move(moves)
