"""The loop that generates: schedule a step, run it, sample, hand out the tokens.

The engine knows token ids, not text; a `Consumer` turns them into text and says when it has enough. One
thread runs the loop; `submit` may be called from any thread.

Every token's numbers are the same to the last bit whatever runs with it (see `batch`), and that is what reuse
of prefixes and verification of drafts rest on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate, pairwise
from typing import Protocol

from trident_serving.errors import DeadlineExceeded, Overloaded
from trident_serving.generation import drafting
from trident_serving.generation import scheduler as scheduling
from trident_serving.generation.batch import SlotTokens
from trident_serving.generation.decoder import Decoder
from trident_serving.generation.drafting import Acceptance, PromptLookup, StepTimes
from trident_serving.generation.scheduler import Scheduler
from trident_serving.generation.slots import Placement, SlotPool
from trident_serving.runtime.log_probabilities import Logits, TokenLogProbs, log_probabilities
from trident_serving.runtime.metrics import Recorder
from trident_serving.runtime.sampling.params import SamplingParams
from trident_serving.runtime.sampling.sampler import Sampler

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
        """Whether the answer is not wanted any more; read before each step."""
        ...

    def accept(self, token: int, log_probs: TokenLogProbs | None) -> bool:
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
    """One request as the engine runs it.

    Attributes:
        log_probs: whether the consumer gets log-probabilities.
        top_log_probs: of how many of the likeliest tokens, besides that of the chosen one.
        prompt_lookup: whether drafts may be taken from the sequence itself; greedy requests only.
        seconds: it fails once this time is over, waiting included; None: never.
    """

    prompt_ids: Sequence[int]
    sampling: SamplingParams
    consumer: Consumer
    log_probs: bool = False
    top_log_probs: int = 0
    prompt_lookup: bool = True
    seconds: float | None = None


class _Running:
    """A job with the state that changes while it runs."""

    def __init__(self, job: Job, eos_token_ids: frozenset[int]) -> None:
        self.job = job
        self.sampler = Sampler.causal(job.sampling, job.prompt_ids, eos_token_ids)
        self.generated = 0
        self.submitted = time.monotonic()
        self.last_token_at = self.submitted
        self.lookup: PromptLookup | None = None
        self.acceptance = Acceptance()

    @property
    def overdue(self) -> bool:
        """Whether its time is over."""
        return self.job.seconds is not None and time.monotonic() - self.submitted >= self.job.seconds


_Sequence = scheduling.Sequence[_Running]


@dataclass(frozen=True)
class EngineSettings:
    """Limits of an engine.

    Attributes:
        slots: sequences that run at once.
        cache_tokens: tokens that they may hold together.
        prefill_chunk: prompt tokens in one step at most.
        max_waiting: requests that may wait for a slot.
        prefix_reuse: whether prompts start behind what the cache already holds of them.
        prompt_lookup: whether greedy requests may be drafted.
    """

    slots: int
    cache_tokens: int
    prefill_chunk: int
    max_waiting: int
    prefix_reuse: bool = True
    prompt_lookup: bool = True


class Engine:
    """Continuous batching over a decoder.

    Args:
        decoder: runs the model over slots of its cache.
        eos_token_ids: tokens that end an answer; they are not handed to the consumer as text.
    """

    def __init__(
        self,
        decoder: Decoder,
        settings: EngineSettings,
        *,
        eos_token_ids: frozenset[int],
        recorder: Recorder | None = None,
    ) -> None:
        self._decoder = decoder
        self._settings = settings
        self._eos_token_ids = eos_token_ids
        self._step_times = StepTimes()
        self._recorder = recorder or Recorder()
        self._scheduler = self._new_scheduler()
        self._changed = threading.Condition()
        self._stopping = False
        self._steps = 0
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job; its consumer hears of it from the engine's thread.

        Raises:
            Overloaded: the queue is full, or the engine is stopping.
        """
        running = _Running(job, self._eos_token_ids)
        sequence = scheduling.Sequence(running, list(job.prompt_ids), job.sampling.max_tokens)
        if self._settings.prompt_lookup and job.prompt_lookup and job.sampling.greedy:
            running.lookup = PromptLookup(sequence.tokens)
        with self._changed:
            if self._stopping:
                raise Overloaded("the model is being unloaded")
            self._scheduler.add(sequence)
            self._recorder.set(requests_waiting=self._scheduler.waiting)
            self._changed.notify()

    @property
    def steps(self) -> int:
        """Steps run so far; the count rises while there is work."""
        return self._steps

    @property
    def busy(self) -> bool:
        """Whether there is work."""
        return not self._scheduler.idle

    def stop(self) -> None:
        """End the loop; what still runs fails with `Overloaded`."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _new_scheduler(self) -> Scheduler[_Running]:
        settings = self._settings
        self._pool = SlotPool(
            settings.slots, settings.cache_tokens, reuse=settings.prefix_reuse, can_copy=self._decoder.can_copy
        )
        return Scheduler(self._pool, settings.prefill_chunk, settings.max_waiting)

    def _loop(self) -> None:
        while True:
            with self._changed:
                while self._scheduler.idle and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    break
            self._steps += 1
            try:
                self._step()
            except Exception as error:
                self._restart(error)
        self._fail_all(Overloaded("the model was unloaded before the answer was complete"))

    def _restart(self, error: Exception) -> None:
        """The loop itself failed, so nothing that it holds can be trusted; it goes on with nothing."""
        logger.exception("the generation loop failed and starts again")
        self._recorder.count("loop_restarts")
        self._fail_all(error)

    def _fail_all(self, error: Exception) -> None:
        with self._changed:
            left, self._scheduler = self._scheduler.sequences, self._new_scheduler()
        for sequence in left:
            self._fail(sequence.payload, error)
        self._record_state()

    def _step(self) -> None:
        self._drop_cancelled_and_overdue()
        with self._changed:
            step = self._scheduler.schedule()
        for sequence, placement in step.placed:
            self._place(sequence, placement)
        if step.prefill:
            self._prefill(step.prefill)
        if step.decode:
            self._decode(step.decode)
        self._record_state()

    def _drop_cancelled_and_overdue(self) -> None:
        with self._changed:
            sequences = self._scheduler.sequences
        for sequence in sequences:
            running = sequence.payload
            if running.job.consumer.cancelled:
                self._recorder.count("requests_cancelled")
                self._end(sequence, FinishReason.CANCELLED)
            elif running.overdue:
                where = f"after {running.generated} tokens" if sequence.slot is not None else "while it waited"
                self._remove(sequence)
                self._fail(running, DeadlineExceeded(f"the timeout of {running.job.seconds:g} s was over {where}"))

    def _place(self, sequence: _Sequence, placement: Placement) -> None:
        running = sequence.payload
        # What the slot held beyond is not accounted for any more.
        self._decoder.release(placement.slot, placement.reused if placement.source is None else 0)
        if placement.source is not None:
            self._decoder.copy(placement.source, placement.slot, placement.reused)
        for slot in placement.evicted:
            self._decoder.release(slot, 0)
        self._recorder.observe("queue_time", time.monotonic() - running.submitted)
        self._recorder.count("prompt_tokens", sequence.prompt_length)
        self._recorder.count("prefix_hit_tokens", placement.reused)

    def _prefill(self, chunks: Sequence[scheduling.PrefillChunk[_Running]]) -> None:
        items = [
            SlotTokens(
                _slot(chunk.sequence), chunk.start, chunk.sequence.tokens[chunk.start : chunk.end], int(chunk.is_last)
            )
            for chunk in chunks
        ]
        for chunk, logits in zip(chunks, self._run([chunk.sequence for chunk in chunks], items), strict=True):
            if logits is not None:
                chunk.sequence.cached = chunk.end
                if chunk.is_last:
                    self._take(chunk.sequence, logits, [])

    def _decode(self, sequences: Sequence[_Sequence]) -> None:
        drafts = self._drafts(sequences)
        items = [
            SlotTokens(_slot(sequence), sequence.cached, [sequence.tokens[-1], *draft], 1 + len(draft))
            for sequence, draft in zip(sequences, drafts, strict=True)
        ]
        self._recorder.observe("batch_size", len(sequences))
        started = time.perf_counter()
        found = self._run(sequences, items)
        self._step_times.record(len(sequences), sum(map(len, drafts)), time.perf_counter() - started)
        for sequence, draft, logits in zip(sequences, drafts, found, strict=True):
            if logits is not None:
                self._take(sequence, logits, draft)

    def _run(self, sequences: Sequence[_Sequence], items: Sequence[SlotTokens]) -> list[Logits | None]:
        """The wanted logits of each sequence; None for one that failed, which leaves the others as they are.

        A run that fails is made again for one sequence at a time, which writes the same to the cache.
        """
        try:
            logits = self._decoder.run(items)
        except Exception as error:
            if len(items) > 1:
                single = zip(sequences, items, strict=True)
                return [
                    None if found is None else found.copy()
                    for sequence, item in single
                    for found in self._run([sequence], [item])
                ]
            logger.exception("a run of the model failed")
            self._remove(sequences[0], trusted=False)
            self._fail(sequences[0].payload, error)
            return [None]
        ends = list(accumulate((item.wanted for item in items), initial=0))
        return [logits[start:end] for start, end in pairwise(ends)]

    def _drafts(self, sequences: Sequence[_Sequence]) -> list[list[int]]:
        """A draft for each sequence, mostly empty."""
        drafts: list[list[int]] = [[] for _ in sequences]
        found: list[tuple[int, float, list[int]]] = []
        for index, sequence in enumerate(sequences):
            running = sequence.payload
            # The last token of an answer need not be drafted: it comes with the verification.
            room = min(running.job.sampling.max_tokens - running.generated - 1, drafting.MAX_DRAFT)
            if running.lookup is None or room < 1 or not (chance := running.acceptance.chance()):
                continue
            if draft := running.lookup.draft(room):
                found.append((index, chance, draft))
        if found:
            chances, limits = [chance for _, chance, _ in found], [len(draft) for *_, draft in found]
            lengths = drafting.allot(chances, limits, len(sequences), self._step_times.cost())
            for (index, _, draft), length in zip(found, lengths, strict=True):
                drafts[index] = draft[:length]
        return drafts

    def _take(self, sequence: _Sequence, logits: Logits, draft: list[int]) -> None:
        """Choose the sequence's next tokens and hand them out; an error here ends only this sequence.

        Args:
            logits: of the last token and of each token of the draft, [1 + draft, vocabulary].
        """
        running = sequence.payload
        reason, accepted = None, 0
        try:
            for index, scores in enumerate(logits):
                token = running.sampler.choose(scores)
                sequence.cached = len(sequence.tokens)
                sequence.tokens.append(token)
                reason = self._hand_out(running, token, scores)
                if reason is not None or index == len(draft) or token != draft[index]:
                    break
                accepted += 1
        except Exception as error:
            logger.exception("a token could not be chosen")
            self._remove(sequence, trusted=False)
            self._fail(running, error)
            return
        if draft:
            running.acceptance.record(len(draft), accepted)
            self._recorder.count("draft_tokens", len(draft))
            self._recorder.count("draft_tokens_accepted", accepted)
        if reason is not None:
            self._end(sequence, reason)

    def _hand_out(self, running: _Running, token: int, logits: Logits) -> FinishReason | None:
        job = running.job
        log_probs = log_probabilities(logits, token, job.top_log_probs) if job.log_probs else None
        running.generated += 1
        self._record_token(running)
        stopped = job.consumer.accept(token, log_probs)
        if stopped or token in self._eos_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if running.generated >= job.sampling.max_tokens else None

    def _record_token(self, running: _Running) -> None:
        now = time.monotonic()
        first = running.generated == 1
        self._recorder.observe("time_to_first_token" if first else "inter_token_latency", now - running.last_token_at)
        self._recorder.count("generated_tokens")
        running.last_token_at = now

    def _end(self, sequence: _Sequence, reason: FinishReason) -> None:
        self._remove(sequence)
        running = sequence.payload
        self._recorder.observe("request_duration", time.monotonic() - running.submitted)
        try:
            running.job.consumer.finish(reason)
        except Exception as error:
            logger.exception("an answer could not be finished")
            self._fail(running, error)

    def _fail(self, running: _Running, error: Exception) -> None:
        self._recorder.count("requests_failed")
        running.job.consumer.fail(error)

    def _remove(self, sequence: _Sequence, *, trusted: bool = True) -> None:
        with self._changed:
            self._scheduler.remove(sequence, trusted=trusted)

    def _record_state(self) -> None:
        with self._changed:
            self._recorder.set(
                requests_running=self._scheduler.running,
                requests_waiting=self._scheduler.waiting,
                slots_used=self._pool.running,
                kv_cache_tokens=self._pool.held,
            )


def _slot(sequence: _Sequence) -> int:
    assert sequence.slot is not None
    return sequence.slot
