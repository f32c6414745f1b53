"""The model's own tokenizer and chat template, read from its Hugging Face files.

tokenizer.json            the tokenizer, as the `tokenizers` library writes it
tokenizer_config.json     special tokens by role (`bos_token`, `eos_token`)
chat_template.jinja       the chat template, where the model has one
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from trident_serving.errors import InvalidRequest


class Codec(Protocol):
    """What the engine's text side needs of a tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Text to token ids."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Token ids to text."""
        ...


class TextTokenizer:
    """A `tokenizers.Tokenizer` with what generation needs around it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    @classmethod
    def load(cls, folder: Path) -> TextTokenizer:
        """Read `folder/tokenizer.json`."""
        return cls(Tokenizer.from_file(str(folder / "tokenizer.json")))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Text to token ids."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Token ids to text."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Tokens that no text of an answer shows, by their own texts."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    @cached_property
    def longest_token_bytes(self) -> int | None:
        """No token stands for more bytes of text than this; None where the tokenizer gives no such bound.

        It holds where the tokenizer keeps every byte: byte-level models, which a normalizer or an
        unknown token of any length would break.
        """
        state = json.loads(self._tokenizer.to_str())
        pre_tokenizer = json.dumps(state["pre_tokenizer"])
        normalizers = (state["normalizer"] or {}).get("normalizers", [state["normalizer"]])
        if '"ByteLevel"' not in pre_tokenizer or any(normalizers):
            return None
        # A byte-level vocabulary writes one character for each byte; added tokens are written as they are.
        learned = max(len(token) for token in self._tokenizer.get_vocab(with_added_tokens=False))
        added = [len(token.content.encode()) for token in self._tokenizer.get_added_tokens_decoder().values()]
        return max(learned, *added) if added else learned


class _Generation(Extension):
    """`{% generation %}`, with which templates mark an assistant's words for training: its content is the prompt's."""

    tags = {"generation"}  # noqa: RUF012 - so jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """See jinja2's `Extension`."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class ChatTemplate:
    """A model's chat template: messages in, prompt text out."""

    def __init__(self, template: str, special_tokens: Mapping[str, str]) -> None:
        extensions = [loopcontrols, _Generation]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._template = environment.from_string(template)
        self._special_tokens = dict(special_tokens)

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """Read `folder/chat_template.jinja`; None where the model has no chat template."""
        path = folder / "chat_template.jinja"
        if not path.exists():
            return None
        return cls(path.read_text(encoding="utf-8"), special_tokens(folder))

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt that asks for the assistant's next turn.

        Raises:
            InvalidRequest: the template refuses these messages.
        """
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True, **self._special_tokens)
        except TemplateError as error:
            raise InvalidRequest(f"messages: the model's chat template refuses them: {error}") from None


def special_tokens(folder: Path) -> dict[str, str]:
    """`bos_token`, `eos_token`, ... as text, from `folder/tokenizer_config.json`."""
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokens: dict[str, str] = {}
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(role)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[role] = value
    return tokens


def parse_messages(text: str) -> list[dict[str, str]]:
    """The `messages` field: a JSON list of objects with the texts `role` and `content`.

    Raises:
        InvalidRequest: it is anything else; the message says what and where.
    """
    try:
        messages = json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"messages is not JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest("messages is nested too deeply") from None
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest(
            f'messages must be a JSON list like [{{"role": "user", "content": "Hello"}}], found {text[:80]!r}'
        )
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InvalidRequest(f"messages[{index}] must be an object, found {type(message).__name__}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise InvalidRequest(f"messages[{index}] needs the text {key!r}, found {message.get(key)!r}")
            if any("\ud800" <= character <= "\udfff" for character in message[key]):
                raise InvalidRequest(f"messages[{index}].{key} holds half of a surrogate pair")
    return messages


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
