"""The engine that answers: a step admits and encodes texts, runs the model for all beams, lets every search advance.

The engine knows tokens, not text. `submit` may be called from any thread. A text waits until as many slots are free as
it has beams; first come, first served. A step encodes few tokens while others decode, or one text, so that they wait no
longer than for that.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from trident_serving.errors import Overloaded
from trident_serving.runtime import loop
from trident_serving.runtime.loop import EngineLoop
from trident_serving.runtime.metrics import Recorder
from trident_serving.seq2seq import search
from trident_serving.seq2seq.decoder import Copy, Row, Seq2SeqDecoder, Source
from trident_serving.seq2seq.search import Found, Search, SearchParams

logger = logging.getLogger(__name__)

ENCODED_BESIDE = 128  # tokens of texts that are encoded in a step in which others decode


class Consumer(loop.Consumer, Protocol):
    """Who receives an answer; called on the engine's thread, so it must be quick."""

    def finish(self, found: Found | None) -> None:
        """The answer; None where it was cancelled."""
        ...


@dataclass
class Job:
    """One text to answer.

    Attributes:
        source: tokens of the text, special tokens included; or the features of speech.
        prompt: the decoder's start tokens.
        seconds: it fails once this time is over, waiting included; None: never.
        search: of as many rows as beams; None: the usual one.
    """

    source: Source
    prompt: Sequence[int]
    params: SearchParams
    consumer: Consumer
    seconds: float | None = None
    search: Search | None = None

    @property
    def size(self) -> int:
        """Tokens, or frames, of the source."""
        return int(np.shape(self.source)[-1])


