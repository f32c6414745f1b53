"""`trident completion`: scripts that complete commands and flags in a shell."""

from __future__ import annotations

import argparse
from pathlib import Path

from trident_client.cli import extras
from trident_client.cli.exits import Exit

SHELLS = ("bash", "zsh", "fish")


def add(command: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    command.add_argument("shell", choices=SHELLS)


def run(options: argparse.Namespace) -> int:
    """Print a shell's script."""
    print(script(options.shell))
    return Exit.DONE


def script(shell: str) -> str:
    """The script of one of `SHELLS`.

    Raises:
        ModuleNotFoundError: shtab isn't installed.
    """
    with extras.installed("trident completion"):
        import shtab
    from trident_client.cli import parser

    built = parser.build()
    _mark_files(built, shtab.FILE)
    text: str = shtab.complete(built, shell=shell)
    return text


def _mark_files(parser: argparse.ArgumentParser, file: object) -> None:
    """Have every argument that is a file completed as one."""
    for action in parser._actions:
        if action.type is Path:
            action.complete = file  # type: ignore[attr-defined]
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _mark_files(command, file)
