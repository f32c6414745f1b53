"""Drafts by a second, smaller model with the same tokens (Leviathan et al., "Fast Inference from Transformers via
Speculative Decoding", 2023).

The draft model has a slot for each slot of the model. Nothing keeps the two in step: a draft's slot knows which tokens
it holds, and before it drafts it runs those of the sequence that it does not hold. So a refused token, a slot that was
given away or a sequence that was not drafted for a while cost time, and never an answer: the model verifies every
token, as it does with drafts from texts.

Unlike those, a draft token costs before it is verified. So the length is chosen first, from how often the draft was
right and from what steps of both models take; see `allot_rounds`. Where it does not pay, nothing is drafted. One
hundredth of the time then goes into answers that the draft reads, in one run, to see how many of their tokens it would
have said.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trident_serving.artefacts import DRAFT, DraftSettings
from trident_serving.generation.batch import SlotTokens
from trident_serving.generation.decoder import Decoder, OnnxDecoder
from trident_serving.generation.drafting import (
    MAX_DRAFT,
    Acceptance,
    Drafter,
    Guess,
    Proposal,
    SequenceDrafts,
    StepCost,
    StepTimes,
    Wanted,
)
from trident_serving.generation.slots import MIN_REUSED, common_prefix
from trident_serving.runtime.log_probabilities import Logits
from trident_serving.schema.limits import GenerationLimits

logger = logging.getLogger(__name__)

WARM_UP = 4  # runs
FIRST_CHANCE = 0.8  # of a draft model about which nothing is known
FIRST_ANSWER = 64.0  # tokens of an answer before any was given
SHARED_MEMORY = 0.99  # the weight of a draft once the next one is known, over all sequences
WEIGHT = 4.0  # draft tokens that what is known of the other sequences counts as
RETURN = 0.03  # how fast a sequence that is not drafted goes back to what is known of the others, a step
MARGIN = 2.0  # times what it takes to run a text must be saved: the answer may end, or others come
EXPLORED = 0.01  # the share of the time that goes into seeing whether drafts would pay that do not seem to
FIRST_EXPLORED = 4  # steps whose time does so in the beginning
LEAST_EXPLORED, MOST_EXPLORED = 16, 32  # tokens of an answer that tell how the draft does; each takes memory for logits


class DraftModel:
    """The decoder that drafts, and which tokens its slots hold.

    Args:
        decoder: with as many slots as the model's has.
        context: tokens that one of its slots takes at most.
        vocabulary: tokens of the model, and of the draft; what one has beyond the other, no tokenizer gives.
        chunk: tokens of texts that it runs in one step at most before it drafts.
    """

    def __init__(self, decoder: Decoder, slots: int, context: int, vocabulary: tuple[int, int], chunk: int) -> None:
        self.context, self.chunk = context, chunk
        self.times = StepTimes()
        self._decoder = decoder
        self._vocabulary, self._own_vocabulary = vocabulary
        self._held: list[list[int]] = [[] for _ in range(slots)]

    def warm_up(self) -> None:
        """Run a token some times, so that it is known what it takes before the first draft: the fastest run tells."""
        took = []
        for _ in range(WARM_UP):
            started = time.perf_counter()
            self.run([(0, 0, [0])])
            took.append(time.perf_counter() - started)
        self.release(0, 0)
        self.times = StepTimes()
        self.times.record(1, 0, min(took))

    def held(self, slot: int, tokens: Sequence[int]) -> int:
        """How many of the tokens a slot holds, at most all but the last, which is to run."""
        return common_prefix(self._held[slot], tokens, len(tokens) - 1)

    def run(self, items: Sequence[tuple[int, int, Sequence[int]]], wanted: int = 1) -> Logits:
        """Append tokens to slots.

        Args:
            items: slot, the position of the first token, and the tokens, at least one.
            wanted: how many of the last tokens of each get logits.

        Returns:
            Logits, item by item, float32 [items x wanted, tokens of the model]; valid until the next call.
        """
        started = time.perf_counter()
        known = [[token if token < self._own_vocabulary else 0 for token in tokens] for _, _, tokens in items]
        to_run = [SlotTokens(slot, start, ids, wanted) for (slot, start, _), ids in zip(items, known, strict=True)]
        for slot, start, _ in items:
            del self._held[slot][start:]
        logits = self._fitting(self._decoder.run(to_run))
        for slot, _, tokens in items:
            self._held[slot] += tokens
        more = sum(len(tokens) for _, _, tokens in items) - len(items)
        self.times.record(len(items), more, time.perf_counter() - started)
        return logits

    def _fitting(self, logits: Logits) -> Logits:
        """Logits of the model's tokens; what the draft does not have is never likely."""
        missing = self._vocabulary - logits.shape[1]
        if missing > 0:
            return np.pad(logits, ((0, 0), (0, missing)), constant_values=-np.inf)
        return logits[:, : self._vocabulary]

    def reuse(self, slot: int, tokens: Sequence[int]) -> None:
        """Copy the beginning of a text from another slot, if one holds more of it."""
        if not self._decoder.can_copy:
            return
        source = max(range(len(self._held)), key=lambda index: self.held(index, tokens))
        length = self.held(source, tokens)
        if length >= self.held(slot, tokens) + MIN_REUSED:
            self.copy(source, slot, length)

    def copy(self, source: int, target: int, length: int) -> None:
        """The first positions of a slot become those of another, as far as that holds them."""
        self.release(target, 0)
        self._held[target] = self._held[source][:length]
        if self._held[target]:
            self._decoder.copy(source, target, len(self._held[target]))

    def release(self, slot: int, start: int) -> None:
        """The slot's positions from `start` on are not needed any more."""
        del self._held[slot][start:]
        self._decoder.release(slot, len(self._held[slot]))


