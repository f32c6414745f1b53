"""JSON that a model writes: its keys, strings and numbers are filtered as the texts that they are.

A phone number in JSON may be written with escapes, and what stands in place of something that is redacted must not
break the JSON. So the text is read as JSON while it comes, the rules see what a reader of the JSON would, and what they
leave is written as JSON again. A number that a rule redacts becomes a string.

What is no JSON is filtered as text from where it ceases to be.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from trident_serving.guard.filtering import (
    Asked,
    Findings,
    ModelFilter,
    Passed,
    PatternFilter,
    TextFilter,
    filter_all,
)
from trident_serving.guard.rules import Action, Rule, Stage

_SPACE = " \t\n\r"
_LITERALS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")  # json.dumps writes the last three
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_OF_A_NUMBER = re.compile(r"[-+.0-9eE]+")
_SCALAR = re.compile(r'[^ \t\n\r,:{}\[\]"]+')  # up to what ends it
_PLAIN = re.compile(r'[^"\\]+')  # characters of a string that stand for themselves
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_HEX = re.compile(r"[0-9a-fA-F]*")
_HIGH, _LOW = range(0xD800, 0xDC00), range(0xDC00, 0xE000)  # halves of a surrogate pair
_LOST = "\N{REPLACEMENT CHARACTER}"
_LARGEST = 1e21  # from here on JavaScript writes a whole number with an exponent, too


class Kind(Enum):
    """What a part of JSON is.

    STRUCTURE: what the rules don't read. TEXT: of a string. NUMBER: a whole one. REST: of a text that is no JSON.
    """

    STRUCTURE = auto()
    TEXT = auto()
    NUMBER = auto()
    REST = auto()


@dataclass(frozen=True)
class Part:
    """Some of the JSON, in its order.

    Attributes:
        text: of a string without quotation marks and escapes, else as it is written.
        key: whether the string is the name of a member.
        ends: whether the string ends with it.
    """

    kind: Kind
    text: str
    key: bool = False
    ends: bool = False


class _Next(Enum):
    """What may come next outside of strings and numbers."""

    VALUE = auto()
    VALUE_OR_END = auto()
    KEY = auto()
    KEY_OR_END = auto()
    COLON = auto()
    COMMA_OR_END = auto()
    NOTHING = auto()


class Reader:
    """Reads one JSON text as it comes.

    Attributes:
        broken: whether it has turned out to be none.
    """

    def __init__(self) -> None:
        self.broken = False
        self._next = _Next.VALUE
        self._open: list[str] = []  # closing brackets that are due
        self._string = False  # whether it is within one
        self._key = False
        self._escape = ""  # as far as it has been read
        self._high = ""  # the first half of a surrogate pair
        self._scalar = ""  # a number, true, false or null, as far as it has been read

    @property
    def complete(self) -> bool:
        """Whether the value has ended."""
        return self._next is _Next.NOTHING

    def push(self, text: str, *, end: bool = False) -> Iterator[Part]:
        """Take more of the text.

        Args:
            end: whether nothing follows.
        """
        place = 0
        while place < len(text) and not self.broken:
            if self._string:
                place = yield from self._within(text, place)
            elif self._scalar:
                place = yield from self._along(text, place)
            else:
                place = yield from self._between(text, place)
        if self.broken:
            yield from self._rest(text[place:], end=end)
        elif end:
            yield from self._ended()

    def _between(self, text: str, place: int) -> Generator[Part, None, int]:
        """Read one character outside of strings and numbers; returns the place behind it."""
        char, expected = text[place], self._next
        values = expected in (_Next.VALUE, _Next.VALUE_OR_END)
        if char in _SPACE:
            pass
        elif char == '"' and (values or expected in (_Next.KEY, _Next.KEY_OR_END)):
            self._string, self._key = True, not values
        elif char in "{[" and values:
            self._open.append("}" if char == "{" else "]")
            self._next = _Next.KEY_OR_END if char == "{" else _Next.VALUE_OR_END
        elif (char == "}" and expected in (_Next.KEY_OR_END, _Next.COMMA_OR_END) and self._open[-1] == "}") or (
            char == "]" and expected in (_Next.VALUE_OR_END, _Next.COMMA_OR_END) and self._open[-1] == "]"
        ):
            self._open.pop()
            self._valued()
        elif char == ":" and expected is _Next.COLON:
            self._next = _Next.VALUE
        elif char == "," and expected is _Next.COMMA_OR_END:
            self._next = _Next.KEY if self._open[-1] == "}" else _Next.VALUE
        elif values and char not in ",:{}[]":
            self._scalar = char
            self.broken = not _may_become_a_value(char)
            return place + 1
        else:
            self.broken = True
            return place
        yield Part(Kind.STRUCTURE, char)
        return place + 1

    def _along(self, text: str, place: int) -> Generator[Part, None, int]:
        """Read on in a number or a word; returns the place behind what was read."""
        run = _SCALAR.match(text, place)
        if run is None:
            yield from self._scalar_ended()
            return place
        self._scalar += run[0]
        self.broken = not _may_become_a_value(self._scalar)
        return run.end()

    def _scalar_ended(self) -> Iterator[Part]:
        number = bool(_NUMBER.fullmatch(self._scalar))
        if not number and self._scalar not in _LITERALS:
            self.broken = True
            return
        yield Part(Kind.NUMBER if number else Kind.STRUCTURE, self._scalar)
        self._scalar = ""
        self._valued()

    def _valued(self) -> None:
        """A value has ended."""
        self._next = _Next.COMMA_OR_END if self._open else _Next.NOTHING

    def _within(self, text: str, place: int) -> Generator[Part, None, int]:
        """Read on in a string; returns the place behind what was read."""
        if self._escape:
            return (yield from self._escaped(text[place], place))
        plain = _PLAIN.match(text, place)
        if plain is not None:
            yield self._text(self._half() + plain[0])
            return plain.end()
        if text[place] == "\\":
            self._escape = "\\"
            return place + 1
        yield self._text(self._half(), ends=True)
        yield Part(Kind.STRUCTURE, '"')
        self._string = False
        if self._key:
            self._next = _Next.COLON
        else:
            self._valued()
        return place + 1

    def _escaped(self, char: str, place: int) -> Generator[Part, None, int]:
        """Read on in an escape; returns the place behind what was read."""
        self._escape += char
        if self._escape[1] != "u":
            found, self._escape = _ESCAPES.get(char, self._escape), ""
            yield self._text(self._half() + found)
            return place + 1
        if not _HEX.fullmatch(self._escape, 2):  # it is none, and its last character may be any
            found, self._escape = self._escape[:-1], ""
            yield self._text(self._half() + found)
            return place
        if len(self._escape) == 6:
            code, self._escape = int(self._escape[2:], 16), ""
            if code in _HIGH:
                lost = self._half()
                self._high = chr(code)
                yield self._text(lost)
            elif code in _LOW and self._high:
                pair, self._high = self._high + chr(code), ""
                yield self._text(pair.encode("utf-16", "surrogatepass").decode("utf-16"))
            else:
                yield self._text(self._half() + (_LOST if code in _LOW else chr(code)))
        return place + 1

    def _half(self) -> str:
        """What stands for half of a pair whose other half does not come."""
        lost, self._high = _LOST if self._high else "", ""
        return lost

    def _text(self, text: str, *, ends: bool = False) -> Part:
        return Part(Kind.TEXT, text, self._key, ends)

    def _rest(self, text: str, *, end: bool) -> Iterator[Part]:
        """What is no JSON, with letters and digits in place of their escapes: some readers do not mind."""
        text, self._scalar = self._scalar + text, ""
        text = re.sub(r"\\u([0-9a-fA-F]{4})", _readable, text)
        cut = re.search(r"\\(?:u[0-9a-fA-F]{0,3})?\Z", text)
        if cut is not None and not end:
            self._scalar = cut[0]
            text = text[: cut.start()]
        yield Part(Kind.REST, text)

    def _ended(self) -> Iterator[Part]:
        """The text ends here, whatever is missing."""
        if self._string:
            yield self._text("", ends=True)
            written = f"\\u{ord(self._high):04x}" if self._high else ""
            yield Part(Kind.STRUCTURE, written + self._escape)
        elif self._scalar:
            yield from self._scalar_ended()
            if self.broken:
                yield from self._rest("", end=True)


def _may_become_a_value(text: str) -> bool:
    return bool(_OF_A_NUMBER.fullmatch(text)) or any(each.startswith(text) for each in _LITERALS)


def _readable(escape: re.Match[str]) -> str:
    code = int(escape[1], 16)
    char = _LOST if code in _HIGH or code in _LOW else chr(code)
    return char if char.isprintable() and char not in '"\\' else escape[0]


def number_texts(written: str) -> list[str]:
    """How a number may be read: as it is written, and as programs write it, without an exponent."""
    try:
        value = json.loads(written)
        if isinstance(value, float) and math.isfinite(value):
            plain = str(int(value)) if value.is_integer() and abs(value) < _LARGEST else repr(value)
        else:
            plain = written
    except ValueError:  # Python refuses thousands of digits
        plain = written
    return list(dict.fromkeys((written, plain)))


def changed_number(texts: Sequence[str], passed: Sequence[Passed]) -> str | None:
    """What stands in place of a number; None: the number itself.

    Args:
        texts: of `number_texts`.
        passed: what of each goes on, as far as the rules read them.
    """
    changed = [after.text for text, after in zip(texts, passed, strict=False) if after.text != text]
    return changed[-1] if changed else None


class Names:
    """The names of an object's members, of which each redacted one becomes another.

    Args:
        taken: names that stay.
    """

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)
        self._latest: dict[str, int] = {}  # the number that was put behind a name last

    def add(self, name: str) -> None:
        """Note a name that stays."""
        self._taken.add(name)

    def another(self, name: str) -> str:
        """A name that no other member has, for one that was redacted."""
        made, number = name, self._latest.get(name, 1)
        while made in self._taken:
            number += 1
            made = f"{name} {number}"
        self._latest[name] = number
        self._taken.add(made)
        return made


class JsonFilter:
    """A JSON text through all rules of a stage, which read its keys, strings and numbers; see `TextFilter`.

    Two things are read as they are written: rules that block by a pattern also read the JSON that comes out, where keys
    and values stand together, and models that redact nothing are asked about that. A model that redacts is asked about
    some hundred characters of keys and values at once.
    """

    def __init__(self, rules: Sequence[Rule], stage: Stage, findings: Findings, asked: Asked) -> None:
        redacting = [rule for rule in rules if rule.model and rule.action is Action.REDACT]
        hiding = [rule for rule in rules if rule.pattern and rule.action is not Action.ANNOTATE]
        self._rules = [rule for rule in rules if rule.pattern or rule in redacting]
        self._waits = max((rule.size for rule in redacting), default=0)  # characters that models are asked about
        self._stage, self._findings, self._asked = stage, findings, asked
        self._reader = Reader()
        self._string: TextFilter | None = None
        self._read = self._left = ""  # of the present string
        self._names: list[Names] = []  # of the members of each open object
        self._queue: list[Part] = []  # what waits for the models
        self._waiting = 0  # characters of it that they are asked about
        self._rest = self._filter()
        self._written = PatternFilter(hiding, stage, findings)
        self._written.redacts = False
        self._models = [
            ModelFilter(rule, stage, findings, asked) for rule in rules if rule.model and rule not in redacting
        ]
        self._blocked = False

    def _filter(self) -> TextFilter:
        return TextFilter(self._rules, self._stage, self._findings, self._asked)

    async def push(self, text: str, *, end: bool = False) -> Passed:
        """See `TextFilter.push`."""
        if self._blocked:
            return Passed("", blocked=True)
        out = written = ""
        for part in self._reader.push(text, end=end):
            if part.kind is Kind.REST and not self._written.redacts:
                written += await self._flushed()
                out += self._kept(self._written.push(written, end=self._blocked))
                written, self._written.redacts = "", True
            if not self._blocked:
                written += await self._taken(part)
            if self._blocked:
                break
        if not self._blocked and (end or self._reader.complete):
            written += await self._flushed()
        if not self._blocked and end and self._reader.broken:
            written += self._kept(await self._rest.push("", end=True))
        out += self._kept(self._written.push(written, end=end or self._blocked))
        for model in self._models:
            out = self._kept(await model.push(out, end=end or self._blocked))
        return Passed(out, self._blocked)

    def _kept(self, passed: Passed) -> str:
        self._blocked = self._blocked or passed.blocked
        return passed.text

    async def _taken(self, part: Part) -> str:
        """What is written for a part, as far as that is known."""
        if part.kind is Kind.REST:
            return self._kept(await self._rest.push(part.text))
        if not self._waits:
            return await self._now(part)
        if part.kind is Kind.STRUCTURE and not self._queue:  # nothing before it waits
            return self._structure(part.text)
        self._queue.append(part)
        self._waiting += 0 if part.kind is Kind.STRUCTURE else len(part.text)
        between = part.ends or part.kind is Kind.NUMBER
        return await self._flushed() if between and self._waiting >= self._waits else ""

    async def _now(self, part: Part) -> str:
        """What is written for a part where no rule asks a model that redacts."""
        if part.kind is Kind.STRUCTURE:
            return self._structure(part.text)
        if part.kind is Kind.NUMBER:
            texts = number_texts(part.text)
            return self._number(part, [await self._filter().push(text, end=True) for text in texts])
        if self._string is None:
            self._string, self._read, self._left = self._filter(), "", ""
        text = self._kept(await self._string.push(part.text, end=part.ends))
        self._read += part.text
        self._left += text
        if part.ends:
            self._string = None
        return _written(text + self._renamed(part))

    async def _flushed(self) -> str:
        """What is written for what waits for models."""
        queue, self._queue, self._waiting = self._queue, [], 0
        texts, read = list[str](), ""
        for part in queue:
            if part.kind is Kind.NUMBER:
                texts += number_texts(part.text)
            elif part.kind is Kind.TEXT:
                read += part.text
                if part.ends:
                    texts.append(read)
                    read = ""
        found = await filter_all(texts, self._rules, self._stage, self._findings, self._asked) if texts else []
        passed, out, self._read = iter(found), "", ""
        for part in queue:
            if part.kind is Kind.STRUCTURE:
                out += self._structure(part.text)
            elif part.kind is Kind.NUMBER:
                out += self._number(part, [one for _, one in zip(number_texts(part.text), passed, strict=False)])
            else:
                self._read += part.text
                if part.ends:
                    self._left = self._kept(next(passed))
                    out += _written(self._left + self._renamed(part))
                    self._read = ""
            if self._blocked:
                break
        return out

    def _structure(self, text: str) -> str:
        if text == "{":
            self._names.append(Names())
        elif text == "}":
            self._names.pop()
        return text

    def _number(self, part: Part, passed: Sequence[Passed]) -> str:
        """What is written for a number.

        Args:
            passed: of each of its `number_texts`, as far as the rules read them.
        """
        if any(each.blocked for each in passed):
            self._blocked = True
            return ""
        changed = changed_number(number_texts(part.text), passed)
        return part.text if changed is None else f'"{_written(changed)}"'

    def _renamed(self, part: Part) -> str:
        """What follows a name that has ended, so that a redacted one is no other member's."""
        if not part.key or not part.ends or self._blocked:
            return ""
        name, names = self._left, self._names[-1]
        if name == self._read:
            names.add(name)
            return ""
        return names.another(name)[len(name) :]


def _written(text: str) -> str:
    """Text as it stands between the quotation marks of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
