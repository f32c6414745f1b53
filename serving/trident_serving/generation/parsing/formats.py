"""The format of a model's answers, by its chat template; and how a forced call is written in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trident_serving.chat.messages import Conversation, ToolMode, function_of
from trident_serving.errors import InvalidRequest
from trident_serving.generation.parsing import families
from trident_serving.generation.parsing.parser import AnswerParser
from trident_serving.schema.fields import ChatFormat

FAMILIES: dict[ChatFormat, type[AnswerParser]] = {
    ChatFormat.HERMES: families.Hermes,
    ChatFormat.QWEN_CODER: families.QwenCoder,
    ChatFormat.GLM: families.Glm,
    ChatFormat.LLAMA3: families.Llama3,
    ChatFormat.MISTRAL: families.Mistral,
    ChatFormat.PHI: families.Phi,
    ChatFormat.GRANITE: families.Granite,
    ChatFormat.GEMMA: families.Gemma,
    ChatFormat.DEEPSEEK: families.DeepSeek,
    ChatFormat.KIMI: families.Kimi,
    ChatFormat.COMMAND_R: families.CommandR,
    ChatFormat.HARMONY: families.Harmony,
    ChatFormat.SMOLLM3: families.SmolLM3,
    ChatFormat.LFM2: families.Lfm2,
    ChatFormat.JSON: families.Json,
}

# A template is of the first format whose texts are all in it.
_SIGNS: tuple[tuple[ChatFormat, tuple[str, ...]], ...] = (
    (ChatFormat.DEEPSEEK, ("<｜tool▁call▁begin｜>",)),
    (ChatFormat.KIMI, ("<|tool_call_begin|>",)),
    (ChatFormat.LFM2, ("<|tool_call_start|>",)),
    (ChatFormat.HARMONY, ("<|channel|>", "<|message|>")),
    (ChatFormat.COMMAND_R, ("<|START_ACTION|>",)),
    (ChatFormat.COMMAND_R, ("Action:", "tool_name")),
    (ChatFormat.MISTRAL, ("[TOOL_CALLS]",)),
    (ChatFormat.SMOLLM3, ("xml_tools", "python_tools")),
    (ChatFormat.GLM, ("<tool_call>", "<arg_key>")),
    (ChatFormat.QWEN_CODER, ("<tool_call>", "<function=")),
    (ChatFormat.GRANITE, ("<|start_of_role|>",)),
    (ChatFormat.PHI, ("<|tool_call|>",)),
    (ChatFormat.PHI, ("<|tool|>",)),
    (ChatFormat.PHI, ("functools[",)),
    (ChatFormat.HERMES, ("<tool_call>",)),
    (ChatFormat.LLAMA3, ("<|python_tag|>",)),
    (ChatFormat.LLAMA3, ("<|start_header_id|>",)),
    (ChatFormat.GEMMA, ("<start_function_call>",)),
    (ChatFormat.GEMMA, ("<start_of_turn>",)),
)


def format_of(template: str) -> ChatFormat:
    """The format that a chat template's text shows."""
    return next((known for known, signs in _SIGNS if all(sign in template for sign in signs)), ChatFormat.JSON)


@dataclass(frozen=True)
class ForcedCall:
    """An answer that must be a call.

    Attributes:
        prefix: what it begins with, as the format writes it.
        schema: the JSON schema of what follows.
        suffix: what is behind that.
        format: whose parser reads it.
    """

    prefix: str
    schema: dict[str, Any]
    suffix: str
    format: ChatFormat

    def lark(self, tokens: Mapping[str, int]) -> str:
        """The answer as a grammar for llguidance.

        Args:
            tokens: the tokenizer's added tokens, by their texts: marks among them are these tokens, not their letters.
        """
        schema = json.dumps(self.schema | {"x-guidance": _SPACES}, ensure_ascii=False)
        rule = " ".join([*_terms(self.prefix, tokens), "call", *_terms(self.suffix, tokens)])
        return f"start: {rule}\ncall: %json {schema}\n"


# How one call is written in the formats that write it in JSON: what is before, the keys of name and arguments, what is
# behind, and whether it is a list.
_WRITTEN: dict[ChatFormat, tuple[str, str, str, str, bool]] = {
    ChatFormat.HERMES: ("<tool_call>\n", "name", "arguments", "\n</tool_call>", False),
    ChatFormat.QWEN_CODER: ("<tool_call>\n", "name", "arguments", "\n</tool_call>", False),
    ChatFormat.GLM: ("<tool_call>\n", "name", "arguments", "\n</tool_call>", False),
    ChatFormat.SMOLLM3: ("<tool_call>\n", "name", "arguments", "\n</tool_call>", False),
    ChatFormat.LLAMA3: ("", "name", "parameters", "", False),
    ChatFormat.MISTRAL: ("[TOOL_CALLS]", "name", "arguments", "", True),
    ChatFormat.PHI: ("<|tool_call|>", "name", "arguments", "<|/tool_call|>", True),
    ChatFormat.GRANITE: ("<|tool_call|>", "name", "arguments", "", True),
    ChatFormat.COMMAND_R: ("<|START_ACTION|>", "tool_name", "parameters", "<|END_ACTION|>", True),
    ChatFormat.GEMMA: ("", "name", "arguments", "", False),
    ChatFormat.JSON: ("", "name", "arguments", "", False),
}


# Spaces as Python's json and most models write them.
_SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_SHARED = ("$defs", "definitions")


def forced_call(conversation: Conversation, chat_format: ChatFormat) -> ForcedCall | None:
    """What an answer must be where `tool_choice` forces a call; None where it does not.

    `tool_choice` "required" is one call of any tool, a name is one call of that tool. Where a format has the name
    outside of JSON, or writes no JSON, the call is a JSON object.
    """
    if not conversation.tools or conversation.tool_choice in (ToolMode.AUTO, ToolMode.NONE):
        return None
    functions = [function_of(tool) for tool in conversation.tools]
    if conversation.tool_choice != ToolMode.REQUIRED:
        functions = [function for function in functions if function["name"] == conversation.tool_choice]
    if chat_format not in _WRITTEN:
        chat_format = ChatFormat.JSON
    prefix, name, arguments, suffix, is_list = _WRITTEN[chat_format]
    calls: list[dict[str, Any]] = []
    shared: dict[str, dict[str, Any]] = {}
    for function in functions:
        parameters = dict(function.get("parameters") or {"type": "object", "properties": {}})
        for key in _SHARED:  # references name them from the root
            for each, definition in (parameters.pop(key, None) or {}).items():
                if shared.setdefault(key, {}).setdefault(each, definition) != definition:
                    raise InvalidRequest(f"tools have two different definitions {each!r}: give them other names")
        properties = {name: {"const": function["name"]}, arguments: parameters}
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": [name, arguments],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if is_list:
        schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
    schema |= shared
    return ForcedCall(prefix, schema, suffix, chat_format)


def _terms(text: str, tokens: Mapping[str, int]) -> Iterator[str]:
    """A text as terms of a grammar: tokens by their ids, and strings."""
    longest_first = sorted((token for token in tokens if token), key=len, reverse=True)
    for piece in re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if longest_first else [text]:
        if piece:
            yield f"<[{tokens[piece]}]>" if piece in tokens else json.dumps(piece, ensure_ascii=False)


def schemas_of(tools: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """The JSON schemas of the tools' arguments by the tools' names."""
    return {function["name"]: dict(function.get("parameters") or {}) for function in map(function_of, tools)}
