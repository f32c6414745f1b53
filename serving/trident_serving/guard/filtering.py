"""One text through the rules of a guard, in chunks.

What goes on is the same however the text was cut: a pattern's matches depend on the text only, and a model is asked
about windows whose ends the text decides. Held back is what a rule may still change: the text from the earliest match
that a pattern may still have, and the window that is not complete.

What stands in place of a redacted text can make a match of what is around it. So where a rule redacts, the patterns
read the text that comes out again, and once more; what they would still redact then is blocked.

Nothing is awaited but a model's answer, so that without such rules a coroutine runs to its end at once (`at_once`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol, TypeVar

from trident_serving.guard.patterns import Lookout, Match, Pattern, Scanner, is_word
from trident_serving.guard.rules import WINDOW, Action, Rule, Stage

T = TypeVar("T")
ROUNDS = 3  # times that patterns read a text of which rules redact something
FAILED = "failed"  # what a note says of a rule that could not be checked
_SENTENCE = re.compile(r"[.!?]\s|\n")


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a text, and what kind of thing they are."""

    start: int
    end: int
    label: str


class Findings:
    """What the rules of a guard found in the texts of one answer: how often, by rule, action and stage."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str, str]] = Counter()

    def add(self, rule: Rule, action: str, stage: Stage, count: int = 1) -> None:
        """Note something."""
        self._counts[rule.name, str(action), stage.value] += count

    def copy(self) -> Findings:
        """The same, to go on from."""
        found = Findings()
        found._counts = self._counts.copy()
        return found

    def told(self) -> list[dict[str, Any]]:
        """As a response tells it."""
        return [
            {"rule": rule, "action": action, "stage": stage, "count": count}
            for (rule, action, stage), count in sorted(self._counts.items())
        ]


class Asked(Protocol):
    """Served models, asked about a text."""

    async def spans(self, rule: Rule, texts: Sequence[str]) -> list[list[Span]] | None:
        """What a rule finds in each text, in its order; None: it could not be asked, and the texts may pass.

        Raises:
            ServingError: it could not be asked, and the request fails.
        """
        ...


@dataclass(frozen=True)
class Edit:
    """Characters [start, end) of a text, in whose place so many others stand."""

    start: int
    end: int
    length: int


@dataclass(frozen=True)
class Passed:
    """What of a text goes on.

    Attributes:
        blocked: whether nothing follows, because a rule blocks the rest.
        rounds: of a text that was read at once, what each reading replaced of what the one before it left, in order.
    """

    text: str
    blocked: bool = False
    rounds: tuple[tuple[Edit, ...], ...] = ()

    def then(self, after: Passed) -> Passed:
        """What is left where another reading has followed."""
        return Passed(after.text, self.blocked or after.blocked, self.rounds + after.rounds)

    def cut(self, gaps: Sequence[tuple[int, int]]) -> list[str]:
        """What is left of the parts of a text; what stands for a match is in the part in which that begins.

        Args:
            gaps: between two parts each, [start, end) in the text that was read, rising.
        """
        for edits in self.rounds:
            gaps = [_moved(gap, edits) for gap in gaps]
        starts, ends = [0, *(end for _, end in gaps)], [*(start for start, _ in gaps), len(self.text)]
        return [self.text[start:end] for start, end in zip(starts, ends, strict=True)]


def _moved(gap: tuple[int, int], edits: Sequence[Edit]) -> tuple[int, int]:
    """Where a gap between two parts is behind edits."""
    start, end = gap
    for edit in reversed(edits):
        further = edit.length - (edit.end - edit.start)
        if edit.end <= gap[1]:
            end += further
        elif edit.start < gap[1]:  # it reaches into the second part, and may begin in the first one
            end = edit.start if edit.start >= gap[0] else edit.start + edit.length
        if edit.end <= gap[0]:
            start += further
        elif edit.start < gap[0]:
            start = edit.start + edit.length
    return start, end


class PatternFilter:
    """A text through the patterns of a guard: each reads the text itself, and matches that overlap are one.

    Args:
        rules: those of a stage that have patterns.
        last: whether nothing reads the text behind it, so that what a rule would redact is blocked.
        word: whether a character of a word stands before the text.

    Attributes:
        redacts: whether rules redact; else those that do let pass what they find.
    """

    def __init__(
        self, rules: Sequence[Rule], stage: Stage, findings: Findings, *, last: bool = False, word: bool = False
    ) -> None:
        self.redacts = True
        self._stage = stage
        self._findings = findings
        self._last = last
        # A note changes nothing of the text, so nothing waits for it.
        scanners = [(rule, Scanner(rule.compiled, word=word)) for rule in rules]
        self._noting = [each for each in scanners if each[0].action is Action.ANNOTATE]
        self._holding = [each for each in scanners if each[0].action is not Action.ANNOTATE]
        self._held = ""
        self._offset = 0  # of what is held, in the text
        self._found: list[tuple[Match, int]] = []  # with the number of the rule
        self._blocked = False

    def push(self, text: str, *, end: bool = False) -> Passed:
        """Take more of the text; of what follows a match that is blocked nothing goes on.

        Args:
            end: whether it is complete.
        """
        if self._blocked:
            return Passed("", blocked=True)
        for rule, scanner in self._noting:
            count = len(scanner.push(text)) + (len(scanner.finish()) if end else 0)
            if count:
                self._findings.add(rule, Action.ANNOTATE, self._stage, count)
        if not self._holding:
            return Passed(text)
        self._held += text
        for number, (_, scanner) in enumerate(self._holding):
            found = scanner.push(text) + (scanner.finish() if end else [])
            self._found += [(match, number) for match in found]
        known = self._offset + len(self._held)
        decided = known if end else min(scanner.undecided for _, scanner in self._holding)
        return self._taken(decided)

    def _taken(self, decided: int) -> Passed:
        """What goes on, up to a place that no further match can include."""
        self._found.sort(key=lambda each: (each[0].start, each[1]))
        passed: list[str] = []
        edits: list[Edit] = []
        number, place = 0, self._offset  # of the match that is next, and up to where the text has gone on
        while number < len(self._found) and self._found[number][0].start < decided:
            first, start, end = number, self._found[number][0].start, 0
            while number < len(self._found) and (number == first or self._found[number][0].start < end):
                end, number = max(end, self._found[number][0].end), number + 1
            if end > decided:  # another match may still begin in it
                decided, number = start, first
                break
            rules = [self._holding[which][0] for _, which in self._found[first:number]]
            blocking = [rule for rule in rules if rule.action is Action.BLOCK or self._last]
            if not blocking and not self.redacts:
                continue
            passed.append(self._between(place, start))
            if blocking:
                self._findings.add(blocking[0], Action.BLOCK, self._stage)
                self._blocked = True
                return Passed("".join(passed), blocked=True)
            for rule in rules:
                self._findings.add(rule, Action.REDACT, self._stage)
            passed.append(rules[0].instead(rules[0].name))
            edits.append(Edit(start, end, len(passed[-1])))
            place = end
        passed.append(self._between(place, decided))
        del self._found[:number]
        self._held = self._held[decided - self._offset :]
        self._offset = decided
        return Passed("".join(passed), rounds=(tuple(edits),) if edits else ())

    def _between(self, start: int, end: int) -> str:
        """What is held of the text from one place to another."""
        return self._held[start - self._offset : end - self._offset]


class Windows:
    """Cuts a text into windows that a model is asked about: sentences, lines, or what fits.

    Args:
        size: characters of a window at most; 0: the whole text is one.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._held = ""

    def push(self, text: str, *, end: bool = False) -> list[str]:
        """Take more of the text; returns the windows that are complete."""
        self._held += text
        found: list[str] = []
        place = 0
        while self._size and (cut := self._cut(place)):
            found.append(self._held[place:cut])
            place = cut
        self._held = self._held[place:]
        if end and self._held:
            found.append(self._held)
            self._held = ""
        return found

    def _cut(self, place: int) -> int:
        """Where the first window behind a place ends; 0: that is not known yet."""
        sentence = _SENTENCE.search(self._held, place, place + self._size)
        if sentence is not None:
            return sentence.end()
        if len(self._held) < place + self._size:
            return 0
        space = self._held.rfind(" ", place, place + self._size)
        return space + 1 if space >= 0 else place + self._size


