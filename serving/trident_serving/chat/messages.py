"""What a request says for the chat template, checked: `messages`, `tools`, `documents`, and the template's options.

Messages are those of chat APIs: a content is a text, a list of parts (texts, and images where the model reads them) or
nothing, and an assistant's message may have calls of tools, whose arguments are an object or its JSON text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from trident_serving.chat.origins import texts
from trident_serving.errors import InvalidRequest

Message = Mapping[str, Any]
Tool = Mapping[str, Any]

MAX_TOOLS = 256
# Names that `apply_chat_template` takes itself, or that the template's own variables have.
_RESERVED = frozenset(("messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize"))
# Under which a message of the assistant may carry its thoughts.
REASONING = ("reasoning_content", "thinking", "reasoning")
# Types of parts, as chat APIs and processors have them.
IMAGES = ("image", "image_url", "input_image")
VIDEOS = ("video", "video_url", "input_video")
NO_IMAGES = (
    "this model reads no images: leave them out, or ask a vision-language model (SmolVLM, Idefics3, Qwen2-VL or "
    "Qwen2.5-VL) whose table sets limits.images"
)
_EXAMPLE = '[{"role": "user", "content": "Hello"}]'
_NAME = re.compile(r"[A-Za-z_]\w*")


class ToolMode:
    """What `tool_choice` may be, besides the name of a tool."""

    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"


@dataclass(frozen=True)
class Conversation:
    """What the chat template gets.

    Attributes:
        messages: at least one, as they were sent.
        tools: that the model may call, as they were sent; None: none were sent, or `tool_choice` is "none".
        tool_choice: "none", "auto", "required", or the name of the tool that must be called.
        documents: texts to answer from.
        options: of the template, such as `enable_thinking`.
    """

    messages: Sequence[Message]
    tools: Sequence[Tool] | None = None
    tool_choice: str = ToolMode.AUTO
    documents: Sequence[Mapping[str, Any]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tool_names(self) -> tuple[str, ...]:
        """Of the tools that may be called."""
        return tuple(function_of(tool)["name"] for tool in self.tools or ())

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """Every text that was sent."""
        return tuple(texts([list(self.messages), list(self.tools or ()), list(self.documents or ()), self.options]))


def function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool's or a call's function: chat APIs wrap it, and it may come bare."""
    wrapped = tool.get("function")
    return wrapped if isinstance(wrapped, Mapping) else tool


def parse_messages(text: str, kinds: Sequence[str] = ("text",)) -> list[dict[str, Any]]:
    """The `messages` field.

    Args:
        kinds: types of parts that the model reads; what is in those of another type than "text" is not checked here.

    Raises:
        InvalidRequest: it is no JSON list of messages; the message says what and where.
    """
    messages = _json(text, "messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest(f"messages must be a JSON list like {_EXAMPLE}, found {text[:80]!r}")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]", kinds)
    return messages


def parse_tools(text: str) -> list[dict[str, Any]] | None:
    """The `tools` field: functions with a name, and a JSON schema of their arguments; an empty list is none.

    Raises:
        InvalidRequest: it is something else.
    """
    tools = _json(text, "tools")
    if not isinstance(tools, list):
        raise InvalidRequest(f"tools must be a JSON list of functions, found {text[:80]!r}")
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"tools holds {len(tools)} functions, the limit is {MAX_TOOLS}")
    names = set()
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if not isinstance(tool, dict):
            raise InvalidRequest(f"{where} must be an object, found {_short(tool)}")
        if tool.get("type", "function") != "function":
            raise InvalidRequest(f"{where}.type must be 'function', found {_short(tool['type'])}")
        if "function" in tool and not isinstance(tool["function"], dict):
            raise InvalidRequest(f"{where}.function must be an object, found {_short(tool['function'])}")
        function = function_of(tool)
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise InvalidRequest(f"{where} needs the text 'name' of a function, found {_short(name)}")
        if name in names:
            raise InvalidRequest(f"{where} has the name {name[:80]!r}, as an earlier tool has")
        names.add(name)
        parameters = function.get("parameters")
        if parameters is not None and not isinstance(parameters, dict):
            raise InvalidRequest(f"{where}.parameters must be a JSON schema, an object, found {_short(parameters)}")
        if not isinstance(function.get("description", ""), str | None):
            raise InvalidRequest(f"{where}.description must be a text, found {_short(function['description'])}")
    return tools or None


def parse_tool_choice(text: str, tools: Sequence[Tool] | None) -> str:
    """The `tool_choice` field: "none", "auto", "required", or a tool by its name or as a chat API names it.

    Raises:
        InvalidRequest: it is something else, or there is no such tool.
    """
    choice: Any = text
    if text.lstrip().startswith(("{", '"')):
        choice = _json(text, "tool_choice")
    if isinstance(choice, dict):
        choice = function_of(choice).get("name")
    if not isinstance(choice, str):
        raise InvalidRequest(
            'tool_choice must be none, auto, required or {"type": "function", "function": {"name": ...}}, '
            f"found {text[:80]!r}"
        )
    if choice == ToolMode.NONE or (choice == ToolMode.AUTO and not tools):
        return choice
    known = [function_of(tool)["name"] for tool in tools or ()]
    if not known:
        raise InvalidRequest(f"tool_choice is {choice[:80]!r}, but the request has no tools")
    if choice not in (ToolMode.AUTO, ToolMode.REQUIRED, *known):
        raise InvalidRequest(
            f"tool_choice must be none, auto, required or the name of a tool ({', '.join(known)[:200]}), "
            f"found {choice[:80]!r}"
        )
    return choice


