"""The loop that answers: admit and encode texts, run a step for all beams, let every search advance.

The engine knows tokens, not text. One thread runs the loop; `submit` may be called from any thread. A text waits until
as many slots are free as it has beams; first come, first served. A step encodes one text at most while others decode,
so they wait for one encoder run at a time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from trident_serving.errors import DeadlineExceeded, Overloaded
from trident_serving.runtime.metrics import Recorder
from trident_serving.seq2seq import search
from trident_serving.seq2seq.decoder import Row, Seq2SeqDecoder
from trident_serving.seq2seq.search import Found, Search, SearchParams

logger = logging.getLogger(__name__)


class Consumer(Protocol):
    """Who receives an answer; called on the engine's thread, so it must be quick."""

    @property
    def cancelled(self) -> bool:
        """Whether the answer is not wanted any more; read before each step."""
        ...

    def finish(self, found: Found | None) -> None:
        """The answer; None where it was cancelled."""
        ...

    def fail(self, error: Exception) -> None:
        """There is no answer."""
        ...


@dataclass(eq=False)
class Job:
    """One text to answer.

    Attributes:
        source_ids: tokens of the text, special tokens included.
        prompt: the decoder's start tokens.
        deadline: of `time.monotonic`; None: never.
        seconds: what the request was allowed, for the message.
    """

    source_ids: Sequence[int]
    prompt: Sequence[int]
    params: SearchParams
    consumer: Consumer
    deadline: float | None = None
    seconds: float = 0.0


class _Running:
    def __init__(self, job: Job, slots: list[int], arrived: float) -> None:
        self.job = job
        self.arrived = arrived
        self.search: Search = search.start(job.prompt, job.params)
        self.slots = slots
        self.generated = 0


