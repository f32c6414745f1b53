"""Speculative decoding without a second model: drafts found in texts, and how many of their tokens pay.

A draft is what followed the last time that the latest tokens stood in the sequence (Saxena, "Prompt Lookup Decoding",
2023), or in another answer (see `ngram_pool`). One run of the model verifies it, and a token that the model would not
have chosen ends it, so answers are those without drafts; batches are invariant to the last bit here, so that this holds
for every token.

How long a draft may be follows from what was accepted before and what a token costs: see `allot`. A sequence whose
drafts miss stops drafting for a while, twice as long each time. Its own text and the pool are judged apart, and so is a
draft model where there is one (see `draft_model`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from trident_serving.generation.ngram_pool import NgramPool
from trident_serving.generation.slots import common_prefix
from trident_serving.runtime.log_probabilities import Logits

if TYPE_CHECKING:
    from trident_serving.generation.draft_model import ModelAcceptance

MAX_DRAFT = 12
NGRAMS = (3, 2)  # how many of the latest tokens must be found, tried in this order
MAX_PAUSE = 64
EXPLORED = 0.35  # the chance of a first token about which nothing is known
MEMORY = 0.98  # the weight of a step's time once the next one is known
UNLEARNED = 32  # of the latest steps are kept until the cost is asked for
LONGEST = 1.5  # times as long as expected; a step that took longer was held up
Proposal = tuple[float, list[int]]  # the chance of each token to be right, and the tokens


Guess = Callable[[Logits, Sequence[int]], int]


def likeliest(logits: Logits, ahead: Sequence[int]) -> int:
    """The `Guess` of a sequence that takes the likeliest token."""
    return int(logits.argmax())


class PromptLookup:
    """Finds the continuation of the latest tokens in the tokens before them.

    Args:
        tokens: of the sequence; the caller appends to them.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def draft(self, length: int) -> list[int]:
        """Up to `length` tokens that may come next; none where the latest tokens are new."""
        tokens = self._tokens
        # The latest n-gram itself is indexed once it has a successor.
        for end in range(self._indexed, len(tokens)):
            for size in NGRAMS:
                if end >= size:
                    self._ends[tuple(tokens[end - size : end])] = end
        self._indexed = len(tokens)
        for size in NGRAMS:
            found = self._ends.get(tuple(tokens[len(tokens) - size :])) if len(tokens) >= size else None
            if found is not None:
                period = len(tokens) - found  # a text that repeats itself goes on doing so
                return [tokens[found + index % period] for index in range(length)]
        return []


class Acceptance:
    """How likely the next draft token of one sequence is right, from how its drafts did before."""

    def __init__(self) -> None:
        self._right = EXPLORED
        self._tried = 1.0
        self._misses = 0
        self._pause = 0

    def chance(self) -> float:
        """The chance of each token of a draft now; 0 while the sequence pauses. Call it once a step."""
        if self._pause:
            self._pause -= 1
            return 0.0
        if self._misses:
            return EXPLORED
        return self._right / self._tried

    def record(self, drafted: int, accepted: int) -> None:
        """A draft of `drafted` tokens was verified."""
        self._right = 0.8 * self._right + accepted
        self._tried = 0.8 * self._tried + accepted + (accepted < drafted)
        if accepted:
            self._misses = 0
        else:
            self._misses += 1
            self._pause = min(2**self._misses, MAX_PAUSE)


@dataclass
class Source:
    """A source of drafts of one sequence, and how they did.

    Attributes:
        draft: finds up to as many tokens as it is asked for.
    """

    draft: Callable[[int], list[int]]
    acceptance: Acceptance = field(default_factory=Acceptance)

    def propose(self, limit: int) -> Proposal:
        """The chance of each token to be right, and up to `limit` tokens; call it once a step."""
        chance = self.acceptance.chance()
        tokens = self.draft(limit) if chance else []
        return (chance, tokens) if tokens else (0.0, [])


