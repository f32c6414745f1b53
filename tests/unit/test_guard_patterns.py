"""Patterns and filters of guards: what matches, what is held back, and that chunks change nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trident_serving.errors import ReadingError
from trident_serving.guard import patterns
from trident_serving.guard.filtering import (
    Findings,
    PatternFilter,
    SecondReading,
    Span,
    TextFilter,
    Windows,
    at_once,
)
from trident_serving.guard.patterns import Match, Pattern, Scanner, matches
from trident_serving.guard.rules import Action, Guard, Rule, Stage

EXPRESSIONS = [
    ("a+b", 6),
    ("ab|abc|bcd", 0),
    (r"\b\w{2,4}\b", 0),
    (r"a(?:b|ab)*c", 7),
    (r"[^a ]{2,3}\B", 0),
    ("(a|b|ab)(c|bcd)", 0),
    ("a+", 3),
    (r"(?i)[^a]b", 0),
    (r"(?i:A)[^B]+?c", 5),
    (r"\w+@\w+", 6),
    (r"(?:aa|b)+c", 9),
    (r"a\bb| \b|\d\s", 0),
    (r"(?s).\n|a.", 0),
]


def cut(text: str, places: Sequence[int]) -> list[str]:
    """A text in chunks."""
    ends = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[start:end] for start, end in pairwise(ends)]


def by_hand(expression: str, text: str, longest: int) -> list[Match]:
    """The leftmost longest matches, by asking `re` about every span."""
    flags = re.match(r"\(\?[is]\)", expression)
    prefix, rest = (flags.group(), expression[flags.end() :]) if flags else ("", expression)
    found, place = [], 0
    while place < len(text):
        ends = []
        for end in range(place + 1, min(len(text), place + longest) + 1):
            # The look-ahead pins the end, and lets \b see the whole text.
            match = re.compile(rf"{prefix}(?:{rest})(?=[\s\S]{{{len(text) - end}}}\Z)").match(text, place)
            if match is not None and match.end() == end:
                ends.append(end)
        if ends:
            found.append(Match(place, ends[-1]))
        place = ends[-1] if ends else place + 1
    return found


@pytest.mark.parametrize(("expression", "longest"), EXPRESSIONS)
@settings(max_examples=120, deadline=None)
@given(text=st.text("aabbcdAB1 @\n", max_size=14), places=st.lists(st.integers(0, 20), max_size=5))
def test_matches_are_the_leftmost_longest_ones_in_any_chunks(
    expression: str, longest: int, text: str, places: list[int]
) -> None:
    pattern = Pattern(expression, longest)
    expected = by_hand(expression, text, pattern.longest)
    scanner, found = Scanner(pattern), list[Match]()
    for chunk in cut(text, places):
        found += scanner.push(chunk)
        assert all(match.start >= scanner.undecided or match in found for match in expected)
        assert scanner.position - scanner.undecided <= pattern.longest
    assert found + scanner.finish() == expected


@pytest.mark.parametrize(
    ("expression", "longest", "message"),
    [
        ("a(", 0, "is no regular expression: missing"),
        ("a*", 0, "matches the empty text"),
        ("a+", 0, "has no longest match: give `longest`, 4096 characters at most"),
        ("a{5}", 3, "longest must be between 5, the shortest match, and 4096, found 3"),
        ("a{9,}", 5000, "longest must be between 9, the shortest match, and 4096, found 5000"),
        ("(?:ab){5000}", 0, "has no longest match"),
        ("^a", 0, r"has \^ and \$, which a text that comes in chunks can't be searched for"),
        ("a$", 0, r"has \^ and \$"),
        (r"(a)\1", 0, "has references to groups"),
        ("(?<=b)a", 0, "has look-around or possessive parts"),
        ("a(?!b)", 0, "has look-around or possessive parts"),
        ("(?>a|ab)c", 0, "has look-around or possessive parts"),
        ("(?:[ab]{0,70}c){60}", 4096, "is too large: counted repetitions are copies"),
    ],
)
def test_expressions_that_are_refused(expression: str, longest: int, message: str) -> None:
    with pytest.raises(ReadingError, match=message):
        Pattern(expression, longest)


def test_a_text_can_not_stretch_the_time() -> None:
    """`re` takes exponential time over the first text; here what is kept stays bounded, too."""
    pattern = Pattern("(?:a+)+b", 100)
    text = "a" * 20_000
    assert list(matches(pattern, text)) == []
    assert list(matches(pattern, text + "b")) == [Match(19_901, 20_001)]
    hostile = Pattern(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+", 254)
    assert len(list(matches(hostile, "a.b@-" * 2000))) == 1000
    list(matches(hostile, "".join(chr(0x4E00 + (place * 7919) % 20_000) + ".@"[place % 2] for place in range(20_000))))
    assert len(hostile._fronts) <= patterns.MAX_FRONTS


NAMES = {"name": "names", "action": "redact", "entities": "tagger", "window": 24}
TABLE: dict[str, Any] = {
    "rules": [
        {"name": "email", "action": "redact", "pattern": r"\b[\w.]+@\w+\.\w+", "longest": 40},
        {"name": "number", "action": "redact", "pattern": r"\b\d(?:[ -]?\d){3,8}\b", "replacement": "#"},
        {"name": "dotted", "action": "redact", "pattern": r"\w\.\w"},
        {"name": "order", "action": "block", "pattern": r"(?i)\bignore (?:all|previous) \w{1,12}"},
        {"name": "cat", "action": "annotate", "pattern": "cats?"},
    ]
}
PIECES = (
    "anna.b@ex.org",
    "ignore all rules",
    "Ignore ",
    "previous x",
    "12 345-6",
    "7",
    "cat",
    "s",
    "@",
    ".",
    " ",
    "\n",
    "é",
)
TEXTS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


class Capitals:
    """Implements `Asked`: capitals are names, and texts with x are unsafe."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.calls = 0

    async def spans(self, rule: Rule, texts: Sequence[str]) -> list[list[Span]] | None:
        self.asked += texts
        self.calls += 1
        if rule.entities:
            return [[Span(each.start(), each.end(), "NAME") for each in re.finditer("[A-Z]", text)] for text in texts]
        return [[Span(0, len(text), "bad")] if "x" in text else [] for text in texts]


