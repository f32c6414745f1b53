"""A conversation and what its `/` commands do to it; `conversation` shows it on a terminal."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trident_client import Client, NotFoundError
from trident_client._options import GENERATION
from trident_client.cli import generation
from trident_client.cli.exits import InputError


class Ended(Exception):
    """The user asked for the end of the conversation."""


@dataclass
class Turns:
    """The messages so far, and how the next answer is asked for.

    Attributes:
        system: the system message; "": none.
        messages: of user and assistant, in turn.
        model: that answers; None: the server's only generator.
        options: of `Client.stream`.
        asked: the user's last message, for `/retry`.
        files: that this conversation was loaded from or saved to, so that they may be written over.
    """

    client: Client
    system: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    model: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    asked: str = ""
    files: set[Path] = field(default_factory=set)

    def prompt(self) -> list[Any]:
        """What the model is sent."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    def ask(self, text: str) -> None:
        """Add a message of the user."""
        self.asked = text
        self.messages.append({"role": "user", "content": text})

    def answered(self, text: str) -> None:
        """Add the assistant's answer, or as much of it as came; where nothing came, the question goes too."""
        if text:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()

    def undo(self) -> str:
        """Take back the last message of the user and all that follows it; returns it.

        Raises:
            InputError: there is none.
        """
        for index in range(len(self.messages) - 1, -1, -1):
            if self.messages[index]["role"] == "user":
                text = self.messages[index]["content"]
                del self.messages[index:]
                return text if isinstance(text, str) else ""
        raise InputError("there is nothing to undo")

    def to_json(self) -> str:
        """What `/save` writes."""
        told = {"model": self.model, "options": self.options, "messages": self.prompt()}
        return json.dumps(told, ensure_ascii=False, indent=2) + "\n"

    def load(self, file: Path) -> None:
        """Go on with a saved conversation, or a list of messages.

        Raises:
            InputError: the file holds neither.
            OSError: it can't be read.
        """
        messages = generation.read_messages(file)
        found = json.loads(file.read_text(encoding="utf-8"))
        saved = found if isinstance(found, dict) else {}
        options, model = saved.get("options") or {}, saved.get("model")
        if not isinstance(options, dict) or not (model is None or isinstance(model, str)):
            raise InputError(f"{file} is no saved conversation")
        if unknown := sorted(set(options) - set(GENERATION)):
            raise InputError(f"{file} has the unknown option {unknown[0]!r}")
        system = messages[0].get("content") if messages[0]["role"] == "system" else None
        if isinstance(system, str):
            messages = messages[1:]
        self.system, self.messages = system if isinstance(system, str) else "", messages
        self.options, self.model = options, model if model is not None else self.model
        self.files.add(file.resolve())


@dataclass(frozen=True)
class Command:
    """A `/` command.

    Attributes:
        arguments: how they are written in the help.
        help: what it does.
        run: does it, with what stands behind the command's name; returns what is shown, or None for `/retry` and
            `/help`, which the terminal does.
    """

    arguments: str
    help: str
    run: Callable[[Turns, str], str]


def _help(turns: Turns, rest: str) -> str:
    del turns, rest
    width = max(len(f"/{name} {command.arguments}") for name, command in COMMANDS.items())
    lines = [f"/{name} {command.arguments}".ljust(width + 2) + command.help for name, command in COMMANDS.items()]
    keys = "Enter sends; Alt-Enter, or \\ at a line's end, begins a new one; Ctrl-C ends an answer, Ctrl-D the talk"
    return "\n".join([*lines, keys])


def _system(turns: Turns, rest: str) -> str:
    if rest:
        turns.system = "" if rest == "-" else rest
    return f"system: {turns.system}" if turns.system else "there is no system message"


def _clear(turns: Turns, rest: str) -> str:
    del rest
    turns.messages.clear()
    return "the conversation is empty; the system message and the options stay"


def _model(turns: Turns, rest: str) -> str:
    if rest:
        try:
            task = turns.client.parameters(rest).get("task", "")
        except NotFoundError:
            raise InputError(f"there is no model {rest!r}; /model lists them") from None
        if task != "text-generation":
            raise InputError(f"{rest} does not generate: its task is {task or 'unknown'}")
        turns.model = rest
        return f"model: {rest}"
    public = [name for name in turns.client.served() if "_" not in name]
    found = [name for name in public if turns.client.parameters(name).get("task") == "text-generation"]
    return "\n".join(f"{'*' if name == turns.model or len(found) == 1 else ' '} {name}" for name in found)


def _save(turns: Turns, rest: str) -> str:
    file = _file(rest)
    if file.exists() and file.resolve() not in turns.files:
        raise InputError(f"{file} exists: take another name")
    file.write_text(turns.to_json(), encoding="utf-8")
    turns.files.add(file.resolve())
    return f"saved {len(turns.messages)} messages to {file}"


def _load(turns: Turns, rest: str) -> str:
    file = _file(rest)
    turns.load(file)
    return f"loaded {len(turns.messages)} messages from {file}"


def _file(rest: str) -> Path:
    try:
        names = shlex.split(rest)
    except ValueError as error:
        raise InputError(f"the file's name can't be read: {error}") from None
    if len(names) != 1:
        raise InputError("give the name of one file")
    return Path(names[0]).expanduser()


def _set(turns: Turns, rest: str) -> str:
    name, _, value = rest.replace("=", " ", 1).partition(" ")
    name, value = name.replace("-", "_"), value.strip()
    if name and not value:
        turns.options.pop(name, None)
    elif name:
        turns.options[name] = generation.parsed(name, value, GENERATION)
    shown = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in sorted(turns.options.items())]
    return "\n".join(shown) or "no option is set: the server's defaults hold"


def _history(turns: Turns, rest: str) -> str:
    del rest
    shown = [f"{message['role']}: {message.get('content') or ''}" for message in turns.prompt()]
    return "\n".join(shown) or "the conversation is empty"


def _undo(turns: Turns, rest: str) -> str:
    del rest
    return f"took back: {turns.undo()[:60]}"


def _exit(turns: Turns, rest: str) -> str:
    del turns, rest
    raise Ended


def _retry(turns: Turns, rest: str) -> str:
    """Leaves the last question to be asked again."""
    del rest
    if turns.messages:
        turns.asked = turns.undo()
    if not turns.asked:
        raise InputError("there is nothing to ask again")
    return ""


COMMANDS: dict[str, Command] = {
    "help": Command("", "this list", _help),
    "system": Command("[TEXT]", "show or set the system message; -: none", _system),
    "clear": Command("", "forget all messages", _clear),
    "model": Command("[NAME]", "list the models, or take another", _model),
    "set": Command("[NAME [VALUE]]", "show, take back or set an option: /set temperature 0.7", _set),
    "history": Command("", "show the conversation", _history),
    "undo": Command("", "take back the last question and its answer", _undo),
    "retry": Command("", "ask the last question again", _retry),
    "save": Command("FILE", "write the conversation to a file", _save),
    "load": Command("FILE", "go on with a conversation from a file", _load),
    "exit": Command("", "end; so does Ctrl-D", _exit),
}


def run(turns: Turns, line: str) -> str:
    """Do a command; returns what it has to say.

    Raises:
        InputError: it is unknown, or can't be done.
        Ended: it was `/exit`.
        TridentError, OSError: see what it does.
    """
    name, _, rest = line[1:].partition(" ")
    command = COMMANDS.get({"quit": "exit", "bye": "exit", "?": "help"}.get(name, name))
    if command is None:
        raise InputError(f"there is no /{name}; /help lists the commands")
    return command.run(turns, rest.strip())
