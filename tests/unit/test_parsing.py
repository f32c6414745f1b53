"""Answers in parts: what each family writes, in any chunks; and texts that only look like calls."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_chat_templates import STYLES, USER, chat_of, tokenizer
from tests.unit.test_text_output import Collected
from trident_serving.chat.messages import Conversation
from trident_serving.errors import InvalidRequest
from trident_serving.generation.answer import FinishReason
from trident_serving.generation.parsing import (
    FAMILIES,
    CallArguments,
    CallName,
    Reasoning,
    Text,
    forced_call,
    format_of,
    schemas_of,
)
from trident_serving.generation.parts import AnswerParts
from trident_serving.generation.request import GenerationRequest
from trident_serving.generation.stream import TextStream
from trident_serving.runtime.sampling.params import SamplingParams
from trident_serving.runtime.tokenizer import TextTokenizer
from trident_serving.schema.fields import ChatFormat

WEATHER = {
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "now"}}]
ZURICH, BERN, NOW = (
    ("weather", {"city": "Zürich", "days": 2}),
    ("weather", {"city": 'B}ern "x" </tool_call>'}),
    ("now", {}),
)


@dataclass
class Answer:
    """All parts of an answer, joined."""

    text: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)

    @classmethod
    def of(cls, kind: ChatFormat, chunks: list[str], **options: Any) -> Answer:
        parser = FAMILIES[kind](schemas_of(TOOLS), **options)
        found = cls()
        for part in [part for chunk in chunks for part in parser.push(chunk)] + parser.finish():
            match part:
                case Text(text):
                    found.text += text
                case Reasoning(text):
                    found.reasoning += text
                case CallName(index, name):
                    assert index == len(found.calls)
                    found.calls.append([name, ""])
                case CallArguments(index, text):
                    assert index == len(found.calls) - 1
                    found.calls[index][1] += text
        return found

    def parts(self) -> tuple[str, str, list[tuple[str, Any]]]:
        return self.text, self.reasoning, [(name, json.loads(arguments)) for name, arguments in self.calls]


def js(call: tuple[str, Any], names: tuple[str, str] = ("name", "arguments"), indent: int | None = None) -> str:
    return json.dumps(dict(zip(names, call, strict=True)), ensure_ascii=False, indent=indent)


Z, B, N = js(ZURICH), js(BERN), js(NOW)
LZ, LN = js(ZURICH, ("name", "parameters")), js(NOW, ("name", "parameters"))
CZ, CN = js(ZURICH, ("tool_name", "parameters")), js(NOW, ("tool_name", "parameters"))
DS, DE, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
ARGS = json.dumps(ZURICH[1], ensure_ascii=False)
XML = "<function=weather>\n<parameter=city>\nZürich\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>"
THINK = "<think>\nHe asks <tool_call>.\n</think>\n\n"
THOUGHT = "He asks <tool_call>."
GLM = "<arg_key>city</arg_key>\n<arg_value>Zürich</arg_value>\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n"

# Of each format: an answer, and its text, reasoning and calls.
ANSWERS: list[tuple[str, str, str, str, list[Any]]] = [
    ("hermes", f"<tool_call>\n{Z}\n</tool_call>", "", "", [ZURICH]),
    ("hermes", f"Wait.\n<tool_call>{Z}</tool_call>\n<tool_call>\n{B}\n</tool_call>\n", "Wait.", "", [ZURICH, BERN]),
    ("hermes", f"{THINK}One <moment>.\n\n<tool_call>\n{N}\n</tool_call> Done", "One <moment>.Done", THOUGHT, [NOW]),
    ("hermes", f"<tool_call>{js(ZURICH, ('arguments', 'name'))}", "", "", []),
    ("hermes", f'<tool_call>{{"arguments": {ARGS}, "name": "weather"}}</tool_call>', "", "", [ZURICH]),
    ("hermes", f'<tool_call>{{"name": "weather", "arguments": {json.dumps(ARGS)}}}</tool_call>', "", "", [ZURICH]),
    (
        "hermes",
        '<tool_call>{"name": "now"}</tool_call><tool_call>{"name": "now", "arguments": null}',
        "",
        "",
        [NOW] * 2,
    ),
    ("hermes", f'<tool_call>{{"type": "function", "function": {Z}, "id": 5}}</tool_call>!', "!", "", [ZURICH]),
    ("hermes", f'<tool_call>{{"name": "weather", "arguments": {ARGS}</tool_call>!', "!", "", [ZURICH]),
    ("hermes", f"<tool_call>{js(ZURICH, indent=2)}</tool_call>", "", "", [ZURICH]),
    ("hermes", "Use <tool_call> so: <tool_call>nothing</tool_call>", "", "", []),
    (
        "hermes",
        " A plain\n answer with <b> and <think>, {} \n",
        " A plain\n answer with <b> and <think>, {} \n",
        "",
        [],
    ),
    ("hermes", "\n\nhi", "\n\nhi", "", []),
    ("smollm3", f"<tool_call>{Z}</tool_call>", "", "", [ZURICH]),
    ("smollm3", "<code>weather(city='Zürich', days=2)\nprint(now())</code>", "", "", [ZURICH, NOW]),
    ("smollm3", "<code>x = weather('Zürich', 2)</code> ok", "ok", "", [ZURICH]),
    ("smollm3", "<code>import os</code>", "<code>import os</code>", "", []),
    ("smollm3", f"{THINK}Yes", "Yes", THOUGHT, []),
    ("qwen_coder", f"I look.\n<tool_call>\n{XML}\n</tool_call>", "I look.", "", [ZURICH]),
    ("qwen_coder", f"<tool_call>{Z}</tool_call><tool_call>\n{XML}\n</tool_call>", "", "", [ZURICH, ZURICH]),
    ("qwen_coder", f"{XML}", "", "", [ZURICH]),
    ("qwen_coder", "<tool_call>\n<function=now>\n</function>\n</tool_call>", "", "", [NOW]),
    ("glm", f"{THINK}\n<tool_call>weather\n{GLM}</tool_call>\n<tool_call>now</tool_call>", "", THOUGHT, [ZURICH, NOW]),
    ("llama3", LZ, "", "", [ZURICH]),
    ("llama3", f"{LZ}; {LN}", "", "", [ZURICH, NOW]),
    ("llama3", f"<|python_tag|>{LZ}", "", "", [ZURICH]),
    ("llama3", '<|python_tag|>weather.call(city="Zürich", days=2)', "", "", [ZURICH]),
    ("llama3", "[weather(city='Zürich', days=2), now()]", "", "", [ZURICH, NOW]),
    ("llama3", f"<function=weather>{ARGS}</function>", "", "", [ZURICH]),
    ("llama3", f"So: {LZ}", f"So: {LZ}", "", []),
    ("llama3", '{"name": "Anna", "age": 5}', '{"name": "Anna", "age": 5}', "", []),
    ("llama3", '{"name": "now", "age": 5}', '{"name": "now", "age": 5}', "", []),
    ("llama3", "[1, 2] is a list", "[1, 2] is a list", "", []),
    ("llama3", "{not json", "{not json", "", []),
    ("mistral", f"[TOOL_CALLS] [{Z}, {N}]", "", "", [ZURICH, NOW]),
    ("mistral", f"Wait. [TOOL_CALLS]weather[ARGS]{ARGS}[TOOL_CALLS]now{{}}", "Wait.", "", [ZURICH, NOW]),
    ("mistral", f"[TOOL_CALLS]weather[CALL_ID]abc[ARGS]{ARGS}", "", "", [ZURICH]),
    ("mistral", "[THINK]Hm.[/THINK]Yes [1]", "Yes [1]", "Hm.", []),
    ("phi", f"<|tool_call|>[{Z}]<|/tool_call|>", "", "", [ZURICH]),
    ("phi", f"functools[{Z}]", "", "", [ZURICH]),
    ("phi", f"[{Z}]", "", "", [ZURICH]),
    ("granite", f"<|tool_call|>[{Z}, {N}]", "", "", [ZURICH, NOW]),
    ("granite", f"<tool_call>[{Z}]</tool_call>", "", "", [ZURICH]),
    ("gemma", f"```json\n{Z}\n```", "", "", [ZURICH]),
    ("gemma", "```tool_code\nprint(weather(city='Zürich', days=2))\n```", "", "", [ZURICH]),
    ("gemma", '```json\n{"a": 1}\n```', '```json\n{"a": 1}\n```', "", []),
    ("gemma", "```python\nx = 1\n```", "```python\nx = 1\n```", "", []),
    ("gemma", "[weather(city='Zürich', days=2)]", "", "", [ZURICH]),
    (
        "gemma",
        "<start_function_call>call:weather{city:<escape>Zürich<escape>,days:2}<end_function_call>",
        "",
        "",
        [ZURICH],
    ),
    (
        "deepseek",
        f"Hm.<｜tool▁calls▁begin｜>{DS}function{SEP}weather\n```json\n{ARGS}\n```{DE}\n{DS}function{SEP}now\n```json\n{{}}\n```"
        f"{DE}<｜tool▁calls▁end｜>",
        "Hm.",
        "",
        [ZURICH, NOW],
    ),
    ("deepseek", f"<｜tool▁calls▁begin｜>{DS}weather{SEP}{ARGS}{DE}<｜tool▁calls▁end｜>", "", "", [ZURICH]),
    (
        "kimi",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        f"{ARGS}<|tool_call_end|><|tool_calls_section_end|>",
        "",
        "",
        [ZURICH],
    ),
    (
        "command_r",
        f"<|START_THINKING|>I look.<|END_THINKING|><|START_ACTION|>[\n    {CZ},\n {CN}\n]<|END_ACTION|>",
        "",
        "I look.",
        [ZURICH, NOW],
    ),
    ("command_r", "<|START_RESPONSE|>Yes <b>.<|END_RESPONSE|>", "Yes <b>.", "", []),
    ("command_r", f"Action: ```json\n[{CZ}]\n```", "", "", [ZURICH]),
    (
        "harmony",
        "<|channel|>analysis<|message|>He asks.\n<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        f"<|constrain|>json<|message|>{ARGS}<|call|>",
        "",
        "He asks.",
        [ZURICH],
    ),
    ("harmony", f" to=functions.weather<|channel|>commentary json<|message|>{ARGS}", "", "", [ZURICH]),
    (
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes <b> <|x|>.<|return|>",
        "Yes <b> <|x|>.",
        "Hm.",
        [],
    ),
    ("harmony", "no channels", "no channels", "", []),
    ("lfm2", "<|tool_call_start|>[weather(city='Zürich', days=2)]<|tool_call_end|>It", "It", "", [ZURICH]),
    ("lfm2", "<|tool_call_start|>\n```python\nnow()\n```\n<|tool_call_end|>", "", "", [NOW]),
    ("json", f"<tool_call>{Z}</tool_call>", "", "", [ZURICH]),
    ("json", Z, "", "", [ZURICH]),
]
# Texts that are no calls stay whole.
WHOLE = ("Use <tool_call> so: <tool_call>nothing</tool_call>",)


@pytest.mark.parametrize(("kind", "answer", "text", "reasoning", "calls"), ANSWERS)
def test_answers_are_parted(kind: str, answer: str, text: str, reasoning: str, calls: list[Any]) -> None:
    found = Answer.of(ChatFormat(kind), [answer])
    if answer in WHOLE:
        assert found == Answer(answer)
    elif not calls and not text and not reasoning:
        # No name is known: nothing is told but what was written.
        assert found == Answer(answer)
    else:
        assert found.parts() == (text, reasoning, calls)


def cuts(text: str, places: list[int]) -> Iterator[str]:
    for start, end in pairwise([0, *sorted(place % (len(text) + 1) for place in places), len(text)]):
        yield text[start:end]


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(ANSWERS), st.lists(st.integers(0, 400), max_size=8), st.integers(0, 400))
def test_any_chunks_give_the_same_parts(
    answer: tuple[str, str, str, str, list[Any]], places: list[int], end: int
) -> None:
    """Also of an answer that breaks off anywhere; and one character at a time."""
    kind, whole = ChatFormat(answer[0]), answer[1]
    text = whole[: end % (len(whole) + 1)] if end % 2 else whole
    right = Answer.of(kind, [text])
    assert Answer.of(kind, list(cuts(text, places))) == right
    assert Answer.of(kind, list(text)) == right


PIECES = [
    "<tool_call>",
    "</tool_call>",
    '{"name": "now"',
    ', "arguments": {',
    "}",
    '"',
    "\\",
    "[",
    "]",
    "<think>",
    "</think>",
]
PIECES += ["<|channel|>", "<|message|>", "to=functions.now", "<|end|>"]
PIECES += [
    "<|python_tag|>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "now",
    "<function=",
    "now>",
    DS,
    SEP,
    DE,
    "```json",
    "```",
    " ",
    "\n",
]
PIECES += [
    "<|tool_call|>",
    "functools[",
    "<|START_ACTION|>",
    "now()",
    "<code>",
    "a",
    ",",
    ";",
    "<arg_key>",
    "call:",
    "{",
]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(list(FAMILIES)),
    st.lists(st.sampled_from(PIECES), max_size=14),
    st.lists(st.integers(0, 99), max_size=5),
)
def test_any_text_is_parted_without_an_error(kind: ChatFormat, pieces: list[str], places: list[int]) -> None:
    """Into the same parts in any chunks; and where nothing is asked for, into the text as it is."""
    text = "".join(pieces)
    assert Answer.of(kind, list(cuts(text, places))) == Answer.of(kind, [text])
    unparted = Answer.of(kind, [text], calls=False, reasoning=False)
    if not any(mark in text for mark in FAMILIES[kind].dropped) and kind != ChatFormat.HARMONY:
        assert unparted == Answer(text)


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "now", "arguments": "\\ud800"}</tool_call>'),
        ("qwen_coder", '<function=weather><parameter=more>"\\ud800"</parameter></function>'),
        ("glm", "<tool_call>weather<arg_key>more</arg_key><arg_value>[NaN]</arg_value></tool_call>"),
        ("lfm2", "<|tool_call_start|>[weather(city='\\ud800')]<|tool_call_end|>"),
        ("lfm2", "<|tool_call_start|>[weather(city={'\\ud800': 1})]<|tool_call_end|>"),
        ("lfm2", "<|tool_call_start|>[weather(days=1e999)]<|tool_call_end|>"),
    ],
)
def test_what_python_reads_and_json_is_not(kind: str, answer: str) -> None:
    """Half of a surrogate pair, which no response can hold, and numbers that JSON lacks: they stay what was written."""
    parser = FAMILIES[ChatFormat(kind)](schemas_of(TOOLS))
    parts = AnswerParts(parser, {}, [1], calls=True, reasoning=False)
    text = parts.push(answer) + parts.finish()
    _, calls = parts.take()
    assert calls is not None
    told = text + calls
    assert told.encode().decode() == told
    assert "ud800" in told or "NaN" in told or "1e999" in told
    for call in json.loads(calls):
        if kind != "hermes":
            json.loads(call["function"]["arguments"], parse_constant=pytest.fail)


def test_parts_come_as_they_are_written() -> None:
    parser = FAMILIES[ChatFormat.HERMES](schemas_of(TOOLS))
    pushed = [
        parser.push(chunk) for chunk in ("Hm", "m <tool_", "call>", '{"name": "wea', 'ther", "argu', 'ments": {"ci')
    ]
    pushed += [parser.push('ty": "Z"}'), parser.push("}</tool_call>"), parser.finish()]
    assert pushed == [
        [Text("Hm")],
        [Text("m")],
        [],
        [],
        [],
        [CallName(0, "weather"), CallArguments(0, '{"ci')],
        [CallArguments(0, 'ty": "Z"}')],
        [],
        [],
    ]


def test_reasoning_that_the_prompt_has_opened() -> None:
    options: dict[str, Any] = {"opened": "<think>"}
    assert Answer.of(ChatFormat.HERMES, ["He\n asks.\n</think>\n\nYes"], **options) == Answer("Yes", "He\n asks.")
    assert Answer.of(ChatFormat.HERMES, ["He asks, and"], **options) == Answer("", "He asks, and")
    kept = Answer.of(ChatFormat.HERMES, ["He asks.\n</think>\n\nYes"], **options, reasoning=False)
    assert kept == Answer("He asks.\n</think>\n\nYes")


def test_reasoning_stays_in_the_text_unless_it_is_asked_for() -> None:
    """With its marks, but for those that are special tokens, which no text shows."""
    text = f"{THINK}Yes.\n<tool_call>{Z}</tool_call>"
    found = Answer.of(ChatFormat.HERMES, [text], reasoning=False)
    assert found.parts() == (f"{THINK}Yes.", "", [ZURICH])
    hidden = frozenset(("<|START_THINKING|>", "<|END_THINKING|>"))
    thought = "<|START_THINKING|>I look.<|END_THINKING|>Yes"
    assert Answer.of(ChatFormat.COMMAND_R, [thought], reasoning=False, hidden=hidden) == Answer("I look.Yes")
    assert Answer.of(ChatFormat.LLAMA3, ["<|python_tag|>import"], hidden=frozenset(("<|python_tag|>",))) == Answer(
        "import"
    )


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("hermes", '<tool_call>{"x": [' * 1500),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a":' * 700),
        ("hermes", "<tool_call><tool_call>" * 1000),
        ("json", "[" * 20000),
        ("llama3", "[now(" * 4000),
        ("llama3", "{" * 20000),
        ("gemma", "```tool_code\n" + "(" * 15000 + "\n```"),
        ("gemma", "<start_function_call>call:now{" + "a:" * 9000 + "}<end_function_call>"),
        ("mistral", "[TOOL_CALLS]" * 2000),
    ],
)
def test_long_answers_of_marks_take_no_long_time(kind: str, text: str) -> None:
    """The engine's thread parts answers: a hostile one takes microseconds a character, too."""
    started = time.process_time()
    Answer.of(ChatFormat(kind), [text])
    assert time.process_time() - started < 2.0  # of a processor, a slow one too


