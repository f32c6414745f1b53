"""How families of models write calls of tools: a class each."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from trident_serving.generation.parsing.parser import AnswerParser, Direct, Ended, Section, Step, Trimmed, without
from trident_serving.generation.parsing.python_calls import calls_in

_HARMONY_ENDS = ("<|end|>", "<|return|>", "<|call|>")
_NAME = re.compile(r"[\w.:/-]+")
Schema = Mapping[str, Any]


class Hermes(AnswerParser):
    """`<tool_call>{"name": ..., "arguments": ...}</tool_call>`: Hermes, Qwen 2.5 and 3."""

    inner_marks: ClassVar[tuple[str, ...]] = ("</tool_call>",)

    def sections(self) -> dict[str, Section]:
        """See `AnswerParser.sections`."""
        return {"<tool_call>": self._tagged}

    def _tagged(self) -> Step[bool]:
        called = yield from self._body()
        if called:
            yield from self._expect("</tool_call>")
        return called

    def _body(self) -> Step[bool]:
        return (yield from self._object_or_list())

    # Arguments that are written one by one, each as a text.

    def _argue_one(self, name: str, text: str, schema: Schema, first: bool) -> None:
        value = json.dumps(_typed(text, (schema.get("properties") or {}).get(name)), ensure_ascii=False)
        self._argue(f"{'{' if first else ', '}{json.dumps(name, ensure_ascii=False)}: {value}")


class QwenCoder(Hermes):
    """`<tool_call><function=name><parameter=one>value</parameter></function></tool_call>`, or JSON."""

    inner_marks: ClassVar[tuple[str, ...]] = ("</tool_call>", "</function>", "</parameter>")

    def sections(self) -> dict[str, Section]:
        """See `AnswerParser.sections`."""
        return {"<tool_call>": self._tagged, "<function=": self._function}

    def _body(self) -> Step[bool]:
        character = yield from self._after_space()
        self._unread(character)
        if character != "<":
            return (yield from self._object_or_list())
        if not (yield from self._expect("<function=")):
            return False
        return (yield from self._function())

    def _function(self) -> Step[bool]:
        name, _ = yield from self._until(">")
        if not _NAME.fullmatch(name):
            return False
        self._begin(name)
        schema, first = self._tools.get(name, {}), True
        while (yield from self._expect("<parameter=")):
            key, _ = yield from self._until(">")
            text, _ = yield from self._until("</parameter>")
            self._argue_one(key, text.removeprefix("\n").removesuffix("\n"), schema, first)
            first = False
        self._argue("{}" if first else "}")
        yield from self._expect("</function>")
        return True


class Glm(Hermes):
    """`<tool_call>name <arg_key>one</arg_key><arg_value>value</arg_value></tool_call>`."""

    inner_marks: ClassVar[tuple[str, ...]] = ("</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")

    def _body(self) -> Step[bool]:
        character = yield from self._after_space()
        self._unread(character)
        if character in "{[":
            return (yield from self._object_or_list())
        name, mark = yield from self._until("\n", "<arg_key>", "</tool_call>")
        if not _NAME.fullmatch(name.strip()):
            return False
        if mark != "\n":
            self._unread(mark)
        self._begin(name.strip())
        schema, first = self._tools.get(name.strip(), {}), True
        while (yield from self._expect("<arg_key>")):
            key, _ = yield from self._until("</arg_key>")
            if not (yield from self._expect("<arg_value>")):
                break
            text, _ = yield from self._until("</arg_value>")
            self._argue_one(key.strip(), text, schema, first)
            first = False
        self._argue("{}" if first else "}")
        return True


class PythonCalls(AnswerParser):
    """Calls that are written in Python."""

    def _python(self, *closes: str) -> Step[bool]:
        """Code up to a closing mark, or to the end of the answer."""
        start = len(self._raw)
        try:
            code, _ = yield from self._until(*closes)
        except Ended:
            self._run_code("".join(self._raw[start:]))
            raise
        return self._run_code(code)

    def _python_list(self) -> Step[bool]:
        """`[f(a=1), g()]`, behind its bracket."""
        code, depth, quote = "[", 1, ""
        while depth:
            character = yield from self._read()
            code += character
            if quote:
                if character == "\\":
                    code += yield from self._read()
                quote = "" if character == quote else quote
            elif character in "'\"":
                quote = character
            else:
                depth += (character in "[({") - (character in "])}")
        return self._run_code(code)

    def _run_code(self, code: str) -> bool:
        calls = calls_in(code, self._tools)
        for name, arguments in calls or ():
            self._call(name, arguments)
        return calls is not None

    def _bare(self) -> Step[bool]:
        if self._raw == ["{"]:
            return (yield from super()._bare())
        character = yield from self._after_space()
        self._unread(character)
        return (yield from super()._bare() if character == "{" else self._python_list())


class Llama3(PythonCalls):
    """JSON without a mark, `<|python_tag|>`, Python lists, and `<function=name>{...}</function>`."""

    bare: ClassVar[str] = "{["
    inner_marks: ClassVar[tuple[str, ...]] = ("</function>",)

    def sections(self) -> dict[str, Section]:
        """See `AnswerParser.sections`."""
        return {"<|python_tag|>": self._tag, "<function=": self._function}

    def _tag(self) -> Step[bool]:
        character = yield from self._after_space()
        self._unread(character)
        return (yield from self._object_or_list() if character == "{" else self._python())

    def _function(self) -> Step[bool]:
        name, _ = yield from self._until(">")
        character = yield from self._after_space()
        if not _NAME.fullmatch(name) or character != "{":
            self._unread(character)
            return False
        self._begin(name)
        yield from self._arguments(character)
        yield from self._expect("</function>")
        return self._end_call()


class Mistral(AnswerParser):
    """`[TOOL_CALLS]` with a JSON list, or with a name and its arguments."""

    thoughts: ClassVar[tuple[tuple[str, str], ...]] = (("[THINK]", "[/THINK]"), ("<think>", "</think>"))
    inner_marks: ClassVar[tuple[str, ...]] = ("[ARGS]", "[CALL_ID]")

    def sections(self) -> dict[str, Section]:
        """See `AnswerParser.sections`."""
        return {"[TOOL_CALLS]": self._calls_section}

    def _calls_section(self) -> Step[bool]:
        character = yield from self._after_space()
        self._unread(character)
        if character in "[{":
            return (yield from self._object_or_list())
        name, mark = yield from self._until("[ARGS]", "[CALL_ID]", "{")
        if mark == "[CALL_ID]":
            yield from self._until("[ARGS]")
        elif mark == "{":
            self._unread(mark)
        if not _NAME.fullmatch(name.strip()):
            return False
        self._begin(name.strip())
        character = yield from self._after_space()
        yield from self._arguments(character)
        return self._end_call()


class Phi(AnswerParser):
    """`<|tool_call|>[...]<|/tool_call|>`, `functools[...]`, or a JSON list without a mark."""

    bare: ClassVar[str] = "{["
    inner_marks: ClassVar[tuple[str, ...]] = ("<|/tool_call|>",)

    def sections(self) -> dict[str, Section]:
        """See `AnswerParser.sections`."""
        return {"<|tool_call|>": self._tagged, "functools[": self._list}

    def _tagged(self) -> Step[bool]:
        called = yield from self._object_or_list()
        if called:
            yield from self._expect("<|/tool_call|>")
        return called


class Granite(AnswerParser):
    """`<|tool_call|>[...]` or `<tool_call>[...]`, up to the end."""

    inner_marks: ClassVar[tuple[str, ...]] = ("</tool_call>",)

    def sections(self) -> dict[str, Section]:
        """See `AnswerParser.sections`."""
        return {"<|tool_call|>": self._object_or_list, "<tool_call>": self._tagged}

    def _tagged(self) -> Step[bool]:
        called = yield from self._object_or_list()
        if called:
            yield from self._expect("</tool_call>")
        return called


class Gemma(PythonCalls):
    """Fenced Python or JSON, the same without a fence, and FunctionGemma's own form."""

    bare: ClassVar[str] = "{["
    inner_marks: ClassVar[tuple[str, ...]] = ("<end_function_call>", "<escape>")

    def sections(self) -> dict[str, Section]:
        """See `AnswerParser.sections`."""
        fenced = {f"```{name}": self._fenced for name in ("json", "tool_call")}
        code = {f"```{name}": partial(self._python, "```") for name in ("tool_code", "python")}
        return {**fenced, **code, "<start_function_call>": self._own_form}

    def _fenced(self) -> Step[bool]:
        character = yield from self._after_space()
        if character not in "{[":
            self._unread(character)
            return False
        called = yield from self._object(bare=True) if character == "{" else self._list(bare=True)
        if called:
            yield from self._expect("```")
        return called

    def _own_form(self) -> Step[bool]:
        """`call:name{one:<escape>text<escape>,two:3}`."""
        if not (yield from self._expect("call:")):
            return False
        name, _ = yield from self._until("{")
        if not _NAME.fullmatch(name.strip()):
            return False
        body, _ = yield from self._until("}<end_function_call>", "}\n<end_function_call>")
        pattern = r"([^:,\s]+):(?:<escape>(.*?)<escape>|([^,]*))"
        found = {
            key: text if not plain else _typed(plain, None)
            for key, text, plain in re.findall(pattern, body, flags=re.DOTALL)
        }
        self._call(name.strip(), found)
        return True


