"""The texts of a request: filtered where they stand, in the tensors that a generator takes."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from trident_serving.errors import InvalidRequest
from trident_serving.guard.filtering import Passed
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
Filter = Callable[[str], Awaitable[Passed]]


class Blocked(Exception):
    """A rule blocks the request."""


async def filtered(inputs: Inputs, prompt: str, each: Filter) -> Inputs | None:
    """The tensors of a request, their texts filtered.

    Args:
        inputs: of the request.
        prompt: the text of its tokens; of `input_ids` the only one that there is.
        each: filters one whole text.

    Returns:
        None where nothing changes. A prompt of `input_ids` that changes becomes one of `text_input`.

    Raises:
        Blocked: a rule blocks a text.
        InvalidRequest: a field is nested too deeply.
    """

    async def text(given: str) -> str:
        passed = await each(given)
        if passed.blocked:
            raise Blocked
        return passed.text

    async def value(given: Any, key: str = "") -> Any:
        if isinstance(given, str):
            held = _arguments(given) if key == "arguments" else None
            if held is None:
                return await text(given)
            after = await value(held)  # as templates write them, without JSON's escapes
            return given if after == held else json.dumps(after, ensure_ascii=False)
        if isinstance(given, list):
            return [await value(item) for item in given]
        if isinstance(given, dict):
            made = {}
            for name, item in given.items():
                shown = name if name in _KEYS else await text(name)
                made[shown] = item if _is_structure(name, item) else await value(item, name)
            return made
        if isinstance(given, int | float) and not isinstance(given, bool):
            written = json.dumps(given)
            after = await text(written)
            return given if after == written else after
        return given

    changed: dict[str, Any] = {}
    for name in ("text_input", "input_ids"):
        if name in inputs:
            before = single_text(inputs, name) if name == "text_input" else prompt
            after = await text(before)
            if after != before:
                changed["text_input"] = encode_texts([after])[None]
    for name in _JSON:
        if name not in inputs:
            continue
        before = json.loads(single_text(inputs, name))
        try:
            after = await value(before)
        except RecursionError:
            raise InvalidRequest(f"{name} is nested too deeply") from None
        if after != before:
            changed[name] = encode_texts([json.dumps(after)])[None]
    if not changed:
        return None
    return {
        name: tensor for name, tensor in inputs.items() if name != "input_ids" or "text_input" not in changed
    } | changed


def _is_structure(key: str, item: Any) -> bool:
    """Whether what stands under a key is a word of the format, and no content."""
    return isinstance(item, str) and ((key == "role" and item in _ROLES) or (key == "type" and item in _TYPES))


def _arguments(text: str) -> Any:
    """The object that the arguments of a call are; None where they are something else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def joined(inputs: Inputs) -> list[str]:
    """The texts of each message that comes in parts, as templates join them: what a rule blocks could be spread."""
    if "messages" not in inputs:
        return []
    found = []
    for message in json.loads(single_text(inputs, "messages")):
        content = message.get("content")
        texts = [part["text"] for part in content] if isinstance(content, list) else []
        if len(texts) > 1:
            found += ["".join(texts), "\n".join(texts)]
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