FORMATS = {
    "command_r": ChatFormat.COMMAND_R,
    "deepseek": ChatFormat.DEEPSEEK,
    "gemma": ChatFormat.GEMMA,
    "glm": ChatFormat.GLM,
    "granite": ChatFormat.GRANITE,
    "harmony": ChatFormat.HARMONY,
    "hermes": ChatFormat.HERMES,
    "llama3": ChatFormat.LLAMA3,
    "mistral": ChatFormat.MISTRAL,
    "parts_only": ChatFormat.JSON,
    "phi4": ChatFormat.PHI,
    "plain": ChatFormat.JSON,
    "qwen2": ChatFormat.HERMES,
    "qwen3": ChatFormat.HERMES,
    "qwen3_coder": ChatFormat.QWEN_CODER,
    "smollm3": ChatFormat.SMOLLM3,
}


def test_templates_show_their_format() -> None:
    assert {style: format_of(text) for style, text in STYLES.items()} == FORMATS
    assert set(FAMILIES) == set(ChatFormat) - {ChatFormat.AUTO}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_forced_call_is_read_as_one(kind: ChatFormat) -> None:
    """What `forced_call` asks a grammar for is what the format's parser reads."""
    for choice, allowed in (("required", ("weather", "now")), ("now", ("now",))):
        forced = forced_call(Conversation([], tools=TOOLS, tool_choice=choice), kind)
        assert forced is not None
        schema = forced.schema.get("items", forced.schema)
        options = schema.get("anyOf", [schema])
        names = []
        for option in options:
            name_key, arguments_key = option["required"]
            call = {name_key: option["properties"][name_key]["const"], arguments_key: {}}
            names.append(call[name_key])
            written = json.dumps([call] if schema is not forced.schema else call)
            found = Answer.of(forced.format, [forced.prefix + written + forced.suffix])
            assert found.parts() == ("", "", [(call[name_key], {})])
        assert tuple(names) == allowed
    for choice in ("auto", "none"):
        assert forced_call(Conversation([], tools=TOOLS, tool_choice=choice), kind) is None


