"""An answer in parts: text, reasoning, and calls of tools with their arguments, as they come.

A parser takes an answer character by character, so that its parts are the same however the answer was cut into chunks.
It is a coroutine: what it does next is where it stands in its code. It knows nothing of tokens, requests or threads.

A section of calls begins with a mark, such as `<tool_call>`. What it holds is told as a call once a name is known. A
section that holds no call is text, as it was written. White space next to a section or to reasoning is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

T = TypeVar("T")
Step = Generator[None, str, T]
Section = Callable[[], Step[bool]]

_NAMES, _ARGUMENTS = ("name", "tool_name"), ("arguments", "parameters")
_SPACE = " \t\r\n"
_OUTSIDE_STRINGS = frozenset(_SPACE + '{}[],:"+-.0123456789abcdefghijklmnopqrstuvwxyzE')


@dataclass(frozen=True)
class Text:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """More of the model's reasoning."""

    text: str


@dataclass(frozen=True)
class CallName:
    """A call begins; `index` counts the answer's calls from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Part = Text | Reasoning | CallName | CallArguments


class Ended(Exception):
    """The answer is complete: thrown into the coroutine."""


@dataclass(frozen=True)
class Direct:
    """What takes runs of characters that leave the coroutine where it is."""

    write: Callable[[str], None]
    pattern: re.Pattern[str]


def without(characters: Iterable[str]) -> re.Pattern[str]:
    """A run of other characters."""
    known = "".join(sorted({*characters}))
    return re.compile(f"[^{re.escape(known)}]+" if known else r"[\s\S]+")


_IN_STRING = without('"\\')


class AnswerParser:
    """One answer of one model; a family of models is a subclass.

    Args:
        tools: the functions that may be called, by their names: the JSON schemas of their arguments.
        calls: whether sections of calls are looked for.
        reasoning: whether reasoning comes apart; else it stays in the text, with its marks.
        opened: the mark by which the prompt has opened the reasoning; "": it has not.
        hidden: marks that are special tokens: no part of any text.
    """

    # Opening and closing marks of reasoning.
    thoughts: ClassVar[tuple[tuple[str, str], ...]] = (("<think>", "</think>"),)
    # Marks around the text itself.
    dropped: ClassVar[tuple[str, ...]] = ()
    # Characters that may open calls without a mark, at the beginning of the text; only tools that are known are calls.
    bare: ClassVar[str] = ""

    def __init__(
        self,
        tools: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        calls: bool = True,
        reasoning: bool = True,
        opened: str = "",
        hidden: frozenset[str] = frozenset(),
    ) -> None:
        self._tools = dict(tools or {})
        self._calls, self._reasoning, self._hidden = calls, reasoning, hidden
        self._sections = self.sections() if calls else {}
        self._closes = dict(self.thoughts)
        self._marks = (*self._sections, *self._closes, *self.dropped)
        self._parts: list[Part] = []
        self._text = Trimmed(lambda text: self._parts.append(Text(text)))
        self._thought = Trimmed(lambda text: self._parts.append(Reasoning(text)), fresh=True)
        self._count, self._argued = 0, False
        self._plain = Direct(self._text.write, without(mark[0] for mark in (*self._marks, *self.bare)))
        self._direct: Direct | None = None
        self._back = ""  # characters that are read again
        self._raw: list[str] = []  # what the current section has read, as long as it is no call
        self._kept = False  # whether that is kept
        self._machine = self._run(opened)
        next(self._machine)

    # Marks inside of sections, and those that close one.
    inner_marks: ClassVar[tuple[str, ...]] = ()

    def sections(self) -> dict[str, Section]:
        """The marks of this family's sections, with what reads one, and returns whether it has calls."""
        return {}

    @property
    def marks(self) -> frozenset[str]:
        """Every mark that the family knows."""
        pairs = [mark for pair in self.thoughts for mark in pair]
        return frozenset((*pairs, *self.dropped, *self.sections(), *self.inner_marks))

    def push(self, text: str) -> list[Part]:
        """Take more of the answer; returns what became certain."""
        position = 0
        while position < len(text):
            if self._direct is not None and (run := self._direct.pattern.match(text, position)):
                self._direct.write(run[0])
                if self._kept:
                    self._raw.append(run[0])
                position = run.end()
            else:
                self._machine.send(text[position])
                position += 1
        return self._taken()

    def finish(self) -> list[Part]:
        """The answer is complete; returns the rest."""
        with suppress(Ended, StopIteration):
            self._machine.throw(Ended())
        self._thought.finish()
        self._text.finish()
        return self._taken()

    def _taken(self) -> list[Part]:
        parts, self._parts = merged(self._parts), []
        return parts

    # The coroutine.

    def _run(self, opened: str) -> Step[None]:
        if opened:
            yield from self._think("", self._closes[opened])
        while True:
            mark = yield from self._next_mark()
            if mark in self._closes:
                yield from self._think(mark, self._closes[mark])
            elif mark in self.dropped:
                self._text.mark()
            else:
                yield from self._attempt(mark, self._sections.get(mark, self._bare))

    def _next_mark(self) -> Step[str]:
        """Show text up to a mark; returns it."""
        held = ""
        try:
            while True:
                held += yield from self._read(None if held else self._plain)
                while held:
                    if held in self._marks and (held not in self._closes or self._text.blank):
                        return held
                    if any(mark.startswith(held) and mark != held for mark in self._marks):
                        break
                    first, self._back, held = held[0], held[1:] + self._back, ""
                    if self._calls and first in self.bare and self._text.blank:
                        return first
                    self._text.write(first)
        except Ended:
            self._text.write(self._shown(held))
            raise

    def _think(self, mark: str, close: str) -> Step[None]:
        held = ""
        write = self._thought.write if self._reasoning else self._text.write
        if not self._reasoning:
            write(self._shown(mark))
        direct = Direct(write, without(close[0]))
        try:
            while held != close:
                held += yield from self._read(None if held else direct)
                while not close.startswith(held):
                    write(held[0])
                    held = held[1:]
        except Ended:
            write(held)
            raise
        if self._reasoning:
            self._thought.mark()
            self._text.mark()
        else:
            write(self._shown(close))

    def _attempt(self, mark: str, section: Section) -> Step[None]:
        """A section as its calls, or as text where it has none."""
        self._raw, self._kept, before = [mark], True, self._count
        try:
            yield from section()
            if self._count > before:
                self._text.mark()
        finally:
            if self._count == before:
                self._text.write(self._shown("".join(self._raw)))
            self._kept = False

    def _bare(self) -> Step[bool]:
        """Calls without a mark, by their first character."""
        if self._raw == ["["]:
            return (yield from self._list(bare=True))
        called = yield from self._object(bare=True)
        if called and (character := (yield from self._after_space())) not in ";,":
            self._unread(character)
        return called

    def _shown(self, text: str) -> str:
        for mark in self._hidden:
            text = text.replace(mark, "")
        return text

    # Reading.

    def _read(self, direct: Direct | None = None) -> Step[str]:
        """The next character.

        Args:
            direct: takes characters that change nothing; the next one is the first that does.
        """
        if self._back:
            character, self._back = self._back[0], self._back[1:]
        else:
            self._direct = direct
            character = yield
            self._direct = None
        if self._kept:
            self._raw.append(character)
        return character

    def _unread(self, text: str) -> None:
        self._back = text + self._back
        if self._kept:
            del self._raw[len(self._raw) - len(text) :]

    def _after_space(self) -> Step[str]:
        """The next character that is no space."""
        while True:
            character = yield from self._read()
            if character not in _SPACE:
                return character

    def _expect(self, mark: str) -> Step[bool]:
        """Read a mark behind white space; what is something else is left to be read."""
        held = yield from self._after_space()
        while held != mark:
            if not mark.startswith(held):
                self._unread(held)
                return False
            held += yield from self._read()
        return True

    def _until(self, *marks: str) -> Step[tuple[str, str]]:
        """The text before one of some marks, and the mark."""
        text = ""
        while True:
            text += yield from self._read()
            for mark in marks:
                if text.endswith(mark):
                    return text[: len(text) - len(mark)], mark

    # Calls.

    def _begin(self, name: str) -> None:
        self._text.mark()
        self._kept = False
        self._parts.append(CallName(self._count, name))
        self._count += 1
        self._argued = False

    def _argue(self, text: str) -> None:
        if text:
            self._parts.append(CallArguments(self._count - 1, text))
            self._argued = True

    def _end_call(self) -> bool:
        if not self._argued:
            self._argue("{}")
        return True

    def _call(self, name: str, arguments: Mapping[str, Any]) -> None:
        """A call that is known as a whole."""
        self._begin(name)
        self._argue(json.dumps(arguments, ensure_ascii=False))

    def _string(self) -> Step[str]:
        """A JSON string, behind its first quotation mark."""
        text = ""
        while True:
            character = yield from self._read()
            if character == '"':
                return _decoded(text)
            text += character
            if character == "\\":
                text += yield from self._read()

    def _value(self, first: str, write: Callable[[str], None]) -> Step[bool]:
        """A JSON value as it is written; False where it is none."""
        depth, character = 0, first
        while True:
            if character not in _OUTSIDE_STRINGS or (character in "}]," and not depth):
                self._unread(character)
                return character in "}]," or character in _SPACE
            if not depth and character in _SPACE:
                return True
            write(character)
            if character == '"':
                yield from self._rest_of_string(write)
            depth += (character in "{[") - (character in "}]")
            if not depth and character in '}]"':
                return True
            character = yield from self._read()

    def _rest_of_string(self, write: Callable[[str], None]) -> Step[None]:
        direct = Direct(write, _IN_STRING)
        while True:
            character = yield from self._read(direct)
            write(character)
            if character == "\\":
                write((yield from self._read()))
            elif character == '"':
                return

    def _arguments(self, first: str) -> Step[bool]:
        """The arguments of a call that has begun, as a JSON object, or as a string that holds one."""
        if first == '"':
            self._argue((yield from self._string()))
            return True
        if first == "{":
            return (yield from self._value(first, self._argue))
        written: list[str] = []
        good = yield from self._value(first, written.append)
        self._argue("" if (text := "".join(written)) == "null" else text)
        return good

    def _object(self, bare: bool = False) -> Step[bool]:
        """A call as a JSON object, behind its brace.

        Args:
            bare: only an object of a known tool's name and its arguments is a call.
        """
        name, kept, begun = "", "", False
        while True:
            character = yield from self._after_space()
            if character == "}":
                break
            if character == ",":
                continue
            if character != '"':
                self._unread(character)
                return begun
            key = yield from self._string()
            character = yield from self._after_space()
            if character != ":":
                self._unread(character)
                return begun
            character = yield from self._after_space()
            if key in _NAMES and not name:
                if character != '"':
                    self._unread(character)
                    return begun
                name = yield from self._string()
                if bare and name not in self._tools:
                    return False
            elif key in _ARGUMENTS and name and not begun:
                begun = True
                self._begin(name)
                if not (yield from self._arguments(character)):
                    return self._end_call()
            elif key == "function" and character == "{" and not name:
                return (yield from self._wrapped(bare))
            else:
                written: list[str] = []
                if not (yield from self._value(character, written.append)):
                    return begun
                if key in _ARGUMENTS and not begun:
                    kept = "".join(written)
        if name and not begun and (kept or not bare):
            self._begin(name)
            self._argue("" if kept == "null" else _decoded(kept[1:-1]) if kept.startswith('"') else kept)
            begun = True
        return self._end_call() if begun else False

    def _wrapped(self, bare: bool) -> Step[bool]:
        """A call inside of `{"type": "function", "function": {...}}`, and the rest of that."""
        called = yield from self._object(bare)
        if called:
            depth = 1
            while depth:
                character = yield from self._after_space()
                if character == '"':
                    yield from self._string()
                depth += (character in "{[") - (character in "}]")
        return called

    def _list(self, bare: bool = False) -> Step[bool]:
        """Calls as a JSON list of objects, behind its bracket."""
        called = False
        while True:
            character = yield from self._after_space()
            if character == "]":
                return called
            if character == ",":
                continue
            if character != "{":
                self._unread(character)
                return called
            if not (yield from self._object(bare)):
                return called
            called = True

    def _object_or_list(self) -> Step[bool]:
        character = yield from self._after_space()
        if character == "{":
            return (yield from self._object())
        if character == "[":
            return (yield from self._list())
        self._unread(character)
        return False


