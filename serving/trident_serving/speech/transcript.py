"""From the tokens of a window to segments with times, and to where the next window begins.

The algorithm is that of transformers' `_retrieve_segment`: two timestamps in a row part segments; what follows the last
such pair is thrown away, and the next window begins there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """A stretch of a recording.

    Attributes:
        start: seconds from the beginning of the recording; `end` too.
        tokens: with its timestamps.
        log_prob: the mean of its tokens' log-probabilities.
        no_speech: the probability that nobody speaks in its window.
    """

    start: float
    end: float
    tokens: tuple[int, ...]
    log_prob: float = 0.0
    no_speech: float = 0.0


@dataclass(frozen=True)
class Clock:
    """How tokens, frames and seconds go together.

    Attributes:
        first: the token of second 0.
        step: seconds between two timestamps.
        frames: of features in a step.
    """

    first: int
    step: float
    frames: int


def settled(tokens: Sequence[int], first: int) -> int:
    """How many of a window's first tokens stay in the transcript, however its answer goes on.

    What comes before the last two timestamps in a row does. What comes behind them is thrown away if the answer ends
    before the next two. Before there are two of them everything stays: `cut` keeps it in either case.

    Args:
        tokens: of the answer so far.
        first: the token of second 0.
    """
    for index in range(len(tokens) - 1, 0, -1):
        if tokens[index] >= first and tokens[index - 1] >= first:
            return index
    return len(tokens)


class Stripped:
    """A text that comes in parts, without white space around all of it."""

    def __init__(self) -> None:
        self._begun = False
        self._held = ""

    def push(self, text: str) -> str:
        """Add a part; returns what is certain to be inside."""
        whole = self._held + (text if self._begun else text.lstrip())
        found = whole.rstrip()
        self._held = whole[len(found) :]
        self._begun = self._begun or bool(found)
        return found


def cut(
    tokens: Sequence[int], log_probs: Sequence[float], clock: Clock, seek: int, frames: int, no_speech: float = 0.0
) -> tuple[list[Segment], int]:
    """The segments of a window, and how many frames further the next window begins.

    Args:
        tokens: of the answer, without start and end tokens.
        log_probs: of each.
        seek: where the window begins, in frames.
        frames: of the recording in the window.
    """
    offset = seek / clock.frames * clock.step
    timed = [token >= clock.first for token in tokens]
    single_end = timed[-2:] == [False, True]
    cuts = [index + 1 for index in range(len(timed) - 1) if timed[index] and timed[index + 1]]

    def segment(start: float, end: float, first: int, last: int) -> Segment:
        its = log_probs[first:last]
        return Segment(start, end, tuple(tokens[first:last]), sum(its) / max(len(its), 1), no_speech)

    if not cuts:
        times = [token for token, is_time in zip(tokens, timed, strict=True) if is_time]
        steps = frames // clock.frames
        if times and times[-1] != clock.first:
            steps = times[-1] - clock.first
        return [segment(offset, offset + steps * clock.step, 0, len(tokens))], frames
    if single_end:
        cuts.append(len(tokens))
    else:
        cuts[-1] += 1  # the last segment keeps both of its timestamps
    found, first = [], 0
    for number, last in enumerate(cuts):
        closing = tokens[last - (1 if number < len(cuts) - 1 or single_end else 2)]
        start, end = (offset + (token - clock.first) * clock.step for token in (tokens[first], closing))
        found.append(segment(start, end, first, last))
        first = last
    if single_end:
        return found, frames
    return found, max((tokens[first - 2] - clock.first) * clock.frames, 1)