def test_a_forced_call_as_a_grammar() -> None:
    """Marks that are tokens are these tokens; references of the tools' schemas find what they name."""
    place = {"type": "object", "properties": {"at": {"$ref": "#/$defs/place"}}, "$defs": {"place": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "go", "parameters": place}}]
    forced = forced_call(Conversation([], tools=tools, tool_choice="go"), ChatFormat.HERMES)
    assert forced is not None
    start, call = forced.lark({"<tool_call>": 7, "</tool_call>": 8, "<": 9}).splitlines()
    assert start == 'start: <[7]> "\\n" call "\\n" <[8]>'
    schema = json.loads(call.removeprefix("call: %json "))
    assert schema["$defs"] == {"place": {"type": "string"}}
    assert schema["properties"]["name"] == {"const": "go"}
    assert "$defs" not in schema["properties"]["arguments"]
    other = {"name": "come", "parameters": {"type": "object", "$defs": {"place": {"type": "integer"}}}}
    with pytest.raises(InvalidRequest, match="tools have two different definitions 'place'"):
        forced_call(Conversation([], tools=[*tools, other], tool_choice="required"), ChatFormat.HERMES)


@pytest.mark.parametrize("kind", [ChatFormat.HERMES, ChatFormat.MISTRAL, ChatFormat.LLAMA3, ChatFormat.COMMAND_R])
def test_a_forced_call_is_a_grammar_of_llguidance(kind: ChatFormat, tmp_path: Path) -> None:
    """It takes a call of a tool, and no other text."""
    made = tokenizer()
    made.save_pretrained(tmp_path)
    control = {token.content: index for index, token in made.added_tokens_decoder.items()}
    forced = forced_call(Conversation([], tools=TOOLS, tool_choice="required"), kind)
    assert forced is not None
    grammar = llguidance.LLMatcher.grammar_from_lark(forced.lark(control))
    known = llguidance.LLTokenizer(str(tmp_path / "tokenizer.json"), n_vocab=len(made), eos_token=[0])
    names = forced.schema.get("items", forced.schema)["anyOf"][0]["required"]
    for name, good in (("weather", True), ("rain", False)):
        written = json.dumps(dict(zip(names, (name, {"city": "Bern"}), strict=True)))
        text = forced.prefix + (f"[{written}]" if "items" in forced.schema else written) + forced.suffix
        matcher = llguidance.LLMatcher(known, grammar, log_level=0)
        ids = made(text, add_special_tokens=False).input_ids
        assert (matcher.try_consume_tokens(ids) == len(ids)) is good, matcher.get_error()