class Engine:
    """Continuous batching over an encoder-decoder model.

    Args:
        max_waiting: texts that may wait for slots.
    """

    def __init__(self, decoder: Seq2SeqDecoder, max_waiting: int, recorder: Recorder | None = None) -> None:
        self._decoder = decoder
        self._max_waiting = max_waiting
        self._recorder = recorder or Recorder()
        self._waiting: deque[tuple[float, Job]] = deque()
        self._running: list[_Running] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._steps = 0
        self._thread = threading.Thread(target=self._loop, name="seq2seq", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the texts of one request.

        Raises:
            Overloaded: the queue has no room for all of them, or the engine is stopping.
        """
        with self._changed:
            if self._stopping:
                raise Overloaded("the model is being unloaded")
            if len(self._waiting) + len(jobs) > self._max_waiting:
                raise Overloaded(f"the queue is full: {len(self._waiting)} of {self._max_waiting} texts wait already")
            self._waiting.extend((time.monotonic(), job) for job in jobs)
            self._changed.notify()

    @property
    def steps(self) -> int:
        """Steps run so far; the count rises while there is work."""
        return self._steps

    @property
    def busy(self) -> bool:
        """Whether there is work."""
        return bool(self._waiting or self._running)

    def stop(self) -> None:
        """End the loop; what still runs fails with `Overloaded`."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._running and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    break
            self._steps += 1
            try:
                self._step()
            except Exception as error:  # nothing that is held can be trusted; go on with nothing
                logger.exception("a step failed")
                self._recorder.count("loop_restarts")
                self._fail_all(error)
            self._record_state()
        self._fail_all(Overloaded("the model was unloaded before the answer was complete"))

    def _step(self) -> None:
        self._drop_cancelled_and_overdue()
        self._admit()
        if not self._running:
            return
        owners = {slot: (running, index) for running in self._running for index, slot in enumerate(running.slots)}
        tokens = {id(running): running.search.next_tokens for running in self._running}
        rows = []
        for slot in range(len(owners)):
            running, index = owners[slot]
            rows.append(Row(running.job, tokens[id(running)][index], running.search.position))
        logits = self._decoder.run(rows)
        self._recorder.observe("batch_size", len(rows))
        length = max(row.position for row in rows) + 1
        copies: list[tuple[int, int]] = []
        for running in list(self._running):
            try:
                parents = running.search.advance(logits[running.slots])
                running.generated += 1
            except Exception as error:
                logger.exception("an answer could not be searched for")
                self._remove(running)
                self._fail(running.job, error)
                continue
            copies += self._follow(running, parents)
            if running.search.done:
                self._remove(running)
                self._finish(running)
        self._move(copies, length)
        self._compact(length)

    def _drop_cancelled_and_overdue(self) -> None:
        now = time.monotonic()
        with self._changed:
            waiting = [job for _, job in self._waiting]
        for job in [*waiting, *(running.job for running in self._running)]:
            overdue = job.deadline is not None and now >= job.deadline
            if not overdue and not job.consumer.cancelled:
                continue
            where = self._drop(job)
            if job.consumer.cancelled:
                self._recorder.count("requests_cancelled")
                job.consumer.finish(None)
            else:
                self._fail(job, DeadlineExceeded(f"the timeout of {job.seconds:g} s was over {where}"))

    def _drop(self, job: Job) -> str:
        """Take a job out of the queue or out of its slots; says where it was."""
        for running in self._running:
            if running.job is job:
                self._remove(running)
                self._compact(running.search.position + 1, self._longest())
                return f"after {running.generated} tokens"
        with self._changed:
            self._waiting = deque(entry for entry in self._waiting if entry[1] is not job)
        return "while it waited"

    def _admit(self) -> None:
        busy = bool(self._running)
        while True:
            with self._changed:
                if not self._waiting:
                    return
                arrived, job = self._waiting[0]
                used = sum(len(running.slots) for running in self._running)
                if used + job.params.num_beams > self._decoder.slots:
                    return
                self._waiting.popleft()
            try:
                self._decoder.encode(job, job.source_ids)
                running = _Running(job, list(range(used, used + job.params.num_beams)), arrived)
            except Exception as error:
                logger.exception("a text could not be encoded")
                self._fail(job, error)
            else:
                self._recorder.observe("queue_time", time.monotonic() - arrived)
                self._recorder.count("prompt_tokens", len(job.source_ids))
                self._running.append(running)
            if busy:
                return

    def _follow(self, running: _Running, parents: Sequence[int]) -> list[tuple[int, int]]:
        """Give each beam the slot of its parent, or a copy of it in a slot that no beam goes on from."""
        before = running.slots
        free = [slot for index, slot in enumerate(before) if index not in parents]
        taken: set[int] = set()
        slots, copies = [], []
        for parent in parents:
            if parent in taken:
                copies.append((before[parent], free.pop()))
                slots.append(copies[-1][1])
            else:
                taken.add(parent)
                slots.append(before[parent])
        running.slots = slots
        return copies

    def _move(self, copies: Sequence[tuple[int, int]], length: int) -> None:
        if copies:
            sources, targets = zip(*copies, strict=True)
            self._decoder.move(sources, targets, length)

    def _longest(self) -> int:
        return max((running.search.position + 1 for running in self._running), default=0)

    def _compact(self, *lengths: int) -> None:
        """Move the last slots into those that became free: a run takes the first slots of the cache."""
        used = sorted(slot for running in self._running for slot in running.slots)
        free = [slot for slot in range(len(used)) if slot not in set(used)]
        moved = dict(zip([slot for slot in used if slot >= len(used)], free, strict=True))
        if moved:
            self._move(list(moved.items()), max(lengths))
            for running in self._running:
                running.slots = [moved.get(slot, slot) for slot in running.slots]

    def _remove(self, running: _Running) -> None:
        self._running.remove(running)
        self._decoder.remove(running.job)

    def _finish(self, running: _Running) -> None:
        self._recorder.count("generated_tokens", running.generated)
        self._recorder.observe("request_duration", time.monotonic() - running.arrived)
        try:
            running.job.consumer.finish(running.search.found())
        except Exception as error:
            logger.exception("an answer could not be finished")
            self._fail(running.job, error)

    def _fail(self, job: Job, error: Exception) -> None:
        self._recorder.count("requests_failed")
        try:
            job.consumer.fail(error)
        except Exception:
            logger.exception("a failure could not be told")

    def _fail_all(self, error: Exception) -> None:
        with self._changed:
            jobs = [job for _, job in self._waiting]
            self._waiting.clear()
        for running in list(self._running):
            self._remove(running)
            self._fail(running.job, error)
        for job in jobs:
            self._fail(job, error)

    def _record_state(self) -> None:
        slots = sum(len(running.slots) for running in self._running)
        self._recorder.set(requests_running=len(self._running), requests_waiting=len(self._waiting), slots_used=slots)