class Answer(loop.Request):
    """A job with what changes while it runs.

    Attributes:
        slots: of the KV cache, one for each beam; none while it waits.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job.consumer, job.seconds)
        self.job = job
        self.search: Search = job.search or search.start(job.prompt, job.params)
        self.slots: list[int] = []

    @property
    def beams(self) -> int:
        """Slots that it takes."""
        return self.job.params.num_beams


class Engine(EngineLoop[Answer]):
    """Continuous batching over an encoder-decoder model.

    Args:
        max_waiting: texts that may wait for slots.
    """

    def __init__(self, decoder: Seq2SeqDecoder, max_waiting: int, recorder: Recorder | None = None) -> None:
        super().__init__("seq2seq", recorder)
        self._decoder = decoder
        self._max_waiting = max_waiting
        self._waiting: deque[Answer] = deque()
        self._running: list[Answer] = []
        self._recorder.set(slots=decoder.slots)
        self.start()

    def submit(self, jobs: Sequence[Job], *, going_on: bool = False) -> None:
        """Queue the texts of one request.

        Args:
            going_on: whether they belong to a request that has waited already: they come next, however many wait.

        Raises:
            Overloaded: the queue has no room for all of them, or the engine is stopping.
        """
        answers = [Answer(job) for job in jobs]
        with self._adding():
            if going_on:
                self._waiting.extendleft(reversed(answers))
                return
            if len(self._waiting) + len(jobs) > self._max_waiting:
                raise Overloaded(f"the queue is full: {len(self._waiting)} of {self._max_waiting} texts wait already")
            self._waiting.extend(answers)

    def _requests(self) -> Sequence[Answer]:
        return [*self._waiting, *self._running]

    def _step(self) -> None:
        self._admit()
        if not self._running:
            return
        owners = {slot: (answer, beam) for answer in self._running for beam, slot in enumerate(answer.slots)}
        tokens = {answer: answer.search.next_tokens for answer in self._running}
        rows = []
        for slot in range(len(owners)):
            answer, beam = owners[slot]
            rows.append(Row(answer, tokens[answer][beam], answer.search.position))
        logits = self._decoder.run(rows)
        self._recorder.observe("batch_size", len(rows))
        length = max(row.position for row in rows) + 1
        copies: list[Copy] = []
        for answer in list(self._running):
            before = answer.search.tokens
            try:
                parents = answer.search.advance(logits[answer.slots])
                answer.generated += 1
            except Exception as error:
                logger.exception("an answer could not be searched for")
                self._release(answer)
                self._fail(answer, error)
                continue
            copies += self._follow(answer, parents, before)
            if answer.search.done:
                self._release(answer)
                self._finish(answer)
        self._move(copies, length)
        self._compact(length)

    def _admit(self) -> None:
        used = sum(answer.beams for answer in self._running)
        room = ENCODED_BESIDE if self._running else None
        admitted: list[Answer] = []
        with self._changed:
            while self._waiting and used + self._waiting[0].beams <= self._decoder.slots:
                tokens = self._waiting[0].job.size
                if room is not None:
                    if admitted and tokens > room:
                        break
                    room -= tokens
                used += self._waiting[0].beams
                admitted.append(self._waiting.popleft())
        if not admitted:
            return
        failed = self._decoder.encode_all({answer: answer.job.source for answer in admitted})
        first = sum(answer.beams for answer in self._running)
        for answer in admitted:
            if (error := failed.get(answer)) is not None:
                logger.error("a text could not be encoded", exc_info=error)
                self._fail(answer, error)
                continue
            answer.slots = list(range(first, first + answer.beams))
            first += answer.beams
            answer.started = True
            self._recorder.observe("queue_time", answer.age)
            self._recorder.count("prompt_tokens", answer.job.size)
            self._running.append(answer)

    def _follow(self, answer: Answer, parents: Sequence[int], tokens: Sequence[Sequence[int]]) -> list[Copy]:
        """Give each beam the slot of its parent, or a copy of it in a slot that no beam goes on from.

        Args:
            tokens: of each beam before, which tell how much of its slot is the parent's already.
        """
        before = answer.slots
        free = [index for index in range(len(before)) if index not in parents]
        taken: set[int] = set()
        slots, copies = [], []
        for parent in parents:
            if parent in taken:
                alike = {index: _common(tokens[parent], tokens[index]) for index in free}
                dropped = max(free, key=alike.__getitem__)
                free.remove(dropped)
                copies.append(Copy(before[parent], before[dropped], len(answer.job.prompt) + alike[dropped]))
                slots.append(before[dropped])
            else:
                taken.add(parent)
                slots.append(before[parent])
        answer.slots = slots
        return copies

    def _move(self, copies: Sequence[Copy], length: int) -> None:
        if copies:
            self._decoder.move(copies, length)

    def _compact(self, length: int) -> None:
        """Move the last slots into those that became free: a run takes the first slots of the cache."""
        used = sorted(slot for answer in self._running for slot in answer.slots)
        free = [slot for slot in range(len(used)) if slot not in set(used)]
        moved = dict(zip([slot for slot in used if slot >= len(used)], free, strict=True))
        self._move([Copy(source, target) for source, target in moved.items()], length)
        for answer in self._running:
            answer.slots = [moved.get(slot, slot) for slot in answer.slots]

    def _remove(self, request: Answer) -> None:
        if request.started:
            self._release(request)
            self._compact(max((answer.search.position + 1 for answer in self._running), default=0))
        else:
            with self._changed:
                self._waiting.remove(request)

    def _release(self, answer: Answer) -> None:
        self._running.remove(answer)
        self._decoder.remove(answer)

    def _finish(self, answer: Answer) -> None:
        self._recorder.count("generated_tokens", answer.generated)
        self._recorder.observe("request_duration", answer.age)
        try:
            answer.job.consumer.finish(answer.search.found())
        except Exception as error:
            logger.exception("an answer could not be finished")
            self._fail(answer, error)

    def _finish_cancelled(self, request: Answer) -> None:
        request.job.consumer.finish(None)

    def _clear(self) -> Sequence[Answer]:
        with self._changed:
            left = self._requests()
            self._waiting.clear()
        for answer in list(self._running):
            self._release(answer)
        return left

    def _record_state(self) -> None:
        slots = sum(len(answer.slots) for answer in self._running)
        self._recorder.set(requests_running=len(self._running), requests_waiting=len(self._waiting), slots_used=slots)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two sequences begin with alike."""
    for count, (first, second) in enumerate(zip(one, other, strict=True)):
        if first != second:
            return count
    return len(one)