def open_decoder(folder: Path, settings: DraftSettings, limits: GenerationLimits, device_id: int) -> OnnxDecoder:
    """The decoder of the graph that drafts, in a model's version folder."""
    return OnnxDecoder(
        folder / DRAFT / "model.onnx",
        slots=limits.slots,
        context=min(limits.context, settings.context),
        longest_run=min(max(limits.prefill_chunk, MAX_DRAFT + 1), settings.longest_run),
        threads=limits.threads,
        device=limits.device,
        device_id=device_id,
    )


def over_decoder(
    decoder: OnnxDecoder, settings: DraftSettings, limits: GenerationLimits, vocabulary: int
) -> DraftModel:
    """The draft model over its decoder.

    Args:
        vocabulary: of the model.
    """
    return DraftModel(
        decoder,
        limits.slots,
        # A text beyond the original context of a draft with two rotations would have to run again.
        min(decoder.context, decoder.original_context or decoder.context),
        (vocabulary, decoder.vocabulary_size),
        min(limits.prefill_chunk, settings.longest_run),
    )


class Followed:
    """A model's decoder whose slots the draft's follow: what is copied or released is so in both.

    Args:
        decoder: the model's.
        draft: the draft's.
    """

    def __init__(self, decoder: Decoder, draft: DraftModel) -> None:
        self._decoder, self._draft = decoder, draft

    @property
    def can_copy(self) -> bool:
        """See `Decoder.can_copy`."""
        return self._decoder.can_copy

    def run(self, items: Sequence[SlotTokens]) -> Logits:
        """See `Decoder.run`."""
        return self._decoder.run(items)

    def copy(self, source: int, target: int, length: int) -> None:
        """See `Decoder.copy`."""
        self._decoder.copy(source, target, length)
        self._draft.copy(source, target, length)

    def release(self, slot: int, start: int) -> None:
        """See `Decoder.release`."""
        self._decoder.release(slot, start)
        self._draft.release(slot, start)