class ModelFilter:
    """A text through one rule whose model is asked, window by window."""

    def __init__(self, rule: Rule, stage: Stage, findings: Findings, asked: Asked) -> None:
        self._rule = rule
        self._stage = stage
        self._findings = findings
        self._asked = asked
        self._windows = Windows(rule.size)

    async def push(self, text: str, *, end: bool = False) -> Passed:
        """Take more of the text; see `PatternFilter.push`. A rule that only notes gives the text back at once."""
        windows = self._windows.push(text, end=end)
        found = await _asked(self._asked, self._rule, windows)
        passed = _judged(self._rule, self._stage, self._findings, windows, found)
        return Passed(text) if self._rule.action is Action.ANNOTATE else passed


async def _asked(asked: Asked, rule: Rule, windows: Sequence[str]) -> dict[str, list[Span]] | None:
    """What a rule finds in windows, by their texts, each of which is asked about once; None: see `Asked.spans`."""
    texts = [window for window in dict.fromkeys(windows) if window.strip()]
    found = await asked.spans(rule, texts) if texts else []
    return None if found is None else dict(zip(texts, found, strict=True))


def _judged(
    rule: Rule, stage: Stage, findings: Findings, windows: Sequence[str], found: Mapping[str, list[Span]] | None
) -> Passed:
    """What goes on of the windows of a text."""
    passed, place = "", 0
    edits: list[Edit] = []
    for window in windows:
        spans = found.get(window, []) if found is not None else []
        if found is None and window.strip():
            findings.add(rule, FAILED, stage)
        elif spans:
            findings.add(rule, rule.action, stage, 1 if rule.action is Action.BLOCK else len(spans))
            if rule.action is Action.BLOCK:
                return Passed(passed, blocked=True)
        if rule.action is Action.REDACT and spans:
            window_passed, found_edits = _redacted(window, spans, rule, place)
            passed += window_passed
            edits += found_edits
        else:
            passed += window
        place += len(window)
    return Passed(passed, rounds=(tuple(edits),) if edits else ())


