"""Whatever a request holds, it is read or refused with a sentence; nothing else is raised, and soon."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.values import JSON, LEAVES, SURROGATES, near
from tests.unit.test_chat_templates import STYLES, USER, chat_of, tokenizer
from trident_export import models_file
from trident_export.errors import ModelsFileError
from trident_serving.errors import InvalidRequest
from trident_serving.generation.request import GenerationRequest, RequestParser
from trident_serving.runtime.sampling.grammars import Grammar, GrammarKind, Grammars
from trident_serving.runtime.tokenizer import TextTokenizer
from trident_serving.schema.fields import GENERATION, Field
from trident_serving.schema.limits import GenerationLimits

DTYPES: dict[str, Any] = {
    "INT32": np.int32,
    "UINT64": np.uint64,
    "INT64": np.int64,
    "FP32": np.float32,
    "BOOL": np.bool_,
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"x": {}}}}}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "a", "function": {"name": "look", "arguments": "{}"}}],
    },
    {"role": "tool", "content": "1", "tool_call_id": "a"},
]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 1}, "b": {"enum": ["x", 1]}, "c": {"$ref": "#/$defs/d"}},
    "required": ["a"],
    "$defs": {"d": {"type": "array", "items": {"anyOf": [{"type": "string", "pattern": "^a+$"}, {"const": 2}]}}},
}


@pytest.fixture(scope="module")
def parsers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RequestParser]:
    made = {}
    for style in STYLES:
        folder = tmp_path_factory.mktemp(style)
        chat = chat_of(folder, style)
        made[style] = RequestParser(TextTokenizer.load(folder), chat, GenerationLimits(context=4096))
    return made


def texts(*values: str) -> Any:
    """A tensor of texts, as a request carries them: bytes that need not be UTF-8."""
    return np.array([[value.encode("utf-8", "surrogatepass") for value in values]], np.object_)


def fields(known: Sequence[Field]) -> st.SearchStrategy[dict[str, Any]]:
    """Values for fields of a request, of the fields' types and mostly of their shape."""

    def of(field: Field) -> st.SearchStrategy[Any]:
        most = 1 if field.shape == (1,) else 3
        if field.dtype == "STRING":
            value: st.SearchStrategy[Any] = SURROGATES | JSON.map(json.dumps)
            return st.lists(value, min_size=1, max_size=most).map(lambda all_: texts(*all_))
        dtype = DTYPES[field.dtype]
        if dtype is np.bool_:
            value = st.booleans()
        elif dtype is np.float32:
            value = st.floats(width=32)
        else:
            value = st.integers(int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)) | st.integers(0, 9)
        return st.lists(value, min_size=1, max_size=most).map(lambda all_: np.array([all_], dtype))

    return st.fixed_dictionaries({}, optional={field.name: of(field) for field in known})


def read(parser: RequestParser, inputs: dict[str, Any]) -> None:
    started = time.process_time()
    try:
        found = parser.parse(inputs)
        assert isinstance(found, GenerationRequest)
        assert 0 < len(found.prompt_ids) <= 4096
    except InvalidRequest as error:
        assert str(error)
        assert "Traceback" not in str(error)
    assert time.process_time() - started < 5


@given(fields=fields(GENERATION), prompt=SURROGATES)
def test_fields(parsers: dict[str, RequestParser], fields: dict[str, Any], prompt: str) -> None:
    read(parsers["plain"], fields | {"text_input": texts(prompt)})


@given(
    style=st.sampled_from(sorted(STYLES)),
    talk=near(TALK),
    more=st.fixed_dictionaries(
        {},
        optional={
            "tools": near([TOOL]),
            "tool_choice": near({"type": "function", "function": {"name": "look"}}),
            "documents": JSON,
            "chat_template_kwargs": near({"enable_thinking": False}),
        },
    ),
)
def test_conversations(parsers: dict[str, RequestParser], style: str, talk: Any, more: dict[str, Any]) -> None:
    sent = {name: texts(json.dumps(value)) for name, value in {"messages": talk, **more}.items()}
    read(parsers[style], sent)


@given(text=SURROGATES | JSON.map(json.dumps) | st.text('[]{}":,0.e-u\\', max_size=80))
def test_messages_that_are_no_json(parsers: dict[str, RequestParser], text: str) -> None:
    read(parsers["qwen2"], {"messages": texts(text)})


@given(ids=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=8))
def test_token_ids(parsers: dict[str, RequestParser], ids: list[int]) -> None:
    read(parsers["plain"], {"input_ids": np.array([ids], np.int32)})


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("grammars")
    words = tokenizer()
    words.save_pretrained(folder)
    made = Grammars(folder / "tokenizer.json", len(words), frozenset({0}))
    yield made
    made.stop()


REGEX = st.text("ab01.*+?()[]{}|^$\\dws,-", max_size=30)


@given(kind=st.sampled_from(list(GrammarKind)), text=near(SCHEMA).map(json.dumps) | REGEX | SURROGATES)
def test_grammars(grammars: Any, kind: GrammarKind, text: str) -> None:
    try:
        guide = grammars.guide(Grammar(kind, text)).result(timeout=60)
        assert guide.masks([]).shape[0] == 1
    except InvalidRequest as error:
        assert str(error)


TABLE = {
    "task": "text-generation",
    "source": {"hub": "a/b", "revision": "c"},
    "variants": ["int8", "fp32"],
    "default_variant": "int8",
    "limits": {"context": 512, "slots": 4},
}


@given(name=SURROGATES | st.just("m"), table=near(TABLE))
def test_tables_of_models(name: str, table: Any) -> None:
    try:
        models_file.parse(name, table)
    except ModelsFileError as error:
        assert str(error)


@given(value=LEAVES)
def test_a_message_of_one_part(parsers: dict[str, RequestParser], value: Any) -> None:
    for message in (USER | {"content": value}, USER | {"role": value}, {"role": "assistant", "tool_calls": value}):
        read(parsers["qwen3"], {"messages": texts(json.dumps([message]))})
