"""The engine's side of vLLM: answers are handed to the worker, and tokens come from it.

vLLM schedules, computes and samples. What is here: how many wait, whose time is over, who has hung up, where an answer
ends, and what becomes of all when the worker dies: it is started again, and requests fail with UNAVAILABLE meanwhile.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trident_serving.errors import InvalidRequest, ModelError, Overloaded
from trident_serving.generation.answer import Consumer, FinishReason
from trident_serving.generation.request import GenerationRequest
from trident_serving.runtime import loop
from trident_serving.runtime.log_probabilities import TokenLogProbs
from trident_serving.runtime.loop import EngineLoop
from trident_serving.runtime.metrics import Recorder
from trident_serving.vllm import translation
from trident_serving.vllm.process import STOP_SECONDS, Ready, WorkerEnded, WorkerProcess

logger = logging.getLogger(__name__)

# How long a step waits for the worker's messages before it looks for requests that are cancelled or overdue.
POLL_SECONDS = 0.02
# Between two starts of a worker that does not come up.
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0
_STARTING = "vLLM has died and is being started again: try again later"


class WorkerError(Exception):
    """vLLM failed while it computed an answer; the message is its own."""


@dataclass(frozen=True)
class _Ended:
    """In the queue of messages: a worker has ended.

    Attributes:
        worker: the one.
        how: in words.
    """

    worker: WorkerProcess
    how: str


class VllmAnswer(loop.Request):
    """One answer while vLLM generates it.

    Args:
        request: whose answer it is.
        index: which of several.
        ends: tokens that end it.
        submitted: when the request came, by `time.monotonic`; None: now.
    """

    def __init__(
        self,
        request: GenerationRequest,
        index: int,
        consumer: Consumer,
        ends: frozenset[int],
        submitted: float | None = None,
    ) -> None:
        super().__init__(consumer, request.timeout_seconds, submitted)
        self.request, self.index, self.ends = request, index, ends
        self.receiver = consumer
        self.last_token_at = self.submitted
        self.number = 0
        self.worker: WorkerProcess | None = None


class VllmEngine(EngineLoop[VllmAnswer]):
    """Answers of one model, which a worker computes.

    Args:
        start: starts a worker and waits until its engine is there.
        slots: answers that it generates at once.
        max_waiting: further ones that it takes.

    Attributes:
        ready: what the worker said when it was there.

    Raises:
        LoadError: there is no worker.
    """

    def __init__(
        self,
        start: Callable[[], WorkerProcess],
        *,
        slots: int,
        max_waiting: int,
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__("engine", recorder)
        self._start_worker = start
        self._most = slots + max_waiting
        self._numbers = itertools.count(1)
        self._answers: dict[int, VllmAnswer] = {}
        self._messages: queue.SimpleQueue[dict[str, Any] | _Ended] = queue.SimpleQueue()
        self._stats: Mapping[str, Any] = {}
        self._steps_before = 0  # of workers that have died
        self._worker: WorkerProcess | None = start()
        self.ready: Ready = self._worker.ready
        self._no_more = threading.Event()
        self._recorder.set(slots=slots, kv_cache_tokens_limit=self.ready.cache_tokens)
        self._reader = threading.Thread(target=self._read, args=(self._worker,), name="vllm", daemon=True)
        self._reader.start()
        self.start()

    @property
    def steps(self) -> int:
        """Steps that vLLM has made; so a worker that hangs is seen."""
        return self._steps_before + int(self._stats.get("steps", 0))

    @property
    def worker_pid(self) -> int | None:
        """The process that computes; None while none does."""
        worker = self._worker
        return None if worker is None else worker.pid

    def submit(self, *answers: VllmAnswer) -> None:
        """Hand answers to the worker, all or none; their consumers hear of it from the engine's thread.

        Raises:
            Overloaded: too many wait, the worker is being started again, or the engine is stopping.
        """
        with self._adding():
            worker = self._worker
            if worker is None:
                raise Overloaded(_STARTING)
            if len(self._answers) + len(answers) > self._most:
                raise Overloaded(f"{len(self._answers)} answers are generated or wait: try again later")
            for answer in answers:
                answer.number, answer.worker = next(self._numbers), worker
                self._answers[answer.number] = answer
            try:
                for answer in answers:
                    asked = translation.message(answer.request, answer.index, answer.ends)
                    worker.generate(answer.number, asked)
            except WorkerEnded:
                for answer in answers:
                    del self._answers[answer.number]
                raise Overloaded(_STARTING) from None

    def stop(self) -> None:
        """End the loop and the worker; what still runs fails with `Overloaded`."""
        self._no_more.set()
        super().stop()
        if (worker := self._worker) is not None:
            worker.stop()
        self._reader.join(STOP_SECONDS)  # it may be starting a worker, which ends with this process

    def _read(self, worker: WorkerProcess) -> None:
        """The thread that reads what workers say, and starts the next one when one has died."""
        while True:
            for message in worker.messages():
                if "stats" in message:
                    self._note(message["stats"])
                else:
                    self._messages.put(message)
            with self._changed:
                self._worker = None
            worker.stop()
            how = worker.how()
            self._messages.put(_Ended(worker, how))
            self._steps_before, self._stats = self.steps, {}
            if self._no_more.is_set():
                return
            logger.error("vLLM's process %s: it is started again", how)
            self._recorder.count("loop_restarts")
            found = self._next_worker()
            if found is None:
                return
            worker = found

    def _next_worker(self) -> WorkerProcess | None:
        """Another worker; None where none is wanted any more."""
        pause = FIRST_PAUSE_SECONDS
        while not self._no_more.wait(pause):
            try:
                worker = self._start_worker()
            except ModelError as error:
                logger.error("%s; tried again in %.0f s", error, pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                continue
            with self._changed:
                self._worker = worker
            if self._no_more.is_set():
                worker.close()
                return None
            logger.info("vLLM is there again")
            return worker
        return None

    def _note(self, stats: Mapping[str, Any]) -> None:
        self._stats = stats
        self._recorder.observe("batch_size", *stats["batches"])

    def _requests(self) -> Sequence[VllmAnswer]:
        return list(self._answers.values())

    def _step(self) -> None:
        try:
            message = self._messages.get(timeout=POLL_SECONDS)
            while True:
                self._handle(message)
                message = self._messages.get_nowait()
        except queue.Empty:
            pass

    def _handle(self, message: dict[str, Any] | _Ended) -> None:
        if isinstance(message, _Ended):
            for answer in self._requests():
                if answer.worker is message.worker:
                    self._remove(answer, cancel=False)
                    self._fail(answer, Overloaded(f"vLLM's process {message.how} before the answer was complete"))
            return
        found = self._answers.get(message["id"])
        if found is None:
            return  # it was removed, and what is told of it was under way
        try:
            self._take(found, message)
        except Exception as error:
            logger.exception("a message of vLLM could not be used")
            self._remove(found)
            self._fail(found, error)

    def _take(self, answer: VllmAnswer, message: Mapping[str, Any]) -> None:
        """What the worker says of an answer."""
        if "invalid" in message or "error" in message:
            self._remove(answer, cancel=False)
            invalid = message.get("invalid")
            error = InvalidRequest(f"vLLM: {invalid}") if invalid is not None else WorkerError(message["error"])
            self._fail(answer, error)
            return
        if not answer.started:
            self._begin(answer, message)
        ended = message.get("end")
        if answer.request.sampling.max_tokens == 0:
            self._finish(answer, FinishReason.LENGTH, cancel=ended is None)
            return
        log_probs = message.get("log_probs")
        for place, token in enumerate(message["tokens"]):
            told = None if log_probs is None else _log_probs(log_probs[place], answer.request.top_log_probs)
            reason = self._hand_out(answer, token, told)
            if reason is not None:
                self._finish(answer, reason, cancel=ended is None)
                return
        if ended in ("stop", "length"):
            self._finish(answer, FinishReason(ended), cancel=False)
        elif ended is not None:
            raise WorkerError(f"vLLM ended the answer: {ended}")

    def _begin(self, answer: VllmAnswer, message: Mapping[str, Any]) -> None:
        answer.started = True
        self._recorder.observe("queue_time", message.get("queued", 0.0))
        self._recorder.count("prompt_tokens", len(answer.request.prompt_ids))
        self._recorder.count("prefix_hit_tokens", message.get("cached", 0))
        if "prompt_log_probs" in message:
            top = answer.request.prompt_log_probs or 0
            answer.receiver.accept_prompt([_log_probs(entry, top) for entry in message["prompt_log_probs"]])

    def _hand_out(self, answer: VllmAnswer, token: int, log_probs: TokenLogProbs | None) -> FinishReason | None:
        answer.generated += 1
        now = time.monotonic()
        name = "time_to_first_token" if answer.generated == 1 else "inter_token_latency"
        self._recorder.observe(name, now - answer.last_token_at)
        self._recorder.count("generated_tokens")
        answer.last_token_at = now
        stopped = answer.receiver.accept(token, log_probs)
        if stopped or token in answer.ends:
            return FinishReason.STOP
        return FinishReason.LENGTH if answer.generated >= answer.request.sampling.max_tokens else None

    def _finish(self, answer: VllmAnswer, reason: FinishReason, *, cancel: bool) -> None:
        self._remove(answer, cancel=cancel)
        self._recorder.observe("request_duration", answer.age)
        answer.receiver.finish(reason)

    def _finish_cancelled(self, request: VllmAnswer) -> None:
        self._finish(request, FinishReason.CANCELLED, cancel=False)

    def _remove(self, request: VllmAnswer, *, cancel: bool = True) -> None:
        with self._changed:
            there = self._answers.pop(request.number, None) is not None
        if there and cancel and request.worker is not None:
            with contextlib.suppress(WorkerEnded):  # so has the answer
                request.worker.cancel(request.number)

    def _clear(self) -> Sequence[VllmAnswer]:
        left = self._requests()
        for answer in left:
            self._remove(answer)
        return left

    def _record_state(self) -> None:
        answers = self._requests()
        running = sum(answer.started for answer in answers)
        held = round(float(self._stats.get("usage", 0.0)) * self.ready.cache_tokens) if answers else 0
        self._recorder.set(
            requests_running=running,
            requests_waiting=len(answers) - running,
            slots_used=running,
            kv_cache_tokens=held,
            kv_cache_tokens_reserved=held,
        )


def _log_probs(entry: Sequence[Any], count: int) -> TokenLogProbs:
    """What the worker tells of a position."""
    chosen, likeliest = entry
    return TokenLogProbs(float(chosen), translation.top(likeliest, count))