@pytest.mark.parametrize("skipped", [True, False])
@pytest.mark.parametrize("streaming", [True, False])
def test_marks_that_are_special_tokens_are_seen(tmp_path: Path, *, streaming: bool, skipped: bool) -> None:
    """No text shows them, but the parser must have them."""
    chat = chat_of(tmp_path, "mistral")
    codec = TextTokenizer.load(tmp_path)
    conversation = Conversation([USER], tools=TOOLS)
    parser = chat.parser(conversation, "", reasoning=False)
    assert parser is not None
    ids = codec.encode(f"Wait 😀. [TOOL_CALLS][{Z}]</s>", add_special_tokens=False)
    request = GenerationRequest(
        "p",
        tuple(codec.encode("p")),
        SamplingParams(max_tokens=99),
        stream=streaming,
        stop_token_ids=chat.end_token_ids,
        skip_special_tokens=skipped,
    )
    channel = Collected()
    parts = AnswerParts(parser, chat.marks if skipped else {}, request.prompt_ids, calls=True, reasoning=False)
    stream = TextStream(request, codec, frozenset(), channel, lambda _: None, parts)
    for token in ids:
        stream.accept(token, None)
        if streaming:
            stream.send_pending()
    stream.finish(FinishReason.STOP)
    stream.send_pending()
    assert "".join(chunk.text for chunk in channel.chunks) == "Wait 😀."
    calls = [call for chunk in channel.chunks for call in json.loads(chunk.tool_calls or "[]")]
    assert calls[0]["function"]["name"] == "weather"
    assert len(calls[0]["id"]) == 9
    assert json.loads("".join(call["function"]["arguments"] for call in calls)) == ZURICH[1]
    assert all(chunk.reasoning is None for chunk in channel.chunks)
    assert {call["index"] for call in calls} == {0}
    assert (len(calls) > 1) is streaming