def filtered(guard: Guard, chunks: Sequence[str]) -> tuple[str, bool, list[dict[str, Any]], Capitals]:
    """What passes of a text, whether it was blocked, and what was found."""
    findings, asked, passed = Findings(), Capitals(), ""
    text = TextFilter(guard.of(Stage.OUTPUT), Stage.OUTPUT, findings, asked)
    for number, chunk in enumerate([*chunks, ""]):
        taken = at_once(text.push(chunk, end=number == len(chunks)))
        passed += taken.text
        if taken.blocked:
            return passed, True, findings.told(), asked
    return passed, False, findings.told(), asked


GUARD = Guard.from_table("g", TABLE)
ASKING = Guard.from_table(
    "g",
    {
        "rules": [
            *TABLE["rules"],
            NAMES,
            {"name": "bad", "action": "block", "classifier": "c", "labels": ["bad"], "window": 16},
        ]
    },
)


@pytest.mark.parametrize("guard", [GUARD, ASKING])
@settings(max_examples=150, deadline=None)
@given(text=TEXTS, places=st.lists(st.integers(0, 120), max_size=9))
def test_a_text_in_chunks_becomes_what_it_becomes_as_a_whole(guard: Guard, text: str, places: list[int]) -> None:
    whole, blocked, findings, asked = filtered(guard, [text])
    chunks, chunks_blocked, chunks_findings, others = filtered(guard, cut(text, places))
    assert (chunks, chunks_blocked) == (whole, blocked)
    if not blocked:
        assert chunks_findings == findings
        assert {*others.asked} == {*asked.asked}
    found = {rule.name for rule in guard.rules if rule.pattern and re.search(rule.pattern, text)}
    assert blocked or {each["rule"] for each in findings} >= found
    assert blocked >= ("order" in found)
    if guard is GUARD and found <= {"cat"}:
        assert whole == text


