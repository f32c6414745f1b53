"""A model's chat template: a conversation in, the text of a prompt out, as transformers' `apply_chat_template` has it.

Templates differ in what they can take. What one takes is tried when it is loaded, and a conversation is brought into
that form: contents as text or as parts, and the arguments of calls as objects or as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, meta, nodes

from trident_serving.chat.environment import TemplateEnvironment
from trident_serving.chat.messages import REASONING, Conversation, Message, function_of
from trident_serving.chat.origins import Traced, data, origins_of, plain
from trident_serving.errors import InvalidRequest

FILE, TOOLS_FILE, CONFIG = "chat_template.jinja", "chat_template_tool_use.jinja", "tokenizer_config.json"
# Special tokens by the names that templates know them by.
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# A role is written by the template between its control tokens. One that could be markup is data like any other text.
_ROLE = re.compile(r"[\w-]+", re.ASCII)
_PROBE, _ANSWER = "hello probe", "answer probe"
_BETWEEN = "\n"  # stands between parts for a template that takes none


@dataclass(frozen=True)
class _Form:
    """What a template takes.

    Attributes:
        texts: whether it shows a content that is a text.
        parts: whether it shows a content that is a list of parts.
        arguments_as_text: whether it wants a call's arguments as JSON.
    """

    texts: bool = True
    parts: bool = True
    arguments_as_text: bool = False


@dataclass(frozen=True)
class Joint:
    """How a template puts the parts of a content together.

    Attributes:
        between: what stands between two of them.
        trims: whether white space around each is left out.
    """

    between: str = ""
    trims: bool = False


class ChatTemplate:
    """A model's chat template.

    Args:
        template: its text, in Jinja.
        special_tokens: that it may name, by their roles.
        options: of the template, where a request does not say otherwise.
        with_tools: the template of conversations with tools, where the model has one of its own.
    """

    def __init__(
        self,
        template: str,
        special_tokens: Mapping[str, str],
        options: Mapping[str, Any] | None = None,
        with_tools: ChatTemplate | None = None,
    ) -> None:
        environment = TemplateEnvironment()
        parsed = environment.parse(template)
        self.text = template
        self.literals = "\0".join(_literals(parsed))
        self.variables = frozenset(meta.find_undeclared_variables(parsed))
        self._with_tools = with_tools
        if with_tools is not None:
            self.text = f"{template}\n{with_tools.text}"
            self.literals = f"{self.literals}\0{with_tools.literals}"
            self.variables |= {"tools"}
        self._template = environment.from_string(template)
        self._special_tokens = dict(special_tokens)
        self._options = dict(options or {})

    @classmethod
    def load(cls, folder: Path, options: Mapping[str, Any] | None = None) -> ChatTemplate | None:
        """Read `folder/chat_template.jinja`; None where the model has no chat template."""
        path, other = folder / FILE, folder / TOOLS_FILE
        if not path.exists():
            return None
        tokens = special_tokens(folder)
        with_tools = cls(other.read_text(encoding="utf-8"), tokens, options) if other.exists() else None
        return cls(path.read_text(encoding="utf-8"), tokens, options, with_tools)

    def render(self, messages: Sequence[Message] | Conversation, *, add_generation_prompt: bool = True) -> Traced:
        """The prompt that asks for the assistant's next turn, with the origin of each of its characters.

        Raises:
            InvalidRequest: the template refuses these messages, or has no place for tools or documents.
        """
        conversation = messages if isinstance(messages, Conversation) else Conversation(messages)
        for name, given in (("tools", conversation.tools), ("documents", conversation.documents)):
            if given and name not in self.variables:
                raise InvalidRequest(f"{name}: the model's chat template has no place for {name}")
        try:
            return self.run(conversation, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template's expressions raise whatever Python's operators raise
            raise InvalidRequest(f"messages: the model's chat template refuses them: {_reason(error)}") from None

    def run(self, conversation: Conversation, *, add_generation_prompt: bool = True) -> Traced:
        """The same; raises whatever the template's expressions raise."""
        if conversation.tools and self._with_tools is not None:
            return self._with_tools.run(conversation, add_generation_prompt=add_generation_prompt)
        form = self._form
        try:
            return self._render(_shaped(conversation, form), add_generation_prompt)
        except Exception:
            if form.arguments_as_text or not any(message.get("tool_calls") for message in conversation.messages):
                raise
            with suppress(Exception):  # the first error says more
                return self._render(_shaped(conversation, replace(form, arguments_as_text=True)), add_generation_prompt)
            raise

    def shaped(self, conversation: Conversation) -> Conversation:
        """A conversation as this template takes it: as transformers' template would have to be given it."""
        form = self._with_tools._form if conversation.tools and self._with_tools is not None else self._form
        return _shaped(conversation, form)

    @cached_property
    def end_of_turn(self) -> Traced:
        """What the template writes behind the words of the assistant's last message; empty where it tells none."""
        messages = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _ANSWER}]
        try:
            shown = self.run(Conversation(messages), add_generation_prompt=False)
        except Exception:  # it takes no answers
            return Traced()
        _, found, rest = shown.rpartition(_ANSWER)
        return rest if found else Traced()

    @cached_property
    def joint(self) -> Joint:
        """How parts of a content stand together in a prompt, by what the template makes of the user's."""
        if not self._form.parts:
            return Joint(_BETWEEN)
        parts = [{"type": "text", "text": f"{_PROBE}\t"}, {"type": "text", "text": f"\t{_ANSWER}"}]
        shown = plain(self._tried([{"role": "user", "content": parts}]) or "")
        between, found, _ = shown.partition(_PROBE)[2].partition(_ANSWER)
        if not found:
            return Joint()
        trims = not (between.startswith("\t") and between.endswith("\t") and len(between) > 1)
        return Joint(between.strip("\t"), trims)

    def _render(self, conversation: Conversation, add_generation_prompt: bool) -> Traced:
        options = {**self._options, **conversation.options}
        values = self._special_tokens | {name: data(value) for name, value in options.items()}
        text = self._template.render(
            **values
            | {
                "messages": [_message(message) for message in conversation.messages],
                "tools": data(list(conversation.tools)) if conversation.tools is not None else None,
                "documents": data(list(conversation.documents)) if conversation.documents is not None else None,
                "add_generation_prompt": add_generation_prompt,
            }
        )
        return text if isinstance(text, Traced) else Traced(text, origins_of(text))

    @cached_property
    def _form(self) -> _Form:
        texts = _PROBE in (self._tried([{"role": "user", "content": _PROBE}]) or "")
        parts = self._tried([{"role": "user", "content": [{"type": "text", "text": _PROBE}]}]) or ""
        # A template for texts writes a list as Python does, with its keys.
        takes_parts = _PROBE in parts and "'text'" not in parts
        return _Form(texts or not takes_parts, takes_parts, self._wants_json)

    @property
    def _wants_json(self) -> bool:
        """Whether arguments must be JSON: an object's are written as Python writes it, or not at all."""
        for content in ({}, {"content": ""}):
            as_object = self._called(content, {"probe_key": "probe_value"})
            if as_object is not None and "probe_value" in as_object:
                return "'probe_key'" in as_object
            as_json = self._called(content, '{"probe_key": "probe_value"}')
            if as_json is not None and "probe_value" in as_json:
                return True
        return False

    def _called(self, content: Mapping[str, str], arguments: object) -> Traced | None:
        """What the template makes of a call with these arguments."""
        function = {"name": "probe", "arguments": arguments}
        calls = [{"id": "probe0000", "type": "function", "function": function}]
        return self._tried([{"role": "user", "content": _PROBE}, {"role": "assistant", **content, "tool_calls": calls}])

    def _tried(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> Traced | None:
        """What the template makes of messages; None where it refuses them."""
        try:
            return self._render(Conversation(messages), add_generation_prompt)
        except Exception:
            return None


def special_tokens(folder: Path) -> dict[str, str]:
    """Special tokens by their roles as text, from `folder/tokenizer_config.json`: `bos_token` and others."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    named = {name: config[name] for name in config if name in _ROLES or name.endswith("_token")}
    for more in (config.get("model_specific_special_tokens"), config.get("extra_special_tokens")):
        named |= more if isinstance(more, dict) else {}
    tokens = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: value for name, value in tokens.items() if isinstance(value, str)}


def _literals(template: nodes.Template) -> Iterator[str]:
    """Every text that a template writes itself."""
    for written in template.find_all(nodes.TemplateData):
        yield written.data
    for constant in template.find_all(nodes.Const):
        if isinstance(constant.value, str):
            yield constant.value


def _shaped(conversation: Conversation, form: _Form) -> Conversation:
    """A conversation as a template takes it."""
    return replace(conversation, messages=[_shaped_message(message, form) for message in conversation.messages])


def _shaped_message(message: Message, form: _Form) -> Message:
    # As transformers does: no keys without a value, and thoughts under the names that templates know.
    shaped = {key: value for key, value in message.items() if value is not None}
    reasoning = next((shaped[name] for name in REASONING if name in shaped), None)
    if reasoning is not None:
        shaped = {"thinking": reasoning, **shaped, "reasoning_content": reasoning}
    content = shaped.get("content")
    if isinstance(content, list) and not form.parts:
        shaped["content"] = _BETWEEN.join(part["text"] for part in content)
    elif isinstance(content, str) and not form.texts:
        shaped["content"] = [{"type": "text", "text": content}]
    if shaped.get("tool_calls"):
        shaped["tool_calls"] = [_shaped_call(call, form) for call in shaped["tool_calls"]]
    return shaped


def _shaped_call(call: Mapping[str, Any], form: _Form) -> Mapping[str, Any]:
    function = dict(function_of(call))
    arguments = function.get("arguments")
    if form.arguments_as_text and isinstance(arguments, dict):
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)
    elif not form.arguments_as_text and isinstance(arguments, str):
        function["arguments"] = _object(arguments)
    return {**call, "function": function} if "function" in call else function


def _object(arguments: str) -> Any:
    """The object that a call's arguments are the JSON of; they themselves where they are something else."""
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def _message(message: Message) -> dict[Any, Any]:
    """A message whose texts come from a request, but for the name of its role."""
    made: dict[Any, Any] = data(message)
    return made | {"role": message["role"]} if _ROLE.fullmatch(message["role"]) else made


def _reason(error: Exception) -> str:
    text = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300] or type(error).__name__
