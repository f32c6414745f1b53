"""JSON through a guard: escapes hide nothing, what is redacted leaves JSON, and chunks change nothing."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_guard_patterns import Capitals, cut
from tests.unit.test_guard_service import TOKENIZER
from trident_serving.guard import prompts
from trident_serving.guard.filtering import Findings, Passed, at_once
from trident_serving.guard.rules import Guard, Stage
from trident_serving.guard.structured import JsonFilter, Kind, Reader, number_texts
from trident_serving.text import encode_texts

PHONE = {"name": "phone", "action": "redact", "pattern": r"\b0\d{3}-\d{3}\b|\b49\d{6}\b"}
SECRET = {"name": "secret", "action": "block", "pattern": "xyzzy"}
PASSWORD = {"name": "password", "action": "block", "pattern": r'password["\']? ?: ?["\']?[^\s"\']{4,8}'}
QUOTE = {"name": "quote", "action": "redact", "pattern": "hm", "replacement": 'a "\\\n'}
NAMES = {"name": "names", "action": "redact", "entities": "tagger", "window": 24}
BAD = {"name": "bad", "action": "block", "classifier": "c", "labels": ["bad"], "window": 16}


def passed(rules: Sequence[Any], chunks: Sequence[str]) -> tuple[str, bool, Capitals, list[dict[str, Any]]]:
    """What passes of a JSON text, whether it was blocked, what was asked, and what was found."""
    guard, asked, findings = Guard.from_table("g", {"rules": [dict(rule) for rule in rules]}), Capitals(), Findings()
    text = JsonFilter(guard.of(Stage.OUTPUT), Stage.OUTPUT, findings, asked)
    out = ""
    for number, chunk in enumerate([*chunks, ""]):
        taken = at_once(text.push(chunk, end=number == len(chunks)))
        out += taken.text
        if taken.blocked:
            return out, True, asked, findings.told()
    return out, False, asked, findings.told()


@pytest.mark.parametrize(
    ("sent", "left"),
    [
        (r'{"call": "\u0030\u003123-456"}', '{"call": "[phone]"}'),
        (r'{"\u00301\u00323-456": 1, "0123-456": 2}', '{"[phone]": 1, "[phone] 2": 2}'),
        ('{"n": 49123456, "m": [49123456.0, 4.9123456e7, 5]}', '{"n": "[phone]", "m": ["[phone]", "[phone]", 5]}'),
        ('{"a": "hm", "b": "\\u00fc \\/ \\ud83d\\ude00"}', '{"a": "a \\"\\\\\\n", "b": "ü / 😀"}'),
        (r'["\ud83d", "\udc00x"]', '["\N{REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}x"]'),
        ('"0123-456"', '"[phone]"'),
        ("49123456", '"[phone]"'),
        ("[true,null,\n-1.5e3,{}]", "[true,null,\n-1.5e3,{}]"),
        ('{"a": "012', '{"a": "012'),  # cut where the answer may have no more tokens
        ('{"a": "x\\u00', '{"a": "x\\u00'),
        ('{"a": "0123-456', '{"a": "[phone]'),
        # What is no JSON is a text from there on, and what it begins with counts.
        ("call 0123-456 now", "call [phone] now"),
        ('{"a": 1} 0123-456', '{"a": 1} [phone]'),
        ('{"a": 1,} "\\u00301\\u00323-456"', '{"a": 1,} "[phone]"'),
        ("0 123-456", "0 123-456"),
        ("0123-456", "[phone]"),
        ("[1, 49] 49123456", "[1, 49] [phone]"),
    ],
)
def test_what_rules_find_in_json(sent: str, left: str) -> None:
    for chunks in ([sent], list(sent)):
        assert passed([PHONE, SECRET, QUOTE], chunks)[:2] == (left, False)


def test_a_number_cannot_be_cut_in_two_by_what_breaks_the_json() -> None:
    """The first half is a number of JSON, and the second what makes a text of it."""
    rule = {"name": "long", "action": "redact", "pattern": r"\b\d{3} \d{3}\b"}
    assert passed([rule], ['{"a": 123 456}'])[0] == '{"a": [long]}'
    assert passed([rule], ['{"a": 123, "b": 456}'])[0] == '{"a": 123, "b": 456}'


@pytest.mark.parametrize(
    ("sent", "left"),
    [
        (r'{"a": 1, "b": "so x\u0079zzy"}', '{"a": 1, "b": "so '),
        (r'{"x\u0079zzy": 1}', '{"'),
        ('{"password": "hunter2"}', '{"'),  # key and value together
        (r'{"pass\u0077ord": "hunter2"}', '{"'),
    ],
)
def test_what_blocks_json(sent: str, left: str) -> None:
    for chunks in ([sent], list(sent)):
        assert passed([PHONE, SECRET, PASSWORD], chunks)[:2] == (left, True)


@pytest.mark.parametrize("rules", [[PASSWORD], [PASSWORD, NAMES]])
def test_what_is_blocked_where_json_breaks_off_stays_so(rules: Sequence[Any]) -> None:
    """What is no JSON goes its own way, behind a match that blocks all of it."""
    sent = '{"a": 1, "password": "hunter2", "b": "so"c Anna'
    for chunks in ([sent], list(sent), [sent[:40], sent[40:]]):
        left, blocked, _, found = passed(rules, chunks)
        assert (left, blocked) == ('{"a": 1, "', True)
        assert found == [{"rule": "password", "action": "block", "stage": "output", "count": 1}]


def lines(run: Callable[[], Any]) -> int:
    """Lines of Python that run: what a text costs, whatever else the machine does."""
    count = 0

    def step(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "line"
        return step

    before = sys.gettrace()
    sys.settrace(step)
    try:
        run()
    finally:
        sys.settrace(before)
    return count


MEMBER = {**PHONE, "pattern": r"\b0123-456 \d{1,4}\b"}


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (MEMBER, lambda size: json.dumps(dict.fromkeys((f"0123-456 {number}" for number in range(size)), 0))),
        (NAMES, lambda size: '["a"' + ",[]" * size),
        (NAMES, lambda size: "[" * size),
    ],
)
def test_json_of_twice_the_length_costs_twice_as_much(rule: Any, text: Callable[[int], str]) -> None:
    passed([rule], [text(20)])  # what the automaton keeps is made
    costs = [lines(partial(passed, [rule], [text(size)])) for size in (400, 800)]
    assert costs[1] < 2.3 * costs[0]


def test_names_that_become_one_in_a_prompt_cost_as_much_each() -> None:
    async def every(texts: Sequence[str]) -> list[Passed]:
        return [Passed("x" if text.startswith("name") else text) for text in texts]

    def filtered(size: int) -> None:
        members = dict.fromkeys((f"name {number}" for number in range(size)), True)
        inputs = {"documents": encode_texts([json.dumps([members])])[None]}
        found = at_once(prompts.filtered(inputs, [], TOKENIZER, every))
        assert found is not None
        assert list(json.loads(found["documents"].item())[0])[-1] == f"x {size}"

    costs = [lines(partial(filtered, size)) for size in (400, 800)]
    assert costs[1] < 2.3 * costs[0]


def test_a_stream_of_json_holds_back_what_may_match() -> None:
    guard = Guard.from_table("g", {"rules": [PHONE]})
    text = JsonFilter(guard.rules, Stage.OUTPUT, Findings(), Capitals())
    chunks = ('{"a": "on', "e tw", "o 01", "23", "-4", '56 three", "b', '": 1', "2", "}")
    shown = [at_once(text.push(chunk)).text for chunk in chunks]
    assert shown == ['{"a": "on', "e tw", "o ", "", "", '[phone] three", "b', '": ', "", "12}"]


def test_models_are_asked_about_keys_and_values_together() -> None:
    sent = json.dumps({"name": "Anna", "more": ["one two", "Bert", 12], "Carl": {"a": "b" * 10}})
    left, _, asked, found = passed([PHONE, NAMES], [sent])
    assert json.loads(left) == {
        "name": "[NAME]nna",
        "more": ["one two", "[NAME]ert", 12],
        "[NAME]arl": {"a": "b" * 10},
    }
    assert asked.calls == 2  # as soon as 24 characters wait, and at the end
    assert asked.asked == ["name", "Anna", "more", "one two", "Bert", "12", "Carl", "a", "b" * 10]
    assert found == [{"rule": "names", "action": "redact", "stage": "output", "count": 3}]
    left, blocked, asked, _ = passed([BAD], ['{"a": "fine", "b": "x"}'])
    assert (left, blocked) == ('{"a": "fine", ', True)  # as it is written
    assert asked.asked == ['{"a": "fine", ', '"b": "x"}']


NUMBERS = st.one_of(st.integers(-(10**12), 10**12), st.floats(allow_nan=False, allow_infinity=False), st.just(49123456))
TEXTS = st.lists(st.sampled_from(["0123-456", "Anna", '"', "\\", "é😀", "\n", "hm", " x ", "b"]), max_size=4).map(
    "".join
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=12,
)


def by_hand(value: Any, asking: bool) -> Any:
    """What a reader of filtered JSON gets, but for the names of members."""
    if isinstance(value, str):
        read = re.sub(r"\b0123-456\b", "[phone]", value)
        # A word's end that was none before a redaction is one behind it, and the pattern reads again.
        return re.sub(r"\b0123-456\b", "[phone]", re.sub("[A-Z]", "[NAME]", read)) if asking else read
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, list):
        return [by_hand(item, asking) for item in value]
    if isinstance(value, dict):
        return [by_hand(item, asking) for item in value.values()]
    texts = number_texts(json.dumps(value))
    changed = [after for text in texts if (after := re.sub(r"\b49\d{6}\b", "[phone]", text)) != text]
    return changed[-1] if changed else value


def in_escapes(value: Any) -> str:
    """JSON in which every character of a string is an escape."""
    if isinstance(value, str):
        units = value.encode("utf-16-be").hex()
        return '"' + "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4)) + '"'
    if isinstance(value, list):
        return f"[{', '.join(map(in_escapes, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{in_escapes(key)}: {in_escapes(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def without_names(value: Any) -> Any:
    if isinstance(value, list):
        return [without_names(item) for item in value]
    return [without_names(item) for item in value.values()] if isinstance(value, dict) else value


@settings(max_examples=250, deadline=None)
@given(
    value=VALUES,
    escaped=st.booleans(),
    asking=st.booleans(),
    places=st.lists(st.integers(0, 200), max_size=6),
)
def test_what_is_left_is_json_of_the_same_form(value: Any, escaped: bool, asking: bool, places: list[int]) -> None:
    rules = [PHONE, *([NAMES] if asking else [])]
    sent = in_escapes(value) if escaped else json.dumps(value, ensure_ascii=False)
    whole, blocked, _, found = passed(rules, [sent])
    chunks = passed(rules, cut(sent, places))
    assert (chunks[0], chunks[1], chunks[3]) == (whole, blocked, found)
    assert not blocked
    assert without_names(json.loads(whole)) == by_hand(value, asking)
    if not found:
        assert json.loads(whole) == value


@settings(max_examples=200, deadline=None)
@given(
    text=st.text('{}[]:," 01-.eE+\\ntrufalsAb', max_size=16),
    places=st.lists(st.integers(0, 20), max_size=4),
)
def test_the_reader_takes_what_json_takes(text: str, places: list[int]) -> None:
    reader, parts = Reader(), []
    for chunk in cut(text, places):
        parts += list(reader.push(chunk))
    parts += list(reader.push("", end=True))
    try:
        json.loads(text)
        valid = True
    except ValueError:
        valid = False
    assert valid == (reader.complete and not reader.broken)
    written = "".join(part.text for part in parts)
    if "\\" not in text:
        assert written == text
    if valid and not reader.broken:
        assert not [part for part in parts if part.kind is Kind.REST]


def test_numbers_as_programs_write_them() -> None:
    assert number_texts("4.9e7") == ["4.9e7", "49000000"]
    assert number_texts("12.50") == ["12.50", "12.5"]
    assert number_texts("-0") == ["-0"]
    assert number_texts("1e400") == ["1e400"]
    assert number_texts("9" * 5000) == ["9" * 5000]
