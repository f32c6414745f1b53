"""Regular expressions over a text that comes in chunks: what matches, and from where on more may still match.

`re` backtracks: some expressions take exponential time over some texts, and a text comes from anybody. Here an
expression becomes a finite automaton, which looks at each character once for each start that is still possible. So a
match is the leftmost one and the longest from there, as in POSIX, and it is the same however the text was cut.

Expressions are those of `re`, parsed by its own parser. Look-around, references to groups, `^` and `$` are refused: no
finite automaton has them, or they mean nothing in a text that goes on.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trident_serving.errors import ReadingError

_constants: Any = importlib.import_module("re._constants")
_parser: Any = importlib.import_module("re._parser")

MAX_LONGEST = 4096  # characters that a match may have
MAX_NODES = 4000  # of an automaton
MAX_FRONTS = 2048  # sets of possible states that are kept; hostile texts have ever new ones
MAX_KINDS = 65536  # characters whose kind is kept
_IGNORE_CASE, _DOT_ALL, _ASCII = 2, 16, 256  # flags of `re`
_WORD = 1  # the bit of a character's kind that says whether it is one of a word
_END = -1  # the kind of the end of the text

Kernel = frozenset[int]
Test = Callable[[str], bool]


@dataclass(frozen=True)
class Match:
    """Characters [start, end) of the text."""

    start: int
    end: int


@dataclass
class _Node:
    """One place in the expression.

    Attributes:
        test: bit of the characters that lead on; 0: none is needed.
        boundary: whether here is a word's boundary, or is none; None: either.
        after: the places behind it; () behind the whole expression.
    """

    after: list[int]
    test: int = 0
    boundary: bool | None = None


@dataclass(frozen=True)
class _Front:
    """The states of every start that is still possible, the earliest first.

    Attributes:
        word: whether the last character was one of a word.
        moves: what a character of a kind makes of it, as far as it is known.
        rest: the same without the earliest start, once that was asked for.
    """

    word: bool
    kernels: tuple[Kernel, ...]
    moves: dict[int, _Move]
    rest: list[_Front]


@dataclass(frozen=True)
class _Move:
    """What a character does to a front, to which a start at the character itself has been added.

    Attributes:
        matched: numbers of the starts that match up to the character.
        survivors: numbers of those that are still possible behind it.
        steady: whether all are, and none matches.
    """

    front: _Front
    matched: tuple[int, ...]
    survivors: tuple[int, ...]
    steady: bool


class Pattern:
    """A regular expression, compiled; scanners of many texts share it.

    Args:
        expression: in the syntax of `re`; `(?i)` ignores case.
        longest: characters of the longest match; 0: as the expression says.

    Attributes:
        longest: characters of the longest match.

    Raises:
        ReadingError: the expression is wrong, matches the empty text, has no longest match, or can't be an automaton.
    """

    def __init__(self, expression: str, longest: int = 0) -> None:
        try:
            tree = _parser.parse(expression)
        except (_constants.error, OverflowError, RecursionError) as error:
            raise ReadingError(f"pattern {expression[:80]!r} is no regular expression: {error}") from None
        least, most = tree.getwidth()
        if least == 0:
            raise ReadingError(f"pattern {expression[:80]!r} matches the empty text")
        if not longest and most > MAX_LONGEST:
            raise ReadingError(
                f"pattern {expression[:80]!r} has no longest match: give `longest`, {MAX_LONGEST} characters at most"
            )
        self.longest = min(longest or most, most)
        if not least <= self.longest <= MAX_LONGEST:
            raise ReadingError(
                f"longest must be between {least}, the shortest match, and {MAX_LONGEST}, found {self.longest}"
            )
        self._expression = expression
        self._empty(MAX_NODES)
        first = self._sequence(tree, 0, tree.state.flags)
        self._start: Kernel = self._kernel({first})

    @classmethod
    def of_any(cls, patterns: Sequence[Pattern]) -> Pattern:
        """What any of some patterns matches, and no longer than the longest match of one."""
        made = cls.__new__(cls)
        made._expression = "|".join(pattern._expression for pattern in patterns)
        made.longest = max(pattern.longest for pattern in patterns)
        made._empty(MAX_NODES * len(patterns))
        trees = [_parser.parse(pattern._expression) for pattern in patterns]
        made._start = made._kernel({made._sequence(tree, 0, tree.state.flags) for tree in trees})
        return made

    def _empty(self, most: int) -> None:
        """An automaton without places, but for that behind the whole expression.

        Args:
            most: places that it may have.
        """
        self._most = most
        self._nodes: list[_Node] = [_Node([])]
        self._tests: list[Test] = [is_word]
        self._bits: dict[str, int] = {}
        self._kinds: dict[str, int] = {}
        self._kernels: dict[Kernel, Kernel] = {}
        self._steps: dict[tuple[Kernel, bool, int], tuple[bool, Kernel]] = {}
        self._fronts: dict[tuple[bool, tuple[Kernel, ...]], _Front] = {}

    def kind(self, char: str) -> int:
        """What the expression knows of a character: which of its classes have it, a bit for each."""
        found = self._kinds.get(char)
        if found is None:
            if len(self._kinds) >= MAX_KINDS:
                self._kinds.clear()
            found = sum(1 << bit for bit, test in enumerate(self._tests) if test(char))
            self._kinds[char] = found
        return found

    def front(self, word: bool, kernels: tuple[Kernel, ...] = ()) -> _Front:
        """The front with these states."""
        key = (word, kernels)
        found = self._fronts.get(key)
        if found is None:
            if len(self._fronts) >= MAX_FRONTS:
                self._fronts.clear()
                self._steps.clear()
                self._kernels.clear()
            found = self._fronts[key] = _Front(word, kernels, {}, [])
        return found

    def without_first(self, front: _Front) -> _Front:
        """The front without its earliest start."""
        if not front.rest:
            front.rest.append(self.front(front.word, front.kernels[1:]))
        return front.rest[0]

    def move(self, front: _Front, kind: int) -> _Move:
        """What a character of a kind, or the end of the text, does to a front."""
        found = front.moves.get(kind)
        if found is None:
            kernels: list[Kernel] = []
            matched: list[int] = []
            survivors: list[int] = []
            for index, kernel in enumerate((*front.kernels, self._start)):
                complete, following = self._step(kernel, front.word, kind)
                if complete:
                    matched.append(index)
                if following:
                    survivors.append(index)
                    kernels.append(following)
            word = kind != _END and bool(kind & _WORD)
            steady = not matched and len(survivors) == len(front.kernels) + 1
            found = _Move(self.front(word, tuple(kernels)), tuple(matched), tuple(survivors), steady)
            front.moves[kind] = found
        return found

    def _step(self, kernel: Kernel, word: bool, kind: int) -> tuple[bool, Kernel]:
        """Whether the expression is complete before a character, and the state behind it."""
        key = (kernel, word, kind)
        found = self._steps.get(key)
        if found is None:
            boundary = word != (kind != _END and bool(kind & _WORD))
            complete, following, seen, waiting = False, set(), set(kernel), list(kernel)
            while waiting:
                place = waiting.pop()
                node = self._nodes[place]
                if place == 0:
                    complete = True
                elif node.test:
                    if kind != _END and kind & node.test:
                        following.update(node.after)
                elif node.boundary is None or node.boundary == boundary:
                    waiting += [each for each in node.after if each not in seen]
                    seen.update(node.after)
            found = self._steps[key] = (complete, self._kernel(following))
        return found

    def _kernel(self, places: set[int]) -> Kernel:
        kernel = frozenset(places)
        return self._kernels.setdefault(kernel, kernel)

    def _add(self, node: _Node) -> int:
        if len(self._nodes) >= self._most:
            raise ReadingError(f"pattern {self._expression[:80]!r} is too large: counted repetitions are copies")
        self._nodes.append(node)
        return len(self._nodes) - 1

    def _sequence(self, items: Any, after: int, flags: int) -> int:
        """The place before items of the parser's; `after` is the one behind them."""
        for item in reversed(list(items)):
            after = self._item(item, after, flags)
        return after

    def _item(self, item: Any, after: int, flags: int) -> int:
        kind, value = item
        name = str(kind)
        if name in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return self._add(_Node([after], test=self._class(item, flags)))
        if name == "BRANCH":
            return self._add(_Node([self._sequence(each, after, flags) for each in value[1]]))
        if name == "SUBPATTERN":
            _, added, removed, inner = value
            return self._sequence(inner, after, (flags | added) & ~removed)
        if name in ("MAX_REPEAT", "MIN_REPEAT"):  # the longest match is taken, whichever it is
            least, most, inner = value
            return self._repeat(least, most, inner, after, flags)
        if name == "AT" and str(value) in ("AT_BOUNDARY", "AT_NON_BOUNDARY"):
            return self._add(_Node([after], boundary=str(value) == "AT_BOUNDARY"))
        words = {"AT": "^ and $", "GROUPREF": "references to groups", "GROUPREF_EXISTS": "references to groups"}
        raise ReadingError(
            f"pattern {self._expression[:80]!r} has {words.get(name, 'look-around or possessive parts')}, which a text "
            "that comes in chunks can't be searched for"
        )

    def _repeat(self, least: int, most: int, inner: Any, after: int, flags: int) -> int:
        if most == _constants.MAXREPEAT:
            loop = self._add(_Node([after]))
            self._nodes[loop].after.append(self._sequence(inner, loop, flags))
            place = loop
        else:
            place = after
            for _ in range(most - least):
                place = self._add(_Node([after, self._sequence(inner, place, flags)]))
        for _ in range(least):
            place = self._sequence(inner, place, flags)
        return place

    def _class(self, item: Any, flags: int) -> int:
        """The bit of a class of characters."""
        key = repr((item, flags & (_IGNORE_CASE | _DOT_ALL | _ASCII)))
        if key not in self._bits:
            self._bits[key] = 1 << len(self._tests)
            self._tests.append(_test(item, flags))
        return self._bits[key]


