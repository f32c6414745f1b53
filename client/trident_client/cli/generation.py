"""`trident generate` and `trident chat`."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trident_client import Client, Generation, GenerationChunk, _generation
from trident_client._options import GENERATION, Option
from trident_client.cli import output, texts
from trident_client.cli.connection import number
from trident_client.cli.exits import Exit, InputError


def add_flags(command: argparse.ArgumentParser, options: Mapping[str, Option]) -> None:
    """Add a flag for each option that has one, and `--option` for all of them.

    A list's flag may be given several times, a bool's has a --no- form.
    """
    group = command.add_argument_group("request fields")
    for name, option in options.items():
        flags = [f"--{name.replace('_', '-')}"]
        more: dict[str, Any] = {}
        if option.many:
            flags.append(f"--{name.split('_')[0]}")  # --stop, as most tools have it
            more["action"] = "append"
        elif option.dtype == "BOOL":
            more["action"] = argparse.BooleanOptionalAction
        else:
            more["type"] = {"BYTES": str, "FP32": float}.get(option.dtype, int)
            more["choices"] = option.choices or None
        if option.flag:
            group.add_argument(*flags, help=option.help.replace("%", "%%"), **more)
    group.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any request field, such as guided_json; the value is JSON or a text, and @FILE is read from a file",
    )


def chosen(options: argparse.Namespace, known: Mapping[str, Option]) -> dict[str, Any]:
    """The options that the flags give, by name; None where they don't.

    Raises:
        InputError: `--option` names an unknown one, or its value doesn't fit.
        OSError: a value's file can't be read.
    """
    found = {name: getattr(options, name) for name, option in known.items() if option.flag}
    for each in options.option:
        name, value = assigned(each, known)
        if found.get(name) is not None:
            raise InputError(f"{name} is given twice")
        found[name] = value
    return found


def assigned(text: str, known: Mapping[str, Option]) -> tuple[str, Any]:
    """Name and value of "name=value".

    Raises:
        InputError: the name is unknown, or the value doesn't fit its type.
        OSError: a value's file can't be read.
    """
    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals:
        raise InputError(f"{text!r} has no value: give NAME=VALUE")
    return name, parsed(name, value, known)


def parsed(name: str, value: str, known: Mapping[str, Option]) -> Any:
    """The value of an option from its text: JSON, or for an option of texts the text itself; @FILE holds it.

    Raises:
        InputError: the name is unknown, or the value doesn't fit its type.
        OSError: the file can't be read.
    """
    option = known.get(name)
    if option is None:
        raise InputError(f"unknown option {name!r}; known are {', '.join(known)}")
    if value.startswith("@"):
        value = texts.read(Path(value[1:]))
    found: Any = value
    if option.dtype != "BYTES" or option.many or value.lstrip()[:1] in ("{", "["):
        try:
            found = json.loads(value)
        except ValueError:
            if option.dtype != "BYTES":
                raise InputError(f"{name}={value} is no {_KINDS.get(option.dtype, 'whole number')}") from None
    if option.many:
        found = found if isinstance(found, list) else [value if option.dtype == "BYTES" else found]
    if not all(_fits(item, option.dtype) for item in (found if option.many else [found])):
        raise InputError(f"{name}={value} is no {_KINDS.get(option.dtype, 'whole number')}")
    if option.choices and found not in option.choices:
        raise InputError(f"{name} is one of {', '.join(option.choices)}, found {found!r}")
    return found


_KINDS = {"BOOL": "true or false", "FP32": "number", "BYTES": "text or JSON"}


def _fits(value: Any, dtype: str) -> bool:
    if dtype == "BOOL":
        return isinstance(value, bool)
    if dtype == "BYTES":
        return isinstance(value, str | dict | list)
    return isinstance(value, int | float if dtype == "FP32" else int) and not isinstance(value, bool)


def add(generate: argparse.ArgumentParser, chat: argparse.ArgumentParser) -> None:
    """Add the arguments of both commands."""
    chat.add_argument("--system", help="the system message")
    chat.add_argument(
        "--messages", type=Path, metavar="FILE", help="a JSON list of messages that come before the text; -: stdin"
    )
    chat.add_argument("--no-history", action="store_true", help="a conversation keeps what you type out of its file")
    for command in (generate, chat):
        command.add_argument("--n", type=number(1), default=1, help="answers (default %(default)s)")
        command.add_argument(
            "--image",
            type=Path,
            action="append",
            default=[],
            metavar="FILE",
            help="an image for a model that reads some: of a chat before the text; give it again for more",
        )
        texts.add(command)
        add_flags(command, GENERATION)


def generate(client: Client, options: argparse.Namespace) -> int:
    """Continue a text."""
    return _print_answer(client, options, texts.whole(options))


def chat(client: Client, options: argparse.Namespace) -> int:
    """Answer a message, or talk where there is none and a person is at the terminal."""
    if _is_conversation(options):
        if options.image:
            raise InputError("--image needs a text: a conversation at the terminal has none")
        from trident_client.cli import conversation

        return conversation.run(client, options)
    history: list[Any] = read_messages(options.messages) if options.messages else []
    if options.system:
        history = [{"role": "system", "content": options.system}, *history]
    if not options.messages or texts.given(options):
        history += _generation.turns(texts.whole(options), options.image)
    return _print_answer(client, options, history)


def _is_conversation(options: argparse.Namespace) -> bool:
    printed = options.json or options.jsonl or options.n > 1
    return not texts.given(options) and not printed and sys.stdin.isatty() and sys.stdout.isatty()


def read_messages(file: Path) -> list[dict[str, Any]]:
    """The messages of a file: a JSON list, or an object that has one as `messages`.

    Raises:
        InputError: it holds something else.
        OSError: it can't be read.
    """
    name = "standard input" if str(file) == texts.STDIN else str(file)
    try:
        found = json.loads(texts.read(file))
    except ValueError as error:
        raise InputError(f"{name} is no JSON: {error}") from None
    messages = found.get("messages") if isinstance(found, dict) else found
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{name} holds no list of messages")
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f"{name}: message {position} is no object with a role")
    return messages


def _print_answer(client: Client, options: argparse.Namespace, prompt: Any) -> int:
    asked = chosen(options, GENERATION)
    stream = client.stream(prompt, images=options.image, model=options.model, n=options.n, **asked)
    with contextlib.closing(stream):
        if options.jsonl:
            output.rows(answered(chunk, asked) | {"index": chunk.index} for chunk in stream)
        elif options.n > 1:
            answers = _parted(stream)
            if options.json:
                output.document([answered(answer, asked) for answer in answers])
            for answer in () if options.json else answers:
                output.show(f"[{answer.index}] {answer.text}", end="")
                _show_calls(answer, True)
                print()
        elif options.json:
            output.document(answered(_generation.joined(stream), asked))
        else:
            chunks = []
            for chunk in stream:
                chunks.append(chunk)
                output.show(chunk.text, end="", flush=True)
            answer = _generation.joined(chunks)
            _show_calls(answer, bool(answer.text))
            print()
    return Exit.DONE


def answered(chunk: GenerationChunk, asked: Mapping[str, Any]) -> dict[str, Any]:
    """An answer, or a chunk of one, as JSON has it, with what was asked for."""
    found: dict[str, Any] = output.plain(chunk)
    if not asked.get("return_log_probs"):
        found.pop("log_probs", None)
    return found


def _parted(stream: Iterable[GenerationChunk]) -> list[Generation]:
    """The answers of a stream with several."""
    chunks: dict[int, list[GenerationChunk]] = {}
    for chunk in stream:
        chunks.setdefault(chunk.index, []).append(chunk)
    return [_generation.joined(chunks[index]) for index in sorted(chunks)]


def _show_calls(answer: Generation, after: bool) -> None:
    """Calls of tools, a line each, as a model's answer has them beside its text or in its place."""
    if answer.tool_calls and after:
        print()
    output.show("\n".join(f"{call.name} {call.arguments}" for call in answer.tool_calls), end="")
