"""What commands read: the text of arguments, of a file, or of standard input, which "-" stands for."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trident_client.cli import exits
from trident_client.cli.exits import InputError

STDIN = "-"


def add(parser: argparse.ArgumentParser, what: str = "the text") -> None:
    """Add the arguments that give a text."""
    parser.add_argument("--file", type=Path, help="read the text from a file; -: from standard input")
    parser.add_argument(
        "text", nargs="*", help=f"{what}; standard input where there is none, and in the place of each -"
    )


def given(options: argparse.Namespace) -> bool:
    """Whether the arguments give a text, so that standard input isn't asked for one."""
    return bool(options.text or options.file)


def whole(options: argparse.Namespace) -> str:
    """All of it as one text; several arguments are joined by spaces.

    Raises:
        InputError: arguments and a file are given, or what is read is not UTF-8.
        OSError: the file can't be read.
    """
    if options.text and options.file:
        raise InputError("give the text as arguments or with --file, not both")
    if options.text:
        check_once(options.text)
        return " ".join(read(STDIN) if text == STDIN else text for text in options.text)
    return read(options.file or STDIN)


def each(options: argparse.Namespace) -> list[str]:
    """The texts: one an argument, or one a line of what is read; empty lines are none.

    Raises:
        InputError: there is no text; else see `whole`.
    """
    if options.text and options.file:
        raise InputError("give the texts as arguments or with --file, not both")
    check_once(options.text)
    found = []
    for source in options.text or [options.file or STDIN]:
        if source == STDIN or source is options.file:
            found += lines(read(source))
        else:
            found.append(source)
    if not found:
        raise InputError("there is no text")
    return found


def lines(text: str) -> list[str]:
    """The lines of a text that are not empty."""
    return [line for line in (line.removesuffix("\r") for line in text.split("\n")) if line]


def read(source: Path | str) -> str:
    """The text of a file, or of standard input.

    Raises:
        InputError: it is not UTF-8; the message says where.
        OSError: it can't be read.
    """
    if str(source) == STDIN:
        if sys.stdin.isatty():
            exits.say("reading standard input: end it with Ctrl-D, or give the text as an argument")
        content = sys.stdin.buffer.read()
    else:
        content = Path(source).read_bytes()
    return decoded(content, "standard input" if str(source) == STDIN else str(source))


def decoded(content: bytes, name: str) -> str:
    """Bytes as text.

    Raises:
        InputError: they are not UTF-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{name} is not UTF-8: byte 0x{content[error.start]:02x} at position {error.start}, line {line}"
        ) from None


def check_once(names: list[str]) -> None:
    """Standard input can be read once.

    Raises:
        InputError: it is named twice.
    """
    if names.count(STDIN) > 1:
        raise InputError("standard input (-) can be read only once")