class DeepSeek(AnswerParser):
    """`<｜tool▁call▁begin｜>`, a name, `<｜tool▁sep｜>` and the arguments; V3 and R1 put them into a fence."""

    begin: ClassVar[str] = "<｜tool▁call▁begin｜>"
    separator: ClassVar[str] = "<｜tool▁sep｜>"
    end: ClassVar[str] = "<｜tool▁call▁end｜>"
    dropped: ClassVar[tuple[str, ...]] = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
    inner_marks: ClassVar[tuple[str, ...]] = ("<｜tool▁sep｜>", "<｜tool▁call▁end｜>")

    def sections(self) -> dict[str, Section]:
        """See `AnswerParser.sections`."""
        return {self.begin: self._one}

    def _one(self) -> Step[bool]:
        name, _ = yield from self._until(self.separator)
        character = yield from self._after_space()
        if character != "{":  # what came first is the call's kind
            rest, _ = yield from self._until("\n", "{")
            name, character = character + rest.removesuffix("```json"), ""
            if (yield from self._expect("```json")):
                character = yield from self._after_space()
        name = self._name_in(name.strip())
        if character != "{" or not _NAME.fullmatch(name):
            self._unread(character)
            return False
        self._begin(name)
        yield from self._arguments(character)
        self._end_call()
        yield from self._expect("```")  # which only some versions have
        yield from self._expect(self.end)
        return True

    def _name_in(self, text: str) -> str:
        return text