@settings(max_examples=300, deadline=None)
@given(text=TEXTS, places=st.lists(st.integers(0, 120), max_size=9), last=st.booleans())
def test_a_second_reading_finds_what_a_first_one_does(text: str, places: list[int], last: bool) -> None:
    rules = [rule for rule in GUARD.rules if rule.action is not Action.ANNOTATE]
    told = []
    for kind in (PatternFilter, SecondReading):
        findings = Findings()
        reading, passed = kind(rules, Stage.OUTPUT, findings, last=last), []
        chunks = [*cut(text, places), ""]
        for number, chunk in enumerate(chunks, start=1):
            passed.append(reading.push(chunk, end=number == len(chunks)))
            if passed[-1].blocked:
                break
        told.append(("".join(each.text for each in passed), passed[-1].blocked, findings.told()))
    assert told[0] == told[1]


def test_what_is_held_back() -> None:
    text = TextFilter(GUARD.of(Stage.OUTPUT), Stage.OUTPUT, Findings(), Capitals())
    shown = [at_once(text.push(chunk)).text for chunk in ("Dear ", "Anna ", "see ann", "a.b@ex", ".org", " now", " 12")]
    # A word may become an address, and a number a longer one; what nothing can match any more goes at once.
    assert shown == ["Dear ", "Anna ", "see ", "", "", "[email] ", "now "]
    assert at_once(text.push(" 9.", end=True)).text == "12 9."


def test_matches_that_overlap_are_one() -> None:
    passed, blocked, findings, _ = filtered(GUARD, ["go to anna.b@ex.org.x now"])
    assert (passed, blocked) == ("go to [email] now", False)  # `a.b` lies in the address, `g.x` goes beyond it
    assert {each["rule"]: each["count"] for each in findings} == {"email": 1, "dotted": 3}
    chain = Guard.from_table("g", {"rules": [
        {"name": "one", "action": "redact", "pattern": "abc"}, {"name": "two", "action": "redact", "pattern": "cde"},
        {"name": "three", "action": "block", "pattern": "ef"},
    ]})  # fmt: skip
    assert filtered(chain, ["xabcd", "eg"])[:2] == ("x[one]g", False)
    assert filtered(chain, ["xabcd", "ef y"])[:2] == ("x", True)


def test_annotations_hold_nothing_back() -> None:
    guard = Guard.from_table("g", {"rules": [TABLE["rules"][4], {**NAMES, "action": "annotate", "name": "n"}]})
    findings = Findings()
    text = TextFilter(guard.of(Stage.OUTPUT), Stage.OUTPUT, findings, Capitals())
    assert [at_once(text.push(chunk, end=chunk == "t")).text for chunk in ("the ca", "ts of Bo", "b", "t")] == [
        "the ca", "ts of Bo", "b", "t",
    ]  # fmt: skip
    assert findings.told() == [
        {"rule": "cat", "action": "annotate", "stage": "output", "count": 1},
        {"rule": "n", "action": "annotate", "stage": "output", "count": 1},
    ]


def test_windows_end_where_the_text_says() -> None:
    windows = Windows(12)
    assert windows.push("One. Two thr") == ["One. "]
    assert windows.push("ee four five") == ["Two three "]
    assert windows.push("", end=True) == ["four five"]
    assert Windows(5).push("abcdefgh") == ["abcde"]
    whole = Windows(0)
    assert (whole.push("One. "), whole.push("Two."), whole.push("", end=True)) == ([], [], ["One. Two."])