def parse_documents(text: str) -> list[dict[str, Any]] | None:
    """The `documents` field: objects that the template knows, usually with `title` and `text`.

    Raises:
        InvalidRequest: it is something else.
    """
    documents = _json(text, "documents")
    if not isinstance(documents, list):
        raise InvalidRequest(f"documents must be a JSON list of objects, found {text[:80]!r}")
    for index, document in enumerate(documents):
        if not isinstance(document, dict):
            raise InvalidRequest(f"documents[{index}] must be an object, found {_short(document)}")
    return documents or None


def parse_options(text: str, where: str = "chat_template_kwargs") -> dict[str, Any]:
    """The `chat_template_kwargs` field: a JSON object of the template's options.

    Raises:
        InvalidRequest: it is something else, or sets what a field of the request sets.
    """
    options = _json(text, where)
    if not isinstance(options, dict):
        raise InvalidRequest(f'{where} must be a JSON object like {{"enable_thinking": false}}, found {text[:80]!r}')
    for name in options:
        if name in _RESERVED:
            raise InvalidRequest(f"{where} can't set {name}")
        if not _NAME.fullmatch(name):
            raise InvalidRequest(f"{where} must have names of a template's variables, found {name[:80]!r}")
    return options


def _json(text: str, where: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_no_constant)
        _check_surrogates(value, where)
    except InvalidRequest:
        raise
    except ValueError as error:
        raise InvalidRequest(f"{where} is not JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest(f"{where} is nested too deeply") from None
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _check_surrogates(value: Any, where: str) -> None:
    """Half of a surrogate pair, which JSON's escapes can write, is no character of any text."""
    for place, text in _texts(value, where):
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise InvalidRequest(f"{place} holds half of a surrogate pair")


def _texts(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield f"a name in {where}", key
            yield from _texts(item, f"{where}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, f"{where}[{index}]")


def _check_message(message: Any, where: str, kinds: Sequence[str]) -> None:
    if not isinstance(message, dict):
        raise InvalidRequest(f"{where} must be an object, found {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"{where} needs the text 'role', found {_short(role)}")
    calls = message.get("tool_calls")
    if calls is not None:
        _check_calls(calls, where)
    content = message.get("content")
    if isinstance(content, list):
        for index, part in enumerate(content):
            _check_part(part, f"{where}.content[{index}]", kinds)
    elif not isinstance(content, str):
        says_more = calls or any(isinstance(message.get(name), str) for name in REASONING)
        if content is not None or role != "assistant" or not says_more:
            raise InvalidRequest(f"{where} needs the text 'content', found {_short(content)}")
    for name in REASONING:
        if not isinstance(message.get(name), str | None):
            raise InvalidRequest(f"{where}.{name} must be a text, found {_short(message[name])}")


def _check_part(part: Any, where: str, kinds: Sequence[str]) -> None:
    if not isinstance(part, dict):
        raise InvalidRequest(
            f'{where} must be an object like {{"type": "text", "text": "Hello"}}, found {_short(part)}'
        )
    kind = part.get("type", "text")
    if kind in VIDEOS or "video" in part:
        raise InvalidRequest(f"{where} is a video, and no model here reads videos: send some of its frames as images")
    if kind in IMAGES and not set(IMAGES) & set(kinds):
        raise InvalidRequest(f"{where} is an image, and {NO_IMAGES}")
    if kind not in kinds:
        read = " and ".join(map(repr, kinds))
        raise InvalidRequest(f"{where}.type is {_short(kind)}, but this model reads parts of type {read} only")
    if kind == "text" and not isinstance(part.get("text"), str):
        raise InvalidRequest(f"{where} needs the text 'text', found {_short(part.get('text'))}")


def _check_calls(calls: Any, where: str) -> None:
    if not isinstance(calls, list):
        raise InvalidRequest(f"{where}.tool_calls must be a list, found {_short(calls)}")
    for index, call in enumerate(calls):
        place = f"{where}.tool_calls[{index}]"
        if not isinstance(call, dict):
            raise InvalidRequest(f"{place} must be an object, found {_short(call)}")
        function = function_of(call)
        if not isinstance(function.get("name"), str):
            raise InvalidRequest(f"{place} needs the text 'name' of its function, found {_short(function.get('name'))}")
        if not isinstance(function.get("arguments"), str | dict | None):
            raise InvalidRequest(
                f"{place} needs arguments that are an object or its JSON text, found {_short(function['arguments'])}"
            )


def _short(value: Any) -> str:
    return repr(value)[:80]