class Kimi(DeepSeek):
    """`<|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{...}<|tool_call_end|>`."""

    begin = "<|tool_call_begin|>"
    separator = "<|tool_call_argument_begin|>"
    end = "<|tool_call_end|>"
    dropped: ClassVar[tuple[str, ...]] = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
    inner_marks: ClassVar[tuple[str, ...]] = ("<|tool_call_argument_begin|>", "<|tool_call_end|>")

    def _name_in(self, text: str) -> str:
        return text.removeprefix("functions.").partition(":")[0]


class CommandR(AnswerParser):
    """`<|START_ACTION|>` with a JSON list, or `Action:` with a fenced one; its text is between marks, too."""

    thoughts: ClassVar[tuple[tuple[str, str], ...]] = (("<|START_THINKING|>", "<|END_THINKING|>"),)
    dropped: ClassVar[tuple[str, ...]] = ("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>")
    inner_marks: ClassVar[tuple[str, ...]] = ("<|END_ACTION|>",)

    def sections(self) -> dict[str, Section]:
        """See `AnswerParser.sections`."""
        closes = {"<|START_ACTION|>": "<|END_ACTION|>", "Action: ```json": "```", "Action:```json": "```"}
        return {mark: partial(self._action, close) for mark, close in closes.items()}

    def _action(self, close: str) -> Step[bool]:
        called = yield from self._object_or_list()
        if called:
            yield from self._expect(close)
        return called


