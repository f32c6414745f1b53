"""What commands print: words for people, `--json` as one document, or `--jsonl` as an object a line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from trident_client import Generation, GenerationChunk

# What a terminal would obey in place of showing it: all control characters but tab and newline.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_ALWAYS = ("text", "finish_reason", "num_input_tokens", "num_output_tokens")


def add(parser: argparse.ArgumentParser, *, lines: bool = False) -> None:
    """Add the flags that say how results are printed.

    Args:
        lines: whether there may be several results, so that JSON Lines make sense.
    """
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--json", action="store_true", help="print one JSON document")
    if lines:
        group.add_argument("--jsonl", action="store_true", help="print a JSON object a line")
    parser.set_defaults(jsonl=False)


def show(text: str, end: str = "\n", *, flush: bool = False) -> None:
    """Print a text; on a terminal, without the characters that would act on it."""
    print(safe(text) if sys.stdout.isatty() else text, end=end, flush=flush)


def safe(text: str) -> str:
    """A text without characters that act on a terminal; each becomes U+FFFD."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def document(value: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(plain(value), ensure_ascii=False))


def rows(values: Iterable[Mapping[str, Any]]) -> None:
    """Print JSON Lines, each as soon as it comes."""
    for value in values:
        print(json.dumps(plain(value), ensure_ascii=False), flush=True)


def results(options: argparse.Namespace, found: Iterable[Mapping[str, Any]], lines: Iterable[str]) -> None:
    """Print results as one document, as JSON Lines, or in words.

    Args:
        found: an object for each.
        lines: the words for each; they are made only where they are printed, as the objects are.
    """
    if options.jsonl:
        rows(found)
    elif options.json:
        document(list(found))
    else:
        for line in lines:
            show(line)


def plain(value: Any) -> Any:
    """A value of the client's as JSON has it.

    A dataclass becomes an object; of a generator's answer only what it always has and what was asked for. An array
    becomes a list, and so do bytes: tokens need not be whole characters.
    """
    if isinstance(value, GenerationChunk):
        found = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        kept = {name: item for name, item in found.items() if name in _ALWAYS or item}
        if isinstance(value, Generation):
            kept.pop("index", None)
        return plain(kept)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, bytes):
        return list(value)
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