class Scanner:
    """Finds the matches of a pattern in one text.

    Args:
        word: whether a character of a word stands before the text.

    Attributes:
        position: characters that were read.
    """

    def __init__(self, pattern: Pattern, *, word: bool = False) -> None:
        self._pattern = pattern
        self._front = pattern.front(word=word)
        # Of each start that is still possible, the earliest first: where it is, and where its longest match so far
        # ends, -1 where there is none.
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._waiting: list[Match] = []  # complete, behind a start that is still possible
        self.position = 0

    @property
    def undecided(self) -> int:
        """Where the earliest match that is not told yet may begin."""
        return min([*self._starts[:1], *(match.start for match in self._waiting[:1]), self.position])

    def push(self, text: str) -> list[Match]:
        """Read more of the text; returns what certainly matches now."""
        found: list[Match] = []
        for char in text:
            move = self._pattern.move(self._front, self._pattern.kind(char))
            if self._starts or move.survivors:
                found += self._advance(move)
            else:
                self._front = move.front
            self.position += 1
        return found

    def finish(self) -> list[Match]:
        """The text is complete; returns the rest of its matches."""
        return self._advance(self._pattern.move(self._front, _END))

    def _advance(self, move: _Move) -> list[Match]:
        self._starts.append(self.position)
        self._ends.append(-1)
        self._front = move.front
        if not move.steady:
            for index in move.matched:
                self._ends[index] = self.position
            alive = set(move.survivors)
            self._keep([index in alive for index in range(len(self._starts))])
        if self._starts and self.position - self._starts[0] >= self._pattern.longest:  # only the earliest can be
            self._front = self._pattern.without_first(self._front)
            start, end = self._starts.pop(0), self._ends.pop(0)
            if end >= 0:
                self._waiting.insert(0, Match(start, end))
        return self._settled() if self._waiting or (self._ends and self._ends[0] >= 0) else []

    def _keep(self, kept: Sequence[bool]) -> None:
        """End the other starts; what they match waits for those before."""
        ended = [
            Match(start, end)
            for start, end, stays in zip(self._starts, self._ends, kept, strict=True)
            if not stays and end >= 0
        ]
        self._waiting = sorted([*self._waiting, *ended], key=lambda match: match.start)
        self._starts = [start for start, stays in zip(self._starts, kept, strict=True) if stays]
        self._ends = [end for end, stays in zip(self._ends, kept, strict=True) if stays]

    def _settled(self) -> list[Match]:
        """Matches that nothing before them can take; starts inside of one end."""
        found: list[Match] = []
        while self._waiting and not (self._starts and self._starts[0] < self._waiting[0].start):
            match = self._waiting.pop(0)
            found.append(match)
            self._drop(match.end, self._starts[:0])
        if self._ends and self._ends[0] >= 0:  # it matches at least so much
            self._drop(self._ends[0], self._starts[:1])
        return found

    def _drop(self, end: int, but: Sequence[int]) -> None:
        """Forget what begins before `end`."""
        self._waiting = [match for match in self._waiting if match.start >= end]
        kept = [start >= end or start in but for start in self._starts]
        if not all(kept):
            kernels = self._front.kernels
            self._ends = [end for end, stays in zip(self._ends, kept, strict=True) if stays]
            self._starts = [start for start, stays in zip(self._starts, kept, strict=True) if stays]
            left = tuple(kernel for kernel, stays in zip(kernels, kept, strict=True) if stays)
            self._front = self._pattern.front(self._front.word, left)


