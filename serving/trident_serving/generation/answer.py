"""One answer of a causal model while it is generated: logits in, tokens to the consumer out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

from trident_serving.generation import scheduler
from trident_serving.generation.batch import Embeds, RopePositions
from trident_serving.generation.draft_model import ModelAcceptance
from trident_serving.generation.drafting import SequenceDrafts
from trident_serving.generation.ngram_pool import NgramPool
from trident_serving.runtime import loop
from trident_serving.runtime.log_probabilities import Logits, TokenLogProbs, log_probabilities
from trident_serving.runtime.metrics import Recorder
from trident_serving.runtime.sampling.grammars import Guide, Mask
from trident_serving.runtime.sampling.params import SamplingParams
from trident_serving.runtime.sampling.sampler import Sampler


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    CONTENT_FILTER = "content_filter"  # a guard's rule


class Consumer(loop.Consumer, Protocol):
    """Who receives the tokens of one request; called on the engine's thread, so it must be quick."""

    def accept(self, token: int, log_probs: TokenLogProbs | None) -> bool:
        """Take one token; True ends the answer (a stop string was found)."""
        ...

    def accept_prompt(self, log_probs: list[TokenLogProbs]) -> None:
        """Take log-probabilities of the prompt's next tokens; the first token has none."""
        ...

    def finish(self, reason: FinishReason) -> None:
        """The answer is complete; nothing follows."""
        ...


@dataclass
class Job:
    """One request as it is submitted.

    Attributes:
        log_probs: whether the consumer gets log-probabilities.
        top_log_probs: of how many of the likeliest tokens, besides that of the chosen one.
        prompt_lookup: whether drafts may be taken from the sequence itself and from the pool, to which the answer is
            given then; greedy requests only.
        seconds: it fails once this time is over, waiting included; None: never.
        submitted: when the request came, by `time.monotonic`; None: now.
        stop_token_ids: end the answer beside the model's own end tokens.
        ignore_eos: the model's own do not.
        prompt_log_probs: of how many of the likeliest tokens the consumer gets log-probabilities at each token of the
            prompt, beside that token's own; None: none at all.
        guide: through the grammar that the answer follows; None: it is free.
        adapter: number of the model's adapter that answers; 0: the base does.
        images: of the prompt, see `slots.Content`.
        embeds: the vectors of these images' tokens; None: it has no images.
        rope: positions of its tokens in time, height and width; None: they are their places in the text.
    """

    prompt_ids: Sequence[int]
    sampling: SamplingParams
    consumer: Consumer
    log_probs: bool = False
    top_log_probs: int = 0
    prompt_lookup: bool = True
    seconds: float | None = None
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    prompt_log_probs: int | None = None
    guide: Guide | None = None
    adapter: int = 0
    submitted: float | None = None
    images: tuple[tuple[int, bytes], ...] = ()
    embeds: Embeds | None = None
    rope: RopePositions | None = None