class Trimmed:
    """Text without the white space next to marks.

    Args:
        emit: gets it.
        fresh: whether white space at its beginning is left out.
    """

    def __init__(self, emit: Callable[[str], None], *, fresh: bool = False) -> None:
        self._emit = emit
        self._fresh = fresh
        self._held = ""
        self.blank = True  # nothing but white space, since the beginning or the last mark

    def write(self, text: str) -> None:
        """Add text."""
        text = self._held + text
        if self._fresh:
            text = text.lstrip(_SPACE)
        body = text.rstrip(_SPACE)
        self._held = text[len(body) :]
        if body:
            self._fresh = self.blank = False
            self._emit(body)

    def mark(self) -> None:
        """There is a mark here."""
        self._held, self._fresh, self.blank = "", True, True

    def finish(self) -> None:
        """The end, which is no mark."""
        if self._held:
            self._emit(self._held)
        self._held = ""


def merged(parts: Sequence[Part]) -> list[Part]:
    """Parts of which no two neighbours could be one."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if isinstance(part, CallArguments) and isinstance(last, CallArguments) and last.index == part.index:
            found[-1] = CallArguments(part.index, last.text + part.text)
        elif isinstance(part, Text) and isinstance(last, Text):
            found[-1] = Text(last.text + part.text)
        elif isinstance(part, Reasoning) and isinstance(last, Reasoning):
            found[-1] = Reasoning(last.text + part.text)
        else:
            found.append(part)
    return found


def _decoded(text: str) -> str:
    """What is between a JSON string's quotation marks, decoded; as it is where that can't be."""
    try:
        found: str = json.loads(f'"{text}"', strict=False)
        found.encode()  # half of a surrogate pair is no text that can be sent
    except ValueError:
        return text
    return found