class History:
    """What is known of a draft model from all sequences.

    Attributes:
        chance: of a draft token to be right.
        answer: tokens of an answer, on average.
    """

    def __init__(self) -> None:
        self._right, self._tried = FIRST_CHANCE * WEIGHT, WEIGHT
        self.answer = FIRST_ANSWER

    @property
    def chance(self) -> float:
        """See there."""
        return self._right / self._tried

    def record(self, right: int, tried: int) -> None:
        """Of `tried` draft tokens whose predecessors were right, so many were right."""
        self._right = SHARED_MEMORY * self._right + right
        self._tried = SHARED_MEMORY * self._tried + tried

    def ended(self, tokens: int) -> None:
        """An answer has ended."""
        self.answer += 0.1 * (tokens - self.answer)


class ModelAcceptance(Acceptance):
    """How likely the draft model is right in one sequence: as in the others, until its own drafts tell."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._right, self._tried = history.chance * WEIGHT, WEIGHT

    def chance(self) -> float:
        """The chance of each token of a draft."""
        return self._right / self._tried

    def rest(self) -> None:
        """The sequence was not drafted in this step."""
        self._right += RETURN * (self._history.chance * WEIGHT - self._right)
        self._tried += RETURN * (WEIGHT - self._tried)

    def record(self, drafted: int, accepted: int) -> None:
        """See `Acceptance.record`."""
        tried = accepted + (accepted < drafted)
        self._right = 0.8 * self._right + accepted
        self._tried = 0.8 * self._tried + tried
        self._history.record(accepted, tried)

    def ended(self, tokens: int) -> None:
        """The answer has ended with so many tokens."""
        self._history.ended(tokens)

    def left(self, generated: int, limit: int) -> float:
        """Tokens that an answer of so many is expected to have still, `limit` at most: as the others, or twice as many.

        Args:
            generated: tokens of it so far.
            limit: that it may still have.
        """
        return min(limit, max(self._history.answer - generated, generated))


def allot_rounds(
    chances: Sequence[float], limits: Sequence[int], rest: tuple[float, float], token: float, draft: StepCost
) -> list[int]:
    """Draft lengths that make the most tokens a second, where a model drafts.

    It gives every sequence that drafts still one token in each round. A round is added, with as many of the likeliest
    sequences as pay, while that raises the tokens that the step is expected to give, over what it takes.

    Args:
        chances: of each sequence.
        limits: longest draft of each.
        rest: tokens that the step is expected to give without these drafts, and what it takes.
        token: what verifying a draft token takes.
        draft: of a step of the draft model.
    """
    lengths, gains = [0] * len(chances), list(chances)
    expected, spent = rest
    drafting = list(range(len(chances)))
    while True:
        drafting = sorted((i for i in drafting if lengths[i] < limits[i]), key=lambda i: -gains[i])
        best, gained, gain = 0, 0.0, 0.0
        rate = expected / spent
        for count, index in enumerate(drafting, 1):
            gain += gains[index]
            found = (expected + gain) / (spent + count * token + draft.of(count, 0))
            if found > rate:
                best, gained, rate = count, gain, found
        if not best:
            return lengths
        expected += gained
        spent += best * token + draft.of(best, 0)
        drafting = drafting[:best]
        for index in drafting:
            lengths[index] += 1
            gains[index] *= chances[index]


def best_rate(chance: float, limit: int, step: float, token: float) -> float:
    """Tokens a second of one sequence with the best length of its drafts.

    Args:
        chance: of each draft token.
        limit: tokens of a draft at most.
        step: its share of a step without drafts.
        token: what a draft token takes.
    """
    gain, expected, best = 1.0, 1.0, 1 / step
    for length in range(1, limit + 1):
        gain *= chance
        expected += gain
        best = max(best, expected / (step + length * token))
    return best


@dataclass(frozen=True)
class _Candidate:
    """A sequence that the model may draft.

    Attributes:
        index: in the step.
        guess: from the draft's logits to the token that the answer would take.
        chance: of each draft token.
        limit: tokens of a draft at most.
        generated: tokens of the answer.
        behind: tokens that the draft must run before the last one.
        saved: what the rest of the answer takes less if it is drafted, in seconds.
    """

    index: int
    slot: int
    tokens: Sequence[int]
    guess: Guess
    chance: float
    limit: int
    generated: int
    behind: int
    saved: float


class ModelDrafter(Drafter):
    """The drafts of a step from texts, and by a model where that makes more of it.

    Args:
        model: it drafts.
        ends: tokens that nothing is drafted behind.
    """

    def __init__(self, model: DraftModel, ends: frozenset[int]) -> None:
        super().__init__()
        self._model: DraftModel | None = model
        self._ends = ends
        self._history = History()
        self._idle = False  # whether nothing was drafted by the model, though it could have been
        self._saved_up: float | None = None  # seconds for seeing whether it would pay; None: not known yet
        model.warm_up()

    def acceptance(self) -> ModelAcceptance | None:
        """See `Drafter.acceptance`."""
        return None if self._model is None else ModelAcceptance(self._history)

    def draft(self, sequences: Sequence[Wanted]) -> list[list[int]]:
        """See `Drafter.draft`."""
        if self._model is None or not self._times.known:
            return super().draft(sequences)
        proposals, cost = self._proposals(sequences), self._times.cost()
        by_text = self._cut(proposals, cost)
        candidates = self._candidates(sequences, proposals, cost, self._model)
        try:
            drafted = self._by_model(candidates, proposals, by_text, cost, self._model)
        except Exception:
            logger.exception("the draft model failed: answers go on without it until the model is loaded again")
            self._model = None
            return by_text
        self._idle = bool(candidates) and not drafted
        for candidate in candidates:
            owner = _drafts(sequences[candidate.index])
            if candidate.index in drafted:
                owner.origin = "model"
            elif owner.model is not None:
                owner.model.rest()
        return [drafted.get(index, draft) for index, draft in enumerate(by_text)]

    def record(self, drafts: Sequence[Sequence[int]], seconds: float) -> None:
        """See `Drafter.record`."""
        super().record(drafts, seconds)
        if self._idle and self._saved_up is not None:
            self._saved_up += EXPLORED * seconds

    def _candidates(
        self, sequences: Sequence[Wanted], proposals: Sequence[Proposal], cost: StepCost, model: DraftModel
    ) -> list[_Candidate]:
        """Sequences that the model can draft, and what that saves."""
        able = []
        for index, each in enumerate(sequences):
            if each.drafts is not None and each.drafts.model is not None:
                limit = min(each.limit, MAX_DRAFT, model.context + 1 - len(each.drafts.tokens))
                able += [(index, each, each.drafts, each.drafts.model, limit)] if limit > 0 else []
        if not able:
            return []
        draft, step = model.times.cost(), cost.of(len(sequences), 0) / len(sequences)
        token = cost.token + draft.of(len(able), 0) / len(able)
        found = []
        for index, each, drafts, acceptance, limit in able:
            chance, text = proposals[index]
            before = best_rate(chance, len(text), step, cost.token)
            now = best_rate(acceptance.chance(), limit, step, token)
            generated = len(drafts.tokens) - drafts.prompt_length
            left = acceptance.left(generated, each.limit + 1)
            behind = len(drafts.tokens) - 1 - model.held(each.slot, drafts.tokens)
            saved = left * (1 / before - 1 / now)
            found.append(
                _Candidate(
                    index,
                    each.slot,
                    drafts.tokens,
                    drafts.guess,
                    acceptance.chance(),
                    limit,
                    generated,
                    behind,
                    saved,
                )
            )
        return found

    def _by_model(
        self,
        candidates: Sequence[_Candidate],
        proposals: Sequence[Proposal],
        by_text: Sequence[Sequence[int]],
        cost: StepCost,
        model: DraftModel,
    ) -> dict[int, list[int]]:
        """What the model drafts, by the sequence's index in the step."""
        token = model.times.cost().token
        ready = self._catch_up([each for each in candidates if each.saved > MARGIN * each.behind * token], model)
        lengths = self._lengths(ready, proposals, by_text, cost, model)
        if any(lengths):
            self._saved_up = 0.0
        else:
            self._explore(candidates, cost, model)
        found = self._run(ready, lengths, model)
        return {each.index: tokens for each, tokens in zip(ready, found, strict=True) if tokens}

    def _explore(self, candidates: Sequence[_Candidate], cost: StepCost, model: DraftModel) -> None:
        """Let the draft read an answer, if there is time for that, to see what of it it would have said."""
        if self._saved_up is None:
            self._saved_up = FIRST_EXPLORED * cost.of(1, 0)
        told = [each for each in candidates if min(each.behind, each.generated) >= LEAST_EXPLORED]
        if not told:
            return
        nearest = min(told, key=lambda each: each.behind)
        start, count = len(nearest.tokens) - 1 - nearest.behind, min(nearest.behind, model.chunk)
        price = model.times.cost().of(1, count)
        if self._saved_up < price:
            return
        self._saved_up -= price
        end = start + count
        wanted = max(0, min(count, MOST_EXPLORED, end + 1 - (len(nearest.tokens) - nearest.generated)))
        logits = model.run([(nearest.slot, start, nearest.tokens[start:end])], wanted)
        said = logits.argmax(axis=-1).tolist()
        answer = nearest.tokens[end + 1 - wanted : end + 1]
        self._history.record(sum(one == other for one, other in zip(said, answer, strict=True)), wanted)

    @staticmethod
    def _catch_up(chosen: Sequence[_Candidate], model: DraftModel) -> list[_Candidate]:
        """Run what the draft's slots lack, a chunk of it at most; returns the sequences that can be drafted now."""
        ready, items, room = [], [], model.chunk
        for each in chosen:
            start = len(each.tokens) - 1 - each.behind
            if each.behind > MAX_DRAFT:  # less of it runs with the first token of the draft
                model.reuse(each.slot, each.tokens)
                start = model.held(each.slot, each.tokens)
            behind = len(each.tokens) - 1 - start
            run = min(behind, room) if behind > MAX_DRAFT else 0
            if run:
                items.append((each.slot, start, each.tokens[start : start + run]))
                room -= run
            if behind - run <= MAX_DRAFT:
                ready.append(each)
        if items:
            model.run(items, wanted=0)
        return ready

    @staticmethod
    def _lengths(
        ready: Sequence[_Candidate],
        proposals: Sequence[Proposal],
        by_text: Sequence[Sequence[int]],
        cost: StepCost,
        model: DraftModel,
    ) -> list[int]:
        """How many tokens the model drafts of each, beside what texts draft of the others."""
        taken = {each.index for each in ready}
        others = [(proposals[i][0], len(draft)) for i, draft in enumerate(by_text) if i not in taken]
        expected = len(by_text) + sum(chance**n for chance, length in others for n in range(1, length + 1))
        spent = cost.of(len(by_text), sum(length for _, length in others))
        chances, limits = [each.chance for each in ready], [each.limit for each in ready]
        return allot_rounds(chances, limits, (expected, spent), cost.token, model.times.cost())

    def _run(self, ready: Sequence[_Candidate], lengths: Sequence[int], model: DraftModel) -> list[list[int]]:
        """Draft so many tokens of each sequence, one for all in each run."""
        found: list[list[int]] = [[] for _ in ready]
        drafting = [index for index, length in enumerate(lengths) if length]
        items = []
        for index in drafting:
            slot, tokens = ready[index].slot, ready[index].tokens
            start = model.held(slot, tokens)
            items.append((slot, start, tokens[start:]))
        while drafting:
            for index, logits in zip(drafting, model.run(items), strict=True):
                found[index].append(ready[index].guess(logits, found[index]))
            drafting = [i for i in drafting if len(found[i]) < lengths[i] and found[i][-1] not in self._ends]
            items = [(ready[i].slot, len(ready[i].tokens) + len(found[i]) - 1, found[i][-1:]) for i in drafting]
        return found


def _drafts(wanted: Wanted) -> SequenceDrafts:
    assert wanted.drafts is not None
    return wanted.drafts