class Answer(scheduler.Sequence, loop.Request):
    """A job with what changes while it runs.

    Attributes:
        drafts: of its next tokens; None where it is not drafted.
        guide: see `Job`.
        embeds, rope: see `Job`; None, too, once the answer has ended.
    """

    def __init__(
        self,
        job: Job,
        eos_token_ids: frozenset[int],
        recorder: Recorder,
        *,
        prompt_lookup: bool,
        pool: NgramPool | None = None,
        model: ModelAcceptance | None = None,
    ) -> None:
        scheduler.Sequence.__init__(self, list(job.prompt_ids), job.sampling.max_tokens, job.adapter, job.images)
        loop.Request.__init__(self, job.consumer, job.seconds, job.submitted)
        # So that `embeds` and `rope` are all that holds them.
        self._job = job if job.embeds is None else replace(job, embeds=None, rope=None)
        self._ends = job.stop_token_ids | (frozenset() if job.ignore_eos else eos_token_ids)
        self._recorder = recorder
        self._sampler = Sampler.causal(job.sampling, job.prompt_ids, self._ends)
        self._last_token_at = self.submitted
        self.guide = job.guide
        self.embeds, self.rope = job.embeds, job.rope
        self.scored = job.prompt_log_probs is not None
        lookup = prompt_lookup and job.prompt_lookup
        self.drafts: SequenceDrafts | None = None
        if job.sampling.greedy and (lookup or model is not None):
            # What a grammar allows tells little of what the model says without it.
            pool = pool if lookup and job.guide is None else None
            self.drafts = SequenceDrafts(self.tokens, pool, own_text=lookup, model=model, guess=self._sampler.guess)

    def forced(self, limit: int) -> list[int]:
        """At most `limit` tokens that the grammar forces, if there is one."""
        return [] if self.guide is None else self.guide.forced(limit)

    def fitting(self, draft: list[int]) -> list[int]:
        """The beginning of a draft that the grammar allows, if there is one."""
        if self.guide is None or not draft:
            return draft
        fitting = self.guide.fits(draft)
        if not fitting and self.drafts is not None and self.drafts.origin == "model":
            self._record_draft(len(draft), 0)
        return fitting

    def take(self, logits: Logits, draft: Sequence[int], masks: Mask | None = None) -> FinishReason | None:
        """Choose the next tokens and hand them out; returns why the answer ends, if it does.

        Args:
            logits: of the last token and of each token of the draft, [1 + draft, vocabulary].
            draft: the tokens that were run behind the last one.
            masks: which tokens the grammar allows at each, the same shape.
        """
        reason, accepted = None, 0
        for index, scores in enumerate(logits):
            token = self._sampler.choose(scores, None if masks is None else masks[index])
            self.cached = len(self.tokens)
            self.tokens.append(token)
            complete = self.guide is not None and self.guide.accept(token)
            reason = self._hand_out(token, scores)
            if complete:
                reason = FinishReason.STOP
            if reason is not None or index == len(draft) or token != draft[index]:
                break
            accepted += 1
        if draft:
            self._record_draft(len(draft), accepted)
        return reason

    def score_prompt(self, logits: Logits, start: int) -> None:
        """Hand out the log-probabilities of tokens of the prompt.

        Args:
            logits: of the tokens from `start` on, [tokens, vocabulary].
        """
        expected = self.tokens[start + 1 : start + 1 + len(logits)]
        top = self._job.prompt_log_probs or 0
        found = [log_probabilities(each, token, top) for each, token in zip(logits, expected, strict=False)]
        self._job.consumer.accept_prompt(found)

    def finish(self, reason: FinishReason) -> None:
        """Tell the consumer that the answer is complete."""
        self._job.consumer.finish(reason)
        if self.drafts is not None:
            self.drafts.keep()

    def _hand_out(self, token: int, logits: Logits) -> FinishReason | None:
        job = self._job
        log_probs = log_probabilities(logits, token, job.top_log_probs) if job.log_probs else None
        self.generated += 1
        self._record_token()
        stopped = job.consumer.accept(token, log_probs)
        if stopped or token in self._ends:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.generated >= job.sampling.max_tokens else None

    def _record_draft(self, drafted: int, accepted: int) -> None:
        if self.drafts is None or (self.guide is not None and self.drafts.origin != "model"):
            return
        self.drafts.record(drafted, accepted)
        counted = [""] if self.drafts.origin == "text" else ["", f"{self.drafts.origin}_"]
        for prefix in counted:
            self._recorder.count(f"{prefix}draft_tokens", drafted)
            self._recorder.count(f"{prefix}draft_tokens_accepted", accepted)

    def _record_token(self) -> None:
        now = time.monotonic()
        name = "time_to_first_token" if self.generated == 1 else "inter_token_latency"
        self._recorder.observe(name, now - self._last_token_at)
        self._recorder.count("generated_tokens")
        self._last_token_at = now