class Harmony(AnswerParser):
    """gpt-oss: `<|channel|>final<|message|>...<|end|>`, with a channel for reasoning, and calls to `functions.name`."""

    thoughts: ClassVar[tuple[tuple[str, str], ...]] = ()
    inner_marks: ClassVar[tuple[str, ...]] = (
        "<|start|>",
        "<|channel|>",
        "<|message|>",
        "<|constrain|>",
        *_HARMONY_ENDS,
    )

    def _run(self, opened: str) -> Step[None]:
        while True:
            self._raw, self._kept = [], True
            try:
                header, _ = yield from self._until("<|message|>")
            except Ended:
                if "<|channel|>" not in "".join(self._raw):  # an answer without channels
                    self._text.write(self._shown("".join(self._raw)))
                raise
            self._kept = False
            recipient = re.search(r"to=functions\.([\w.-]+)", header)
            if recipient and self._calls:
                self._begin(recipient[1])
                character = yield from self._after_space()
                yield from self._arguments(character)
                self._end_call()
                yield from self._until(*_HARMONY_ENDS)
            else:
                yield from self._say(self._thought if "analysis" in header and self._reasoning else self._text)

    def _say(self, sink: Trimmed) -> Step[None]:
        """A message up to its end."""
        direct, held = Direct(sink.write, without("<")), ""
        try:
            while held not in _HARMONY_ENDS:
                held += yield from self._read(None if held else direct)
                while not any(mark.startswith(held) for mark in _HARMONY_ENDS):
                    sink.write(held[0])
                    held = held[1:]
        except Ended:
            sink.write(self._shown(held))
            raise
        sink.mark()


class SmolLM3(Hermes, PythonCalls):
    """`<tool_call>` with JSON, or `<code>` with Python."""

    inner_marks: ClassVar[tuple[str, ...]] = ("</tool_call>", "</code>")

    def sections(self) -> dict[str, Section]:
        """See `AnswerParser.sections`."""
        return {"<tool_call>": self._tagged, "<code>": partial(self._python, "</code>")}


class Lfm2(PythonCalls):
    """`<|tool_call_start|>[f(a=1)]<|tool_call_end|>`."""

    inner_marks: ClassVar[tuple[str, ...]] = ("<|tool_call_end|>",)

    def sections(self) -> dict[str, Section]:
        """See `AnswerParser.sections`."""
        return {"<|tool_call_start|>": partial(self._python, "<|tool_call_end|>")}


class Json(Gemma, Hermes):
    """Whatever form is common, for templates of no known family."""

    inner_marks: ClassVar[tuple[str, ...]] = ("</tool_call>",)

    def sections(self) -> dict[str, Section]:
        """See `AnswerParser.sections`."""
        return {**Gemma.sections(self), **Hermes.sections(self)}


def _typed(text: str, schema: object) -> Any:
    """An argument that is written as a text, with the type that its schema names; any, where it names none."""
    kinds = schema.get("type") if isinstance(schema, Mapping) else None
    if kinds == "string" or (isinstance(kinds, list) and "string" in kinds and text != "null"):
        return text
    try:
        value = json.loads(text)
        # Python reads NaN and halves of surrogate pairs, which are no JSON.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return text
    return value
