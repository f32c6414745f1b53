"""The search for one answer: greedy, sampled, or by beams. Pure: scores in, tokens and their parents out.

A search has as many rows as beams. Beam search is that of transformers 4.57 (`_beam_search`): twice as many candidates
as beams, finished ones collected with their length penalty, and the same three ways to stop early; so it finds the same
answer, token for token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from trident_serving.errors import BrokenModel
from trident_serving.runtime.log_probabilities import log_softmax
from trident_serving.runtime.sampling.candidates import Candidates, Scores
from trident_serving.runtime.sampling.params import SamplingParams
from trident_serving.runtime.sampling.sampler import Sampler
from trident_serving.seq2seq.rules import Rules

_NEVER = np.float32(-1.0e9)
_GREEDY = SamplingParams(max_tokens=1)

EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True)
class SearchParams:
    """How one answer is searched for.

    Attributes:
        rules: what may come next.
        num_beams: 1: greedy or sampled.
        length_penalty: exponent of the length that a beam's score is divided by.
        early_stopping: True: once there are enough finished beams; False: once better ones are unlikely; "never": once
            they are impossible.
        sampling: where tokens are drawn; None: the likeliest.
    """

    rules: Rules
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    sampling: SamplingParams | None = None


@dataclass(frozen=True)
class Found:
    """An answer.

    Attributes:
        tokens: without the start tokens; the last is an end token where it ended by itself.
        log_probs: of each of them.
        score: the sum of the scores, divided by the length to the power of the length penalty.
        stopped: whether it ended by itself.
    """

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    score: float
    stopped: bool


class Search(Protocol):
    """One answer on its way."""

    done: bool

    @property
    def rows(self) -> int:
        """How many rows it takes."""
        ...

    @property
    def next_tokens(self) -> list[int]:
        """The token of each row that the model reads next."""
        ...

    @property
    def position(self) -> int:
        """The position of that token."""
        ...

    @property
    def tokens(self) -> Sequence[Sequence[int]]:
        """Of each row, those behind the start tokens that the model has read or reads next; all are as many."""
        ...

    def advance(self, logits: Scores) -> list[int]:
        """Take the model's logits, [rows, vocabulary]; returns which row each row goes on from.

        Raises:
            BrokenModel: the logits are no numbers.
        """
        ...

    def found(self) -> Found:
        """The answer, once the search is done."""
        ...


def start(prompt: Sequence[int], params: SearchParams) -> Search:
    """A search behind the decoder's start tokens."""
    return BeamSearch(prompt, params) if params.num_beams > 1 else TokenSearch(prompt, params)


class _Prompted:
    """What both searches do with start tokens: the model reads them one at a time."""

    def __init__(self, prompt: Sequence[int], params: SearchParams) -> None:
        self._prompt = list(prompt)
        self._params = params
        self._read = 1  # start tokens that the model has read, the one of the next run included
        self.done = False

    @property
    def rows(self) -> int:
        """See `Search.rows`."""
        return self._params.num_beams

    def _reads_on(self) -> bool:
        """Whether this run only read a start token that is followed by another."""
        if self._read < len(self._prompt):
            self._read += 1
            return True
        return False


class TokenSearch(_Prompted):
    """One token after the other: the likeliest, or one that is drawn."""

    def __init__(self, prompt: Sequence[int], params: SearchParams) -> None:
        super().__init__(prompt, params)
        self._tokens: list[int] = []
        self._log_probs: list[float] = []
        self._sampler = Sampler(params.sampling or _GREEDY, prompt, params.rules.processors())

    @property
    def next_tokens(self) -> list[int]:
        """See `Search.next_tokens`."""
        return [self._tokens[-1] if self._tokens else self._prompt[self._read - 1]]

    @property
    def position(self) -> int:
        """See `Search.position`."""
        return self._read - 1 + len(self._tokens)

    @property
    def tokens(self) -> Sequence[Sequence[int]]:
        """See `Search.tokens`."""
        return [self._tokens]

    def advance(self, logits: Scores) -> list[int]:
        """See `Search.advance`."""
        if self._reads_on():
            return [0]
        rules = self._params.rules
        token = self._sampler.choose(logits[0])
        self._tokens.append(token)
        self._log_probs.append(float(log_softmax(logits)[0, token]))
        self.done = token in rules.eos_token_ids or len(self._prompt) + len(self._tokens) >= rules.max_length
        return [0]

    def found(self) -> Found:
        """See `Search.found`."""
        score = sum(self._log_probs) / len(self._tokens) ** self._params.length_penalty
        stopped = self._tokens[-1] in self._params.rules.eos_token_ids
        return Found(tuple(self._tokens), tuple(self._log_probs), score, stopped)


@dataclass(frozen=True)
class _Beam:
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]