class SequenceDrafts:
    """The drafts of one sequence: where they come from, and how they did.

    Args:
        tokens: of the sequence; the caller appends to them.
        pool: what other answers said; None: they draft nothing.
        own_text: whether its own text drafts.
        model: how the draft model does here; None: there is none.
        guess: see there.

    Attributes:
        tokens: see there.
        prompt_length: how many of them are the prompt.
        model: see there.
        guess: from logits, behind the sequence and some more tokens, to the token that it would take.
        origin: of the latest draft: "text", "pool", "model"; "": there was none.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        pool: NgramPool | None = None,
        *,
        own_text: bool = True,
        model: ModelAcceptance | None = None,
        guess: Guess = likeliest,
    ) -> None:
        self.tokens, self._pool = tokens, pool
        self.prompt_length = len(tokens)
        self.model, self.guess = model, guess
        self.origin = ""
        self._sources = {"text": Source(PromptLookup(tokens).draft)} if own_text else {}
        if pool is not None:
            self._sources["pool"] = Source(partial(pool.draft, tokens))
        self._found: tuple[str, list[int]] = ("", [])
        self._length = 0  # of the sequence when it was proposed

    def propose(self, limit: int) -> Proposal:
        """The chance of each token to be right, and up to `limit` tokens, often none; call it once a step."""
        best: Proposal = (0.0, [])
        self.origin, self._found, self._length = "", ("", []), len(self.tokens)
        if limit <= 0:
            return best
        for origin, source in self._sources.items():  # the sequence's own text comes first where both seem as good
            found = source.propose(limit)
            if found[0] > best[0]:
                best, self.origin, self._found = found, origin, (origin, found[1])
        return best

    def record(self, drafted: int, accepted: int) -> None:
        """The latest draft was verified; see `Acceptance.record`.

        Where the model drafted, what a text proposed is judged by what the sequence says now.
        """
        if self.origin == "model" and self.model is not None:
            self.model.record(drafted, accepted)
            origin, proposed = self._found
            said = self.tokens[self._length :]
            drafted = min(len(proposed), len(said))
            accepted = common_prefix(proposed, said, drafted)
        else:
            origin = self.origin
        if origin in self._sources and drafted:
            self._sources[origin].acceptance.record(drafted, accepted)

    def keep(self) -> None:
        """The answer has ended: give it to the pool."""
        if self._pool is not None:
            self._pool.add(self.tokens, self.prompt_length)
        if self.model is not None:
            self.model.ended(len(self.tokens) - self.prompt_length)


@dataclass(frozen=True)
class Wanted:
    """A sequence that decodes.

    Attributes:
        drafts: of it; None: it has none.
        limit: tokens of a draft at most.
        slot: of the KV cache.
    """

    drafts: SequenceDrafts | None
    limit: int
    slot: int


@dataclass(frozen=True)
class StepCost:
    """What a step takes, in any unit of time: `base`, and an amount for each sequence and each draft token."""

    base: float
    sequence: float
    token: float

    def of(self, sequences: int, drafted: int) -> float:
        """The cost of a step."""
        return self.base + sequences * self.sequence + drafted * self.token


class StepTimes:
    """What steps take, learned from those that were run: least squares with fading memory.

    Times change while a model is served, with the length of the sequences and with what else the machine does; a
    measurement when the model is loaded would hold what other models' loading took from it for good.
    """

    def __init__(self) -> None:
        guess = StepCost(
            base=5.0, sequence=1.0, token=1.0
        )  # of what has not been seen yet, in proportion to the first step
        self._guess = np.array([guess.base, guess.sequence, guess.token])
        self._seen = False
        self._cost = guess
        self._gram = np.zeros((3, 3))
        self._moment = np.zeros(3)
        # Learned when the cost is asked for: between two steps it would take 0.1 ms, caches being cold then.
        self._new: deque[tuple[int, int, float]] = deque(maxlen=UNLEARNED)

    def record(self, sequences: int, drafted: int, seconds: float) -> None:
        """A step of `sequences` sequences and `drafted` draft tokens took `seconds`."""
        self._new.append((sequences, drafted, max(seconds, 1e-9)))

    @property
    def known(self) -> bool:
        """Whether a step was recorded; else the cost is in no unit."""
        return self._seen or bool(self._new)

    def cost(self) -> StepCost:
        """Of a step now. A draft token never costs too much for a single sequence to try its first one."""
        while self._new:
            self._learn(*self._new.popleft())
        token = min(self._cost.token, 0.9 * EXPLORED * self._cost.of(1, 0))
        return StepCost(self._cost.base, self._cost.sequence, token)

    def _learn(self, sequences: int, drafted: int, seconds: float) -> None:
        usual = self._cost.of(sequences, drafted)
        if not self._seen:
            self._seen = True
            self._guess *= seconds / usual
        else:
            seconds = min(max(seconds, usual / LONGEST), usual * LONGEST)
        step = np.array([1.0, sequences, drafted])
        self._gram = MEMORY * self._gram + np.outer(step, step)
        self._moment = MEMORY * self._moment + seconds * step
        found = np.linalg.solve(self._gram + np.eye(3), self._moment + self._guess)
        self._cost = StepCost(*np.maximum(found, 0.02 * self._guess).tolist())


def allot(chances: Sequence[float], limits: Sequence[int], sequences: int, cost: StepCost) -> list[int]:
    """Draft lengths that make the most tokens a second, if each draft token is right with its sequence's chance.

    The n-th token of a draft counts if all before it are right too. The best next token of any sequence is added while
    that raises the tokens that a step is expected to give, over what it takes.

    Args:
        chances: of each drafting sequence.
        limits: longest draft of each.
        sequences: that decode in the step, drafting or not.
    """
    lengths = [0] * len(chances)
    gains = list(chances)
    expected, drafted = float(sequences), 0
    while gains:
        best = max(range(len(gains)), key=lambda index: gains[index] if lengths[index] < limits[index] else 0.0)
        if lengths[best] >= limits[best] or gains[best] <= 0.0:
            break
        if (expected + gains[best]) * cost.of(sequences, drafted) <= expected * cost.of(sequences, drafted + 1):
            break
        lengths[best] += 1
        drafted += 1
        expected += gains[best]
        gains[best] *= chances[best]
    return lengths


class Drafter:
    """The drafts of a step, as long as they pay."""

    def __init__(self) -> None:
        self._times = StepTimes()

    def acceptance(self) -> ModelAcceptance | None:
        """Of a new sequence by the draft model; None: there is none."""
        return None

    def draft(self, sequences: Sequence[Wanted]) -> list[list[int]]:
        """A draft for each sequence that decodes, mostly empty."""
        proposals = self._proposals(sequences)
        if not any(tokens for _, tokens in proposals):
            return [[] for _ in sequences]
        return self._cut(proposals, self._times.cost())

    def record(self, drafts: Sequence[Sequence[int]], seconds: float) -> None:
        """The step with these drafts, one for each sequence that decoded, took `seconds`."""
        self._times.record(len(drafts), sum(map(len, drafts)), seconds)

    @staticmethod
    def _proposals(sequences: Sequence[Wanted]) -> list[Proposal]:
        return [
            each.drafts.propose(min(each.limit, MAX_DRAFT)) if each.drafts is not None else (0.0, [])
            for each in sequences
        ]

    @staticmethod
    def _cut(proposals: Sequence[Proposal], cost: StepCost) -> list[list[int]]:
        """Of each proposal what pays."""
        chances, limits = [chance for chance, _ in proposals], [len(tokens) for _, tokens in proposals]
        lengths = allot(chances, limits, len(proposals), cost)
        return [tokens[:length] for (_, tokens), length in zip(proposals, lengths, strict=True)]