class Lookout:
    """Says where in one text a match of a pattern may begin, until there is one.

    Attributes:
        position: characters that were read.
    """

    def __init__(self, pattern: Pattern) -> None:
        self._pattern = pattern
        self._front = pattern.front(word=False)
        self._starts: list[int] = []  # that are still possible, the earliest first
        self.position = 0

    @property
    def undecided(self) -> int:
        """Where the earliest match may begin."""
        return self._starts[0] if self._starts else self.position

    def push(self, text: str) -> bool:
        """Read more of the text; whether something matches, behind which nothing is read."""
        pattern = self._pattern
        for char in text:
            move = pattern.move(self._front, pattern.kind(char))
            if move.matched:
                return True
            if self._starts or move.survivors:
                self._starts.append(self.position)
                if not move.steady:
                    self._starts = [self._starts[index] for index in move.survivors]
            self._front = move.front
            if self._starts and self.position - self._starts[0] >= pattern.longest:
                self._front = pattern.without_first(self._front)
                del self._starts[0]
            self.position += 1
        return False

    def finish(self) -> bool:
        """The text is complete; whether something matches at its end."""
        return bool(self._pattern.move(self._front, _END).matched)


def matches(pattern: Pattern, text: str) -> Iterator[Match]:
    """All matches of a whole text."""
    scanner = Scanner(pattern)
    yield from scanner.push(text)
    yield from scanner.finish()