class BeamSearch(_Prompted):
    """Several sequences at once, the best of which is the answer."""

    def __init__(self, prompt: Sequence[int], params: SearchParams) -> None:
        super().__init__(prompt, params)
        self._processors = params.rules.processors()
        beams = params.num_beams
        self._running = [_Beam((), ())] * beams
        self._running_scores = np.full(beams, _NEVER, np.float32)
        self._running_scores[0] = 0.0
        self._finished = [_Beam((), ())] * beams
        self._finished_scores = np.full(beams, _NEVER, np.float32)
        self._is_finished = np.zeros(beams, np.bool_)
        self._improvable = True

    @property
    def next_tokens(self) -> list[int]:
        """See `Search.next_tokens`."""
        if not self._running[0].tokens:
            return [self._prompt[self._read - 1]] * self.rows
        return [beam.tokens[-1] for beam in self._running]

    @property
    def position(self) -> int:
        """See `Search.position`."""
        return self._read - 1 + len(self._running[0].tokens)

    @property
    def tokens(self) -> Sequence[Sequence[int]]:
        """See `Search.tokens`."""
        return [beam.tokens for beam in self._running]

    def advance(self, logits: Scores) -> list[int]:
        """See `Search.advance`."""
        beams = self.rows
        if self._reads_on():
            return list(range(beams))
        if not np.isfinite(logits.max(axis=-1)).all():
            raise BrokenModel
        rules = self._params.rules
        sequences = np.array([[*self._prompt, *beam.tokens] for beam in self._running], np.int64)
        length = sequences.shape[1]
        steps = log_softmax(logits)
        for tokens_so_far, row in zip(sequences, steps, strict=True):
            candidates = Candidates(row, in_place=True)
            for process in self._processors:
                process(tokens_so_far, candidates)
        totals = (steps + self._running_scores[:, None]).reshape(-1)
        best = largest(totals, max(2, 1 + len(rules.eos_token_ids)) * beams)
        parents, tokens = np.divmod(best, logits.shape[1])
        scores = totals[best]
        continued = [
            _Beam(
                (*self._running[parent].tokens, int(token)),
                (*self._running[parent].log_probs, float(steps[parent, token])),
            )
            for parent, token in zip(parents, tokens, strict=True)
        ]
        ends = np.isin(tokens, rules.eos_token_ids) | (length + 1 >= rules.max_length)
        kept = largest(scores + ends * _NEVER, beams)
        self._collect(continued, scores, ends, length)
        self._running = [continued[index] for index in kept]
        self._running_scores = (scores + ends * _NEVER)[kept]
        self._check_stop(length + 1, bool(ends.all()))
        return [int(parents[index]) for index in kept]

    def _collect(self, continued: list[_Beam], scores: Scores, ends: NDArray[np.bool_], length: int) -> None:
        """Keep the best of what was finished before and what ended now among the first of `continued`."""
        beams = self.rows
        just_ended = ends & (np.arange(len(ends)) < beams)
        generated = length + 1 - len(self._prompt)
        penalized = scores / np.float32(generated**self._params.length_penalty)
        if self._is_finished.all() and self._params.early_stopping is True:
            penalized = penalized + _NEVER
        if not self._improvable:
            penalized = penalized + _NEVER
        penalized = penalized + ~just_ended * _NEVER
        merged = np.concatenate([self._finished_scores, penalized.astype(np.float32)])
        chosen = largest(merged, beams)
        pool = [*self._finished, *continued]
        self._is_finished = np.concatenate([self._is_finished, just_ended])[chosen]
        self._finished = [pool[index] for index in chosen]
        self._finished_scores = merged[chosen]

    def _check_stop(self, length: int, all_ended: bool) -> None:
        params = self._params
        longest = params.early_stopping == "never" and params.length_penalty > 0.0
        reach = (params.rules.max_length if longest else length) - len(self._prompt)
        possible = self._running_scores[0] / np.float32(reach**params.length_penalty)
        worst = np.where(self._is_finished, self._finished_scores.min(), _NEVER)
        self._improvable = self._improvable and bool((possible > worst).any())
        open_beam = not (self._is_finished.all() and params.early_stopping is True)
        self.done = not (self._improvable and open_beam and not all_ended)

    def found(self) -> Found:
        """See `Search.found`."""
        beam = self._finished[0]
        stopped = bool(beam.tokens) and beam.tokens[-1] in self._params.rules.eos_token_ids
        return Found(beam.tokens, beam.log_probs, float(self._finished_scores[0]), stopped)


def largest(scores: Scores, count: int) -> NDArray[np.int64]:
    """Indices of the largest scores, the largest first; of equal ones the first comes first."""
    if scores.size > 64 * count:
        # The k-th largest maximum of some blocks is a bound for the k-th largest number, and a maximum is fast.
        width = scores.size // (8 * count)
        blocks = scores[: 8 * count * width].reshape(8 * count, width)
        bound = np.partition(blocks.max(axis=1), -count)[-count]
        indices = np.flatnonzero(scores >= bound)
    else:
        indices = np.arange(scores.size)
    best: NDArray[np.int64] = indices[np.argsort(-scores[indices], kind="stable")[:count]]
    return best
