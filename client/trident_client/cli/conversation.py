"""`trident chat` without a text, on a terminal: a conversation, with line editing, recall and `/` commands."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from pathlib import Path
from typing import Any

from trident_client import Client, TridentError
from trident_client._options import GENERATION
from trident_client.cli import exits, extras, generation, output, turns
from trident_client.cli.exits import Exit, InputError
from trident_client.cli.turns import COMMANDS, Turns

_MEASURABLE = 0.1  # seconds; a speed from less says nothing
# For what is neither the question nor the answer; https://no-color.org.
_DIM, _RESET = ("", "") if os.environ.get("NO_COLOR") else ("\x1b[2m", "\x1b[0m")


def run(client: Client, options: argparse.Namespace) -> int:
    """Talk until the user ends it; returns the exit status."""
    with extras.installed("a conversation"):
        from prompt_toolkit.formatted_text import ANSI
    talk = Turns(client, options.system or "", model=options.model)
    if options.messages:
        talk.load(options.messages)
        talk.system = options.system or talk.system
    chosen = generation.chosen(options, GENERATION)
    talk.options |= {name: value for name, value in chosen.items() if value is not None}
    if talk.model is None:
        talk.model = client._model(None, "text-generation", None)
    session = _session(talk, None if options.no_history else _history_file())
    _remark(f"{talk.model}; /help lists the commands, Ctrl-D ends")
    while True:
        try:
            line = session.prompt(ANSI("\x1b[1m>>> \x1b[0m")).strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return Exit.DONE
        if not line:
            continue
        try:
            if line.startswith("/") and not line.startswith("//"):
                _show(turns.run(talk, line))
                if line.split()[0] != "/retry":
                    continue
                line = talk.asked
            _answer(talk, line.removeprefix("/") if line.startswith("//") else line)
        except turns.Ended:
            return Exit.DONE
        except KeyboardInterrupt:
            print()
        except (TridentError, InputError, OSError, ValueError, TypeError) as error:
            exits.say(exits.sentence(error))


def _answer(talk: Turns, text: str) -> None:
    """Ask, and print the answer as it comes; Ctrl-C ends it, here and on the server."""
    talk.ask(text)
    parts: list[str] = []
    began, first, count, reason = time.monotonic(), None, 0, "interrupted"
    try:
        with contextlib.closing(talk.client.stream(talk.prompt(), model=talk.model, **talk.options)) as stream:
            for chunk in stream:
                first = first or time.monotonic()
                parts.append(chunk.text)
                count, reason = chunk.num_output_tokens, chunk.finish_reason or reason
                if chunk.reasoning:
                    print(f"{_DIM}{output.safe(chunk.reasoning)}{_RESET}", end="", flush=True)
                output.show(chunk.text, end="", flush=True)
    except KeyboardInterrupt:
        reason = "interrupted"
    finally:
        talk.answered("".join(parts))
        if parts:
            print()
    seconds = time.monotonic() - (first or began)
    rate = f", {(count - 1) / seconds:.0f} tokens/s" if count > 1 and seconds > _MEASURABLE else ""
    waited = f", first after {first - began:.2f} s" if first else ""
    _remark(f"{reason}: {count} tokens{waited}{rate}")


def _show(text: str) -> None:
    if text:
        output.show(text)


def _remark(text: str) -> None:
    print(f"{_DIM}{output.safe(text)}{_RESET}", flush=True)


def _session(talk: Turns, history: Path | None) -> Any:
    """The prompt: Enter sends, Alt-Enter and a backslash at the end of a line begin a new one."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    @keys.add("c-j")  # an Enter that was typed while the answer came
    def _(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\":
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(
        history=FileHistory(str(history)) if history else InMemoryHistory(),
        auto_suggest=AutoSuggestFromHistory(),
        completer=_completer(talk),
        complete_while_typing=False,
        key_bindings=keys,
        multiline=True,
        prompt_continuation="... ",
    )


def _completer(talk: Turns) -> Any:
    """Completes the names of commands, options, models and files."""
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    class Commands(Completer):
        def get_completions(self, document: Any, event: Any) -> Any:
            before: str = document.text_before_cursor
            if not before.startswith("/") or "\n" in before:
                return
            name, space, rest = before[1:].partition(" ")
            if not space:
                yield from (Completion(f"/{each}", -len(before)) for each in COMMANDS if each.startswith(name))
            elif name == "set" and " " not in rest:
                yield from (Completion(each, -len(rest)) for each in GENERATION if each.startswith(rest))
            elif name == "model":
                with contextlib.suppress(TridentError):
                    served = [each for each in talk.client.served() if "_" not in each and each.startswith(rest)]
                    yield from (Completion(each, -len(rest)) for each in served)
            elif name in ("save", "load"):
                yield from PathCompleter(expanduser=True).get_completions(Document(rest), event)

    return Commands()


def _history_file() -> Path | None:
    """Where the lines that were typed are kept, for this user's eyes; None where it can't be made."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    file = Path(state, "trident", "history")
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
    except OSError as error:
        exits.say(f"what you type is not kept: {exits.sentence(error)}")
        return None
    return file