def _redacted(text: str, spans: Sequence[Span], rule: Rule, place: int) -> tuple[str, list[Edit]]:
    """A window with something else in place of spans, and these edits of the text in which it begins at a place."""
    passed, last = "", 0
    edits: list[Edit] = []
    for span in spans:
        if span.start >= last:
            instead = rule.instead(span.label)
            passed += text[last : span.start] + instead
            edits.append(Edit(place + span.start, place + span.end, len(instead)))
        elif span.end > last:  # it goes on behind one that it overlaps
            edits[-1] = Edit(edits[-1].start, place + span.end, edits[-1].length)
        last = max(last, span.end)
    return passed + text[last:], edits


class SecondReading:
    """A text through patterns that have read it before: which rule matches is asked once something does.

    Nearly always nothing does, and one automaton of all patterns takes a part of the time of each by itself.

    Args:
        rules: with patterns; none only notes.
        last: see `PatternFilter`.
    """

    def __init__(self, rules: Sequence[Rule], stage: Stage, findings: Findings, *, last: bool) -> None:
        self._exactly = partial(PatternFilter, rules, stage, findings, last=last)
        self._filter: PatternFilter | None = None
        self._lookout = Lookout(_any_of(tuple((rule.pattern, rule.longest) for rule in rules)))
        self._held = ""
        self._word = False  # whether what has gone ends with a character of a word

    def push(self, text: str, *, end: bool = False) -> Passed:
        """See `PatternFilter.push`."""
        if self._filter is not None:
            return self._filter.push(text, end=end)
        self._held += text
        known = self._lookout.position + len(text)
        if self._lookout.push(text) or (end and self._lookout.finish()):
            self._filter = self._exactly(word=self._word)
            return self._filter.push(self._held, end=end)
        waiting = 0 if end else known - self._lookout.undecided
        passed, self._held = self._held[: len(self._held) - waiting], self._held[len(self._held) - waiting :]
        self._word = is_word(passed[-1]) if passed else self._word
        return Passed(passed)


@lru_cache(maxsize=64)
def _any_of(patterns: tuple[tuple[str, int], ...]) -> Pattern:
    return Pattern.of_any([Pattern(*each) for each in patterns])


def patterns_again(rules: Sequence[Rule], stage: Stage, findings: Findings) -> list[SecondReading]:
    """What reads a text behind its redactions, one after the other; [] where no rule redacts.

    Args:
        rules: all of the stage.
    """
    hiding = [rule for rule in rules if rule.pattern and rule.action is not Action.ANNOTATE]
    if not hiding or all(rule.action is not Action.REDACT for rule in rules):
        return []
    return [SecondReading(hiding, stage, findings, last=number == ROUNDS) for number in range(2, ROUNDS + 1)]


