"""What can be wrong with the files of a tokenizer, told from the files: libraries say it in words of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from trident_export.errors import UnreadableSource

if TYPE_CHECKING:
    from trident_export.huggingface.folder import HuggingFaceFolder

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
)
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# What holds a vocabulary, in the one or the other folder.
_VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "*.spm", "*.vocab", "*.tiktoken")
NO_VOCABULARY = "there is no file with a vocabulary (tokenizer.json, vocab.txt, vocab.json, tokenizer.model)"
_LARGEST_ID = 2**31 - 1


def check(source: HuggingFaceFolder) -> None:
    """Check the files that are there.

    Raises:
        UnreadableSource: one is no JSON object, has half of a surrogate pair in a text, a token's id that is none, or a
            chat template that is no text.
    """
    for name in _FILES:
        if not (source.path / name).is_file():
            continue
        table = source.table(name)
        # UTF-8 holds no surrogates, so that they can come from escapes only; a vocabulary takes a second to walk.
        if _ESCAPED_SURROGATE.search((source.path / name).read_text(encoding="utf-8")):
            for where, text in _texts(table):
                if not text.isascii() and text.encode("utf-8", "ignore").decode() != text:
                    raise UnreadableSource(
                        f"{source}: {name} has {where} {text[:40]!r}, which holds half of a surrogate pair and is no "
                        "text: copy the file again"
                    )
        for token, index in _ids(name, table):
            if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index <= _LARGEST_ID:
                raise UnreadableSource(
                    f"{source}: {name} gives the token {token[:40]!r} the id {index!r:.40}, which must be a whole "
                    f"number from 0 to {_LARGEST_ID}: copy the file again"
                )
        _check_template(source, name, table.get("chat_template"))


def _check_template(source: HuggingFaceFolder, name: str, template: object) -> None:
    several = isinstance(template, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        for entry in template
    )
    if not (template is None or isinstance(template, str | dict) or several):
        raise UnreadableSource(
            f"{source}: {name} has chat_template {template!r:.40}, which must be a text, or a list of objects "
            "with the texts name and template: mend it, or take it away to serve the model without messages"
        )


def fault(source: HuggingFaceFolder) -> str | None:
    """Why a tokenizer can't be loaded, as far as it is known; asked when loading has failed.

    A vocabulary with the same id twice is no fault to every kind of tokenizer.
    """
    if not any(next(source.path.glob(pattern), None) for pattern in _VOCABULARIES):
        return NO_VOCABULARY
    if not (source.path / "tokenizer.json").is_file():
        return None
    model = source.table("tokenizer.json").get("model")
    if not isinstance(model, dict):
        return "tokenizer.json can't be used, its model is no object"
    words = model.get("vocab")
    return (
        f"tokenizer.json can't be used, it {why}" if isinstance(words, dict) and (why := _fault(model, words)) else None
    )


def _fault(model: Mapping[str, Any], words: Mapping[str, Any]) -> str:
    seen: dict[Any, str] = {}
    for word, index in words.items():
        if (other := seen.setdefault(index, word)) != word:
            return f"gives the id {index} to {other!r} and to {word!r}"
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in model.get("merges") or ():
        left, right = merge if isinstance(merge, list) else merge.split(" ", 1)
        for word in (left, right, left + right.removeprefix(prefix)):
            if word not in words:
                return f"merges {left!r} and {right!r}, and its vocabulary has no {word!r}"
    return ""


def _ids(name: str, table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Tokens and their ids, as far as a file has them as such."""
    if name in ("added_tokens.json", "vocab.json"):
        yield from table.items()
    elif name == "tokenizer_config.json":
        decoder = table.get("added_tokens_decoder")
        for index, token in decoder.items() if isinstance(decoder, dict) else ():
            text = token.get("content") if isinstance(token, dict) else token
            yield str(text), int(index) if index.isdecimal() else index
    elif name == "tokenizer.json":
        model = table.get("model")
        words = model.get("vocab") if isinstance(model, dict) else None
        yield from words.items() if isinstance(words, dict) else ()
        added = table.get("added_tokens")
        for token in added if isinstance(added, list) else ():
            if isinstance(token, dict):
                yield str(token.get("content")), token.get("id")


def _texts(value: object, where: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a JSON value, with the names that lead to it."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield f"a key in {where or 'it'}", key
            yield from _texts(inner, f"{where}.{key}" if where else json.dumps(key)[1:-1])
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, where)
