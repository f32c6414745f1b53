"""The engine that generates: a step schedules, runs the model, and lets every answer take its tokens.

The engine knows token ids, not text; a `Consumer` turns them into text and says when it has enough. `submit` may be
called from any thread.

Every token's numbers are the same to the last bit whatever runs with it (see `batch`); reuse of prefixes and
verification of drafts rest on that.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from trident_serving.errors import InvalidRequest
from trident_serving.generation.answer import Answer, FinishReason, Job
from trident_serving.generation.batch import SlotTokens
from trident_serving.generation.decoder import Decoder, run_each
from trident_serving.generation.draft_model import DraftModel, Followed, ModelDrafter
from trident_serving.generation.drafting import MAX_DRAFT, Drafter, Wanted
from trident_serving.generation.ngram_pool import NgramPool
from trident_serving.generation.scheduler import PrefillChunk, Scheduler
from trident_serving.generation.slots import Placement, SlotPool
from trident_serving.runtime.log_probabilities import Logits
from trident_serving.runtime.loop import EngineLoop
from trident_serving.runtime.metrics import Recorder
from trident_serving.runtime.sampling.grammars import Guide, Mask, MaskMaker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineSettings:
    """Limits of an engine.

    Attributes:
        slots: sequences that run at once.
        cache_tokens: tokens that they may hold together.
        prefill_chunk: prompt tokens in one step at most.
        max_waiting: requests that may wait for a slot.
        prefix_reuse: whether prompts start behind what the cache already holds of them.
        prompt_lookup: whether greedy requests may be drafted from texts.
        ngram_pool: whether their drafts may come from other answers.
        whole_prefixes: what the cache holds is reused as a whole or not at all.
        original_context: tokens up to which a text has the first of the model's two rotations; 0: there is one.
    """

    slots: int
    cache_tokens: int
    prefill_chunk: int
    max_waiting: int
    prefix_reuse: bool = True
    prompt_lookup: bool = True
    ngram_pool: bool = True
    whole_prefixes: bool = False
    original_context: int = 0


class Engine(EngineLoop[Answer]):
    """Continuous batching over a decoder.

    Args:
        decoder: runs the model over slots of its cache.
        eos_token_ids: tokens that end an answer; they are not handed to the consumer as text.
        draft: a smaller model that drafts; None: there is none.
    """

    def __init__(
        self,
        decoder: Decoder,
        settings: EngineSettings,
        *,
        eos_token_ids: frozenset[int],
        recorder: Recorder | None = None,
        draft: DraftModel | None = None,
    ) -> None:
        super().__init__("engine", recorder)
        self._decoder = decoder if draft is None else Followed(decoder, draft)
        self._settings = settings
        self._eos_token_ids = eos_token_ids
        self._drafter = Drafter() if draft is None else ModelDrafter(draft, eos_token_ids)
        self._ngram_pool = NgramPool() if settings.prompt_lookup and settings.ngram_pool else None
        self._mask_maker = MaskMaker()
        self._scheduler = self._new_scheduler()
        self._recorder.set(slots=settings.slots, kv_cache_tokens_limit=settings.cache_tokens)
        self.start()

    def submit(self, *jobs: Job) -> None:
        """Queue jobs, all or none; their consumers hear of it from the engine's thread.

        Args:
            jobs: with the same prompt, which is computed once.

        Raises:
            Overloaded: the queue is full, or the engine is stopping.
        """
        lookup, pool = self._settings.prompt_lookup, self._ngram_pool
        answers = [
            Answer(
                job,
                self._eos_token_ids,
                self._recorder,
                prompt_lookup=lookup,
                pool=pool,
                model=self._drafter.acceptance(),
            )
            for job in jobs
        ]
        for answer in answers[1:]:
            answer.leader = answers[0]
        with self._adding():
            self._scheduler.add(*answers)
            self._recorder.set(requests_waiting=self._scheduler.waiting)

    def _new_scheduler(self) -> Scheduler[Answer]:
        settings = self._settings
        self._pool = SlotPool(
            settings.slots,
            settings.cache_tokens,
            reuse=settings.prefix_reuse,
            can_copy=self._decoder.can_copy,
            whole=settings.whole_prefixes,
        )
        return Scheduler(self._pool, settings.prefill_chunk, settings.max_waiting, settings.original_context)

    def _requests(self) -> Sequence[Answer]:
        return self._scheduler.sequences

    def _step(self) -> None:
        with self._changed:
            step = self._scheduler.schedule()
        for answer in step.restarted:
            self._decoder.release(_slot(answer), 0)
        for answer, placement in step.placed:
            self._place(answer, placement)
        if step.prefill:
            self._prefill(step.prefill)
        if step.decode:
            self._decode(step.decode)

    def _place(self, answer: Answer, placement: Placement) -> None:
        # What the slot held beyond is not accounted for any more.
        self._decoder.release(placement.slot, placement.reused if placement.source is None else 0)
        if placement.source is not None:
            self._decoder.copy(placement.source, placement.slot, placement.reused)
        for slot in placement.evicted:
            self._decoder.release(slot, 0)
        answer.started = True
        self._recorder.observe("queue_time", answer.age)
        self._recorder.count("prompt_tokens", answer.prompt_length)
        self._recorder.count("prefix_hit_tokens", placement.reused)

    def _prefill(self, chunks: Sequence[PrefillChunk[Answer]]) -> None:
        answers = [chunk.sequence for chunk in chunks]
        items = []
        for answer, chunk in zip(answers, chunks, strict=True):
            tokens = answer.tokens[chunk.start : chunk.end]
            count = len(tokens) if answer.scored else int(chunk.is_last)
            items.append(_tokens(answer, chunk.start, tokens, count))
        guides = [answer.guide if chunk.is_last else None for answer, chunk in zip(answers, chunks, strict=True)]
        with self._masks([(guide, ()) for guide in guides]) as masks:
            found = self._run(answers, items)
        for answer, chunk, logits, mask in zip(answers, chunks, found, masks, strict=True):
            if logits is not None:
                answer.cached = chunk.end
                if answer.scored:
                    answer.score_prompt(logits, chunk.start)
                    answer.scored = not chunk.is_last  # once, though an answer may run again
                if chunk.is_last and answer.max_tokens:
                    self._take(answer, logits[-1:], [], mask)
                elif chunk.is_last:
                    self._remove(answer)
                    self._finish(answer, FinishReason.LENGTH)

    def _decode(self, answers: Sequence[Answer]) -> None:
        limits = [self._longest_draft(each) for each in answers]
        forced = [each.forced(min(limit, MAX_DRAFT)) for each, limit in zip(answers, limits, strict=True)]
        drafts = self._drafter.draft(
            [
                Wanted(each.drafts, 0 if known else limit, _slot(each))
                for each, limit, known in zip(answers, limits, forced, strict=True)
            ]
        )
        drafts = [known or each.fitting(draft) for each, draft, known in zip(answers, drafts, forced, strict=True)]
        items = [
            _tokens(answer, answer.cached, [answer.tokens[-1], *draft], 1 + len(draft))
            for answer, draft in zip(answers, drafts, strict=True)
        ]
        self._recorder.observe("batch_size", len(answers))
        started = time.perf_counter()
        wanted = [(answer.guide, draft) for answer, draft in zip(answers, drafts, strict=True)]
        with self._masks(wanted) as masks:
            found = self._run(answers, items)
        self._drafter.record(drafts, time.perf_counter() - started)
        for answer, draft, logits, mask in zip(answers, drafts, found, masks, strict=True):
            if logits is not None:
                self._take(answer, logits, draft, mask)

    def _longest_draft(self, answer: Answer) -> int:
        if self._settings.whole_prefixes:  # a draft that is refused can't be taken back, a grammar's neither
            return 0
        # The last token of an answer need not be drafted: it comes with the verification.
        longest = answer.max_tokens - answer.generated - 1
        if self._settings.original_context and not answer.rotation:  # whose next rotation a draft does not have
            longest = min(longest, self._settings.original_context - len(answer.tokens))
        return longest

    def _run(self, answers: Sequence[Answer], items: Sequence[SlotTokens]) -> list[Logits | None]:
        """The wanted logits of each answer; None for one that failed, which has ended."""
        found: list[Logits | None] = []
        for answer, result in zip(answers, run_each(self._decoder, items), strict=True):
            if isinstance(result, Exception):
                self._remove(answer, trusted=False)
                self._fail(answer, result)
            found.append(None if isinstance(result, Exception) else result)
        return found

    @contextmanager
    def _masks(self, wanted: Sequence[tuple[Guide | None, Sequence[int]]]) -> Iterator[list[Mask | None]]:
        """What grammars allow behind the tokens of a run, computed beside it: a list that is filled when it ends."""
        masks: list[Mask | None] = []
        begun = self._mask_maker.begin(wanted)
        yield masks
        masks += begun.result() if begun is not None else [None] * len(wanted)

    def _take(self, answer: Answer, logits: Logits, draft: Sequence[int], masks: Mask | None) -> None:
        """Let an answer take its tokens; an error ends only this answer."""
        try:
            reason = answer.take(logits, draft, masks)
        except Exception as error:
            if not isinstance(error, InvalidRequest):
                logger.exception("a token could not be chosen")
            self._remove(answer, trusted=False)
            self._fail(answer, error)
            return
        if reason is not None:
            self._remove(answer)
            self._finish(answer, reason)

    def _finish(self, answer: Answer, reason: FinishReason) -> None:
        self._recorder.observe("request_duration", answer.age)
        try:
            answer.finish(reason)
        except Exception as error:
            logger.exception("an answer could not be finished")
            self._fail(answer, error)

    def _finish_cancelled(self, request: Answer) -> None:
        self._finish(request, FinishReason.CANCELLED)

    def _remove(self, request: Answer, *, trusted: bool = True) -> None:
        with self._changed:
            self._scheduler.remove(request, trusted=trusted)
        request.embeds = request.rope = None  # its slot keeps the answer, for the prompts of others

    def _clear(self) -> Sequence[Answer]:
        with self._changed:
            left, self._scheduler = self._scheduler.sequences, self._new_scheduler()
        return left

    def _record_state(self) -> None:
        with self._changed:
            self._recorder.set(
                requests_running=self._scheduler.running,
                requests_waiting=self._scheduler.waiting,
                slots_used=self._pool.running,
                kv_cache_tokens=self._pool.held,
                kv_cache_tokens_reserved=self._pool.reserved,
            )


def _tokens(answer: Answer, start: int, tokens: list[int], wanted: int) -> SlotTokens:
    end = start + len(tokens)
    embeds = None if answer.embeds is None else answer.embeds.part(start, end)
    rope = None if answer.rope is None else answer.rope.part(start, end)
    return SlotTokens(_slot(answer), start, tokens, wanted, answer.rotation, answer.adapter, embeds, rope)


def _slot(answer: Answer) -> int:
    assert answer.slot is not None
    return answer.slot