class TextFilter:
    """A text through all rules of a stage: the patterns, behind them one model after the other, and patterns again.

    Args:
        asked: what asks models; never used where no rule has one.
    """

    def __init__(self, rules: Sequence[Rule], stage: Stage, findings: Findings, asked: Asked) -> None:
        self._patterns = PatternFilter([rule for rule in rules if rule.pattern], stage, findings)
        self._models = [ModelFilter(rule, stage, findings, asked) for rule in rules if rule.model]
        self._again = patterns_again(rules, stage, findings)
        self._blocked = False

    async def push(self, text: str, *, end: bool = False) -> Passed:
        """Take more of the text.

        Args:
            end: whether it is complete.

        Raises:
            ServingError: a rule could not be checked, and the guard is closed then.
        """
        if self._blocked:
            return Passed("", blocked=True)
        passed = self._patterns.push(text, end=end)
        self._blocked = passed.blocked
        for model in self._models:
            passed = await model.push(passed.text, end=end or self._blocked)
            self._blocked = self._blocked or passed.blocked
        for again in self._again:
            passed = again.push(passed.text, end=end or self._blocked)
            self._blocked = self._blocked or passed.blocked
        return Passed(passed.text, self._blocked)


async def filter_all(
    texts: Sequence[str], rules: Sequence[Rule], stage: Stage, findings: Findings, asked: Asked
) -> list[Passed]:
    """Whole texts through all rules of a stage, as `TextFilter` filters each, and models are asked about all at once.

    A judge reads short texts that follow each other as one: it says nothing of where in a text. Where patterns redact
    what models have read, the models are asked about that text once more.

    Returns:
        The first is that of the first text; none follows one that is blocked.

    Raises:
        ServingError: see `TextFilter.push`.
    """
    patterns = [rule for rule in rules if rule.pattern]
    passed: list[Passed] = []
    for text in texts:
        passed.append(PatternFilter(patterns, stage, findings).push(text, end=True))
        if passed[-1].blocked:
            break
    models = [rule for rule in rules if rule.model]
    for rule in models:
        passed = await _through(rule, stage, findings, asked, passed, range(len(passed)))
    again = [patterns_again(rules, stage, findings) for _ in passed]
    for number in range(max(map(len, again), default=0)):
        read, passed = passed, _read_again(passed, [each[number] for each in again])
        changed = [place for place, each in enumerate(passed) if each.text != read[place].text]
        for rule in models if changed and number + 2 < ROUNDS else ():
            if rule.action is not Action.ANNOTATE:  # has noted what is there
                passed = await _through(rule, stage, findings, asked, passed, changed)
    return passed


async def _through(
    rule: Rule, stage: Stage, findings: Findings, asked: Asked, passed: Sequence[Passed], among: Collection[int]
) -> list[Passed]:
    """Texts through the model of a rule.

    Args:
        among: numbers of those that it is asked about.
    """
    groups = _packed(passed, rule.window or WINDOW) if rule.judge else [[number] for number in range(len(passed))]
    groups = [its for its in groups if not set(among).isdisjoint(its)]
    between = " " if rule.size else "\n"  # an end of a line is one of a window
    windows = [Windows(rule.size).push(between.join(passed[each].text for each in its), end=True) for its in groups]
    found = await _asked(asked, rule, [window for each in windows for window in each])
    made = list(passed)
    for group, its in zip(groups, windows, strict=True):
        judged = _judged(rule, stage, findings, its, found)
        first = group[0]
        if judged.blocked:
            return [*made[:first], judged if len(group) == 1 else Passed("", blocked=True)]
        if rule.action is Action.REDACT:
            made[first] = made[first].then(judged)
    return made


def _packed(passed: Sequence[Passed], size: int) -> list[list[int]]:
    """Numbers of texts that follow each other and are together no longer than so many characters, or of single ones."""
    groups: list[list[int]] = []
    length = 0
    for number, each in enumerate(passed):
        length += len(each.text) + 1
        if not groups or length > size + 1:
            groups.append([])
            length = len(each.text) + 1
        groups[-1].append(number)
    return groups


def _read_again(passed: Sequence[Passed], again: Sequence[SecondReading]) -> list[Passed]:
    made: list[Passed] = []
    for one, reading in zip(passed, again, strict=False):
        made.append(one.then(reading.push(one.text, end=True)))
        if made[-1].blocked:
            break
    return made


def read_apart(texts: Sequence[str], rules: Sequence[Rule], stage: Stage, findings: Findings) -> list[Passed]:
    """Whole texts through the patterns of a stage that have read them together; none only notes."""
    return _read_again(
        [Passed(text) for text in texts],
        [SecondReading(rules, stage, findings, last=False) for _ in texts],
    )


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that awaits nothing that takes time."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    coroutine.close()
    raise RuntimeError("a rule without a model waits for something")
