"""Prompts as tokens, where a control token is one only if the chat template wrote it.

What a message, a document or a tool holds is text, also where it reads like `<|im_end|>`. Which tokens control a
conversation is transformers' rule (`apply_chat_template(..., sanitize_control_tokens=True)`): the special tokens, and
those added tokens that the template writes itself.

Such a text is encoded by a second tokenizer, which is made when the first one comes. It is the model's own, but each
control token has another name, a character of private use, and the template's tokens are renamed in the prompt. So
normalizer, spaces, merges and all other tokens are as they are in any prompt.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from trident_serving.chat.origins import TEMPLATE, UNKNOWN, Traced, origins_of
from trident_serving.errors import InvalidRequest
from trident_serving.runtime.tokenizer import TextTokenizer

_PRIVATE = range(0xF0000, 0xFFFFE)
_NOT_DATA = re.compile(b"[" + TEMPLATE + UNKNOWN + b"]+")


class ControlTokens:
    """The control tokens of one model.

    Args:
        tokenizer: the model's.
        literals: what its chat template writes itself.
        listed: control tokens by the tokenizer's own list; None: it has none.
    """

    def __init__(self, tokenizer: TextTokenizer, literals: str, listed: Sequence[str] | None = None) -> None:
        self._tokenizer = tokenizer
        self._literals, self._listed = literals, listed
        self._lock = threading.Lock()
        self._renamed: _Renamed | None = None

    @classmethod
    def load(cls, folder: Path, tokenizer: TextTokenizer, literals: str) -> ControlTokens:
        """The same, with the list of `folder/tokenizer_config.json`, where it has one."""
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        return cls(tokenizer, literals, config.get("chat_control_tokens"))

    @cached_property
    def ids(self) -> dict[str, int]:
        """Control tokens by their text."""
        known = set(self._listed) if self._listed is not None else None
        found = {}
        for token_id, token in self._tokenizer.backend.get_added_tokens_decoder().items():
            text = token.content
            written = text in known if known is not None else text in self._literals and not text.isspace()
            if text and (token.special or written):
                found[text] = token_id
        return found

    @property
    def added(self) -> dict[str, int]:
        """Every token that was added to the tokenizer, control tokens and others."""
        added = self._tokenizer.backend.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items()}

    @property
    def special(self) -> dict[str, int]:
        """Those that are special tokens, which are in no text of an answer."""
        added = self._tokenizer.backend.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items() if token.special}

    def first_of(self, prompt: Traced) -> int | None:
        """The id of the control token that a text of the template begins with, white space aside."""
        text = prompt.lstrip()
        match = self._pattern.match(text)
        return self.ids[match[0]] if match else None

    def places(self, prompt: Traced, token: str, texts: Collection[str] = ()) -> list[tuple[int, int]]:
        """Where in a prompt the template wrote a control token, as (begin, end) in characters; see `encode`."""
        return [match.span() for match in self._own(prompt, texts) if match[0] == token]

    def encode(self, prompt: Traced, texts: Collection[str] = ()) -> list[int]:
        """The tokens of a prompt.

        Args:
            texts: what the request sends, for those characters of the prompt whose origin is unknown: a control token
                among them is the template's, unless one of these texts holds it.
        """
        own = list(self._own(prompt, texts))
        if [match.span() for match in own] == [match.span() for match in self._pattern.finditer(prompt)]:
            return self._tokenizer.encode(prompt, add_special_tokens=False)
        with self._lock:
            if self._renamed is None or not self._renamed.fits(prompt):
                self._renamed = _Renamed(self._tokenizer.backend, self.ids, prompt)
            renamed = self._renamed
        parts, end = [], 0
        for match in own:
            parts += [prompt[end : match.start()], renamed.names[match[0]]]
            end = match.end()
        return renamed.encode("".join([*parts, prompt[end:]]))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def _own(self, prompt: Traced, texts: Collection[str]) -> Iterator[re.Match[str]]:
        """The control tokens that the template wrote, each of whose characters is its own."""
        for run in _NOT_DATA.finditer(origins_of(prompt)):
            for match in self._pattern.finditer(prompt, *run.span()):
                unknown = UNKNOWN in origins_of(prompt)[slice(*match.span())]
                if not unknown or not any(match[0] in text for text in texts):
                    yield match


class _Renamed:
    """A tokenizer whose control tokens have other names.

    Args:
        tokenizer: the model's.
        control: its control tokens, with their ids.
        text: that the names must not be in.
    """

    def __init__(self, tokenizer: Tokenizer, control: Mapping[str, int], text: str) -> None:
        state = json.loads(tokenizer.to_str())
        taken = {*text, *(chr(code) for name in state["added_tokens"] for code in map(ord, name["content"]))}
        start = secrets.randbelow(len(_PRIVATE))  # which no request can know, and make this again and again
        free = (chr(code) for code in (*_PRIVATE[start:], *_PRIVATE[:start]) if chr(code) not in taken)
        self.names = dict(zip(control, free, strict=False))
        if len(self.names) < len(control):
            raise InvalidRequest("messages has too many characters of private use (U+F0000 to U+FFFFD)")
        for added in state["added_tokens"]:
            added["content"] = self.names.get(added["content"], added["content"])
        _rename(state["model"], self.names)
        state |= {"truncation": None, "padding": None, "post_processor": None, "decoder": None}
        self._tokenizer = Tokenizer.from_str(json.dumps(state))
        vocabulary = self._tokenizer.get_vocab()
        self._ids = {vocabulary[name]: control[token] for token, name in self.names.items()}

    def fits(self, text: str) -> bool:
        """Whether a text has none of the names."""
        return not any(name in text for name in self.names.values())

    def encode(self, text: str) -> list[int]:
        """The tokens of a text with the template's control tokens by their names, as the model's tokenizer has them."""
        return [self._ids.get(token, token) for token in self._tokenizer.encode(text, add_special_tokens=False).ids]


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """Rename tokens in a tokenizer's model, so that it does not make them of plain text."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): token_id for token, token_id in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if "merges" in model:
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [pair for pair in pairs if not names.keys() & {*pair, "".join(pair)}]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
