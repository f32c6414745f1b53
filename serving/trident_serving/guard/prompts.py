"""The texts of a request: filtered where they stand, in the tensors that a generator takes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trident_serving.chat.messages import function_of
from trident_serving.chat.template import Joint
from trident_serving.errors import InvalidRequest
from trident_serving.guard.filtering import Passed
from trident_serving.guard.structured import Names, changed_number, number_texts
from trident_serving.runtime.tokenizer import TextTokenizer
from trident_serving.schema.fields import Inputs, single_text
from trident_serving.text import encode_texts

# Fields that reach the prompt, as JSON.
_JSON = ("messages", "documents", "tools", "chat_template_kwargs")
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_TYPES = frozenset(
    {"text", "image", "image_url", "function", "object", "array", "string", "number", "integer", "boolean", "null"}
)
# Keys of these fields that are no content; every other one may stand in the prompt, as a property's name does.
_KEYS = frozenset(
    {
        "role",
        "content",
        "name",
        "type",
        "text",
        "image",
        "image_url",
        "url",
        "tool_calls",
        "tool_call_id",
        "id",
        "function",
        "arguments",
        "description",
        "parameters",
        "properties",
        "required",
        "items",
        "enum",
        "default",
        "title",
        "additionalProperties",
        "anyOf",
        "oneOf",
        "allOf",
        "strict",
    }
)
Filter = Callable[[Sequence[str]], Awaitable[Sequence[Passed]]]
# Gives what texts that stand together in a prompt become.
_Take = Callable[[Sequence[str]], Sequence[str]]


class Blocked(Exception):
    """A rule blocks the request."""


@dataclass(frozen=True)
class Run:
    """Tokens of a prompt that stand together.

    Attributes:
        text: theirs.
        special: whether they are special tokens, which no text of a prompt shows.
    """

    ids: tuple[int, ...]
    text: str
    special: bool


def runs(ids: Sequence[int], tokenizer: TextTokenizer) -> list[Run]:
    """The tokens of a prompt, those between special ones together."""
    special = frozenset(tokenizer.special_tokens.values())
    found = []
    for apart, group in itertools.groupby(ids, special.__contains__):
        its = tuple(group)
        found.append(Run(its, "" if apart else tokenizer.decode(its), apart))
    return found


async def filtered(
    inputs: Inputs, tokens: Sequence[Run], tokenizer: TextTokenizer, every: Filter, joint: Joint | None = None
) -> Inputs | None:
    """The tensors of a request, their texts filtered. Of `input_ids`, tokens that no rule changes stay what they are.

    The parts of a message are one text, as the model sees it; what is left of it goes back into the parts.

    Args:
        inputs: of the request.
        tokens: of a prompt of `input_ids`; [] of another one.
        every: filters whole texts; of those behind one that is blocked it need not say anything.
        joint: how the model's chat template puts parts together; None: each is a text of its own.

    Returns:
        None where nothing changes.

    Raises:
        Blocked: a rule blocks a text.
        InvalidRequest: a field is nested too deeply.
    """
    given = {name: json.loads(single_text(inputs, name)) for name in _JSON if name in inputs}
    prompt = single_text(inputs, "text_input") if "text_input" in inputs else None

    def texts_through(take: _Take) -> Inputs:
        """What changes where each text becomes what `take` gives for it, which is called in the same order always."""
        changed: dict[str, Any] = {}
        if prompt is not None and (after := _one(prompt, take)) != prompt:
            changed["text_input"] = encode_texts([after])[None]
        ids = [token for run in tokens for token in _tokens(run, tokenizer, take)]
        if ids != [token for run in tokens for token in run.ids]:
            changed["input_ids"] = np.array([ids], inputs["input_ids"].dtype)
        for name, value in given.items():
            try:
                made = _value(value, take, apart=joint is None)
            except RecursionError:
                raise InvalidRequest(f"{name} is nested too deeply") from None
            if made != value:
                changed[name] = encode_texts([json.dumps(made)])[None]
        return changed

    texts: list[str] = []
    gaps: list[list[tuple[int, int]]] = []

    def noted(parts: Sequence[str]) -> Sequence[str]:
        text, its = _together(parts, joint or Joint())
        texts.append(text)
        gaps.append(its)
        return parts

    texts_through(noted)
    passed = await every(texts)
    if any(each.blocked for each in passed):
        raise Blocked
    left = iter(zip(texts, gaps, passed, strict=True))

    def taken(parts: Sequence[str]) -> Sequence[str]:
        text, its, after = next(left)
        return parts if after.text == text else after.cut(its)

    changed = texts_through(taken)
    return {**inputs, **changed} if changed else None


def _tokens(run: Run, tokenizer: TextTokenizer, take: _Take) -> Sequence[int]:
    """The tokens of a run whose text is filtered."""
    if run.special or (after := _one(run.text, take)) == run.text:
        return run.ids
    return tokenizer.encode(after, add_special_tokens=False)


def _one(text: str, take: _Take) -> str:
    """What a text becomes that stands by itself."""
    (after,) = take([text])
    return after


def _together(parts: Sequence[str], joint: Joint) -> tuple[str, list[tuple[int, int]]]:
    """Parts of a message as one text, and the gaps between them; see `Passed.cut`."""
    shown = [part.strip() for part in parts] if joint.trims and len(parts) > 1 else parts
    ends = list(itertools.accumulate(len(part) + len(joint.between) for part in shown[:-1]))
    return joint.between.join(shown), [(end - len(joint.between), end) for end in ends]


def _value(given: Any, take: _Take, key: str = "", *, apart: bool = False) -> Any:
    """A value of JSON whose texts are filtered: keys, numbers, strings, and JSON in a string of arguments.

    Args:
        key: under which it stands.
        apart: whether each part of a message is filtered by itself.
    """
    if isinstance(given, str):
        held, hidden = _arguments(given) if key == "arguments" else (None, False)
        if held is None:
            return _one(given, take)
        after = _value(held, take, apart=apart)  # as templates write them, without JSON's escapes
        return given if after == held and not hidden else json.dumps(after, ensure_ascii=False)
    if isinstance(given, list):
        texts = _texts(given) if key == "content" and not apart else []
        if len(texts) < 2:
            return [_value(item, take, apart=apart) for item in given]
        left = iter(take(texts))
        return [_member(item, take, {"text": next(left)} if _is_text(item) else {}) for item in given]
    if isinstance(given, dict):
        return _member(given, take, {}, apart=apart)
    if isinstance(given, int | float) and not isinstance(given, bool):
        texts = number_texts(json.dumps(given))
        changed = changed_number(texts, [Passed(_one(text, take)) for text in texts])
        return given if changed is None else changed
    return given


def _member(given: Any, take: _Take, known: Mapping[str, str], *, apart: bool = False) -> Any:
    """An object whose texts are filtered, but for members that have been already."""
    if not isinstance(given, dict):
        return _value(given, take)
    made: dict[str, Any] = {}
    names = Names(given)
    for name, item in given.items():
        shown = name if name in _KEYS else _one(name, take)
        shown = shown if shown == name else names.another(shown)
        if name in known:
            made[shown] = known[name]
        else:
            made[shown] = item if _is_structure(name, item) else _value(item, take, name, apart=apart)
    return made


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str)


def _texts(parts: Sequence[Any]) -> list[str]:
    """Those of the parts of a message."""
    return [part["text"] for part in parts if _is_text(part)]


def in_parts(inputs: Inputs) -> bool:
    """Whether a message has several texts."""
    messages = json.loads(single_text(inputs, "messages")) if "messages" in inputs else ()
    contents = [message.get("content") for message in messages]
    return any(isinstance(content, list) and len(_texts(content)) > 1 for content in contents)


def _is_structure(key: str, item: Any) -> bool:
    """Whether what stands under a key is a word of the format, and no content."""
    return isinstance(item, str) and ((key == "role" and item in _ROLES) or (key == "type" and item in _TYPES))


def _arguments(text: str) -> tuple[Any, bool]:
    """What the arguments of a call are, None where they are no JSON, and whether their text says more.

    Of two members of one name only the last is in what they are.
    """
    twice = False

    def member(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal twice
        made = dict(pairs)
        twice = twice or len(made) < len(pairs)
        return made

    try:
        found = json.loads(text, object_pairs_hook=member)
    except (ValueError, RecursionError):
        return None, False
    return (found, twice) if isinstance(found, dict | list | str) else (None, False)


def joined(inputs: Inputs) -> list[str]:
    """What stands together in a prompt, as templates join it: what a rule blocks could be spread.

    The texts of each message that comes in parts, each by itself too, and JSON in which keys stand beside their values.
    """
    given = {name: json.loads(single_text(inputs, name)) for name in _JSON if name in inputs}
    found = [json.dumps(value, ensure_ascii=False) for name, value in given.items() if name != "messages"]
    for message in given.get("messages", ()):
        content = message.get("content")
        texts = _texts(content) if isinstance(content, list) else []
        if len(texts) > 1:
            found += [*texts, "".join(texts), "\n".join(texts)]
        for call in message.get("tool_calls") or ():
            arguments = function_of(call).get("arguments")
            held = _arguments(arguments)[0] if isinstance(arguments, str) else arguments
            found.append(str(arguments) if held is None else json.dumps(held, ensure_ascii=False))
    return found


def said(inputs: Inputs, prompt: str) -> str:
    """What a request says, for a judge: the texts of its messages, or its prompt."""
    if "messages" not in inputs:
        return prompt
    found: list[str] = []

    def collect(given: Any) -> None:
        if isinstance(given, str):
            found.append(given)
        elif isinstance(given, list):
            for item in given:
                collect(item)
        elif isinstance(given, dict):
            for key, item in given.items():
                if not _is_structure(key, item):
                    collect(item)

    collect(json.loads(single_text(inputs, "messages")))
    return "\n".join(found)