@settings(max_examples=100, deadline=None)
@given(text=st.text("ab .!\n", max_size=60), places=st.lists(st.integers(0, 60), max_size=6))
def test_windows_are_the_same_in_any_chunks(text: str, places: list[int]) -> None:
    whole, parts = Windows(9), Windows(9)
    found = [window for chunk in cut(text, places) for window in parts.push(chunk)] + parts.push("", end=True)
    assert found == whole.push(text, end=True)
    assert "".join(found) == text
    assert all(len(window) <= 9 for window in found)


GOOD = {"name": "r", "pattern": "ab"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "guards.g must be a table with a list of rules"),
        ({"rules": []}, "rules must be one at least, each with a name of its own"),
        ({"rules": [GOOD, GOOD]}, "rules must be one at least, each with a name of its own"),
        ({"rules": [GOOD | {"colour": 1}]}, r"rules\[0\]: unknown key colour; known are name, action, stages, pattern"),
        ({"rules": [{"name": "r"}]}, "with one of pattern, entities, classifier, judge, found none"),
        ({"rules": [GOOD | {"entities": "m"}]}, r"found \['pattern', 'entities'\]"),
        ({"rules": [GOOD | {"action": "delete"}]}, "action must be one of block, redact, annotate, found 'delete'"),
        ({"rules": [GOOD | {"stages": []}]}, "stages must be input, output or both"),
        ({"rules": [GOOD | {"stages": ["middle"]}]}, "must be one of input, output, found 'middle'"),
        ({"rules": [{"name": "r", "judge": "m", "action": "redact"}]}, "action can't be redact: a judge says nothing"),
        ({"rules": [{"name": "r", "classifier": "m"}]}, "labels must name the classes that count"),
        ({"rules": [{"name": "r", "entities": "m", "threshold": 1.5}]}, "threshold must be above 0 and at most 1"),
        ({"rules": [{"name": "r", "judge": "m", "template": "{{ user }}"}]}, "template must use user and assistant"),
        ({"rules": [{"name": "r", "judge": "m", "template": "{% x"}]}, "template is not a Jinja template"),
        (
            {"rules": [{"name": "r", "judge": "m", "template": "{{ user }}{{ assistant }}"}]},
            "safe and unsafe must be two different answers",
        ),
        (
            {"rules": [GOOD | {"action": "redact", "replacement": "xabx"}]},
            "replacement 'xabx' of rule r is what rule r looks for",
        ),
        ({"rules": [GOOD], "on_failure": "maybe"}, "on_failure must be one of closed, open, found 'maybe'"),
    ],
)
def test_guards_that_can_not_be(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ReadingError, match=message):
        Guard.from_table("g", table)


def test_a_guard_is_a_parameter_of_a_config() -> None:
    table = {
        "on_failure": "open",
        "timeout": 3,
        "rules": [GOOD, {"name": "j", "judge": "m", "template": "llama-guard", "stages": ["output"]}, NAMES],
    }
    guard = Guard.from_table("g", table)
    assert Guard.from_json(guard.as_json()) == guard
    assert '"rules": [{"name": "r", "pattern": "ab"}, ' in guard.as_json()  # what is not said is not written
    assert guard.hides(Stage.OUTPUT)
    assert not Guard.from_table("g", {"rules": [GOOD | {"action": "annotate"}]}).hides(Stage.INPUT)
    (judge,) = (rule for rule in guard.rules if rule.judge)
    assert (judge.verdicts, judge.size, guard.rules[2].size) == (("safe", "unsafe"), 0, 24)
    asked = judge.prompt_template.render(user="Hi", assistant="Ho", policy="O1: Cheese.")
    assert "O1: Cheese." in asked
    assert "User: Hi\nAgent: Ho" in asked.replace("\n\n", "\n")
    alone = judge.prompt_template.render(user="Hi", assistant="", policy="")
    assert "ONLY THE LAST User message" in alone
    assert "Agent" not in alone