def is_word(char: str) -> bool:
    """Whether a character is one of a word."""
    return char.isalnum() or char == "_"


def _test(item: Any, flags: int) -> Test:
    """Whether a character is of a class of the parser's."""
    kind, value = item
    name = str(kind)
    if name == "ANY":
        return (lambda char: True) if flags & _DOT_ALL else (lambda char: char != "\n")
    if name == "NOT_LITERAL":
        value = [("NEGATE", None), ("LITERAL", value)]
    items = [(kind, value)] if name == "LITERAL" else list(value)
    negated = bool(items) and str(items[0][0]) == "NEGATE"
    every = [_one(each, flags) for each in items[negated:]]

    def test(char: str) -> bool:
        variants = {char, char.lower(), char.upper()} if flags & _IGNORE_CASE else {char}
        return any(one(each) for one in every for each in variants if len(each) == 1) != negated

    return test


_CATEGORIES: dict[str, Test] = {"DIGIT": str.isdecimal, "SPACE": str.isspace, "WORD": is_word}


def _one(item: Any, flags: int) -> Test:
    kind, value = str(item[0]), item[1]
    if kind == "LITERAL":
        return lambda char: ord(char) == value
    if kind == "RANGE":
        return lambda char: value[0] <= ord(char) <= value[1]
    *negated, name = str(value).removeprefix("CATEGORY_").split("_")
    category = _CATEGORIES[name]
    return lambda char: (category(char) and (not flags & _ASCII or char.isascii())) != bool(negated)
