"""How a command ends: its exit status, and the sentence on standard error; never a traceback."""

from __future__ import annotations

import contextlib
import enum
import os
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

from trident_client import DeadlineExceededError, TridentError, UnavailableError

# What gRPC says of a server that it can't reach; the rest of its text is about gRPC.
UNREACHABLE = re.compile(r"failed to connect to all addresses.*: ([^:]+)$", re.DOTALL)
TRACEBACK = "TRIDENT_TRACEBACK"  # an environment variable: a defect shows its traceback


class Exit(enum.IntEnum):
    """What an exit status means; docs/reference/cli.md has the table.

    Attributes:
        DONE: all went well; also where the reader of the output has gone.
        FAILED: the server refused the call, or failed.
        BAD_INPUT: wrong arguments, an input that can't be read, an output that can't be written, a missing package.
        UNAVAILABLE: no server could be reached, none had room, or no answer came in time.
        SOME_FAILED: a batch is done, and some of its lines have an error.
        DEFECT: something in Trident itself is wrong.
        INTERRUPTED: Ctrl-C.
    """

    DONE = 0
    FAILED = 1
    BAD_INPUT = 2
    UNAVAILABLE = 3
    SOME_FAILED = 4
    DEFECT = 70
    INTERRUPTED = 130


class InputError(Exception):
    """What the user gave can't be used; the message says what it is and where it stands."""


@dataclass
class Ended:
    """How a `with` block ended."""

    status: int = Exit.DONE


@contextlib.contextmanager
def told() -> Iterator[Ended]:
    """Turn what a `with` block raises into a sentence on standard error and an exit status."""
    ended = Ended()
    try:
        try:
            yield ended
        finally:
            sys.stdout.flush()  # here, where a failure still is a sentence
    except BrokenPipeError:
        _forget_output()
        ended.status = Exit.DONE  # the reader has gone, which is no error
    except KeyboardInterrupt:
        ended.status = Exit.INTERRUPTED
    except Exception as error:
        ended.status = status_of(error)
        say(sentence(error))
        if ended.status is Exit.DEFECT and os.environ.get(TRACEBACK):
            traceback.print_exc()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            return
        _forget_output()


def status_of(error: BaseException) -> Exit:
    """The exit status that an error ends a command with."""
    if isinstance(error, UnavailableError | DeadlineExceededError):
        return Exit.UNAVAILABLE
    if isinstance(error, TridentError):
        return Exit.FAILED
    if isinstance(error, InputError | OSError | ValueError | ModuleNotFoundError):
        return Exit.BAD_INPUT
    return Exit.DEFECT


def sentence(error: BaseException) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UnavailableError) and (found := UNREACHABLE.search(text)):
        return f"no server answers ({found[1]})"
    if status_of(error) is Exit.DEFECT:
        return f"this is a defect of Trident: {type(error).__name__}: {text} ({TRACEBACK}=1 shows where)"
    return text


def say(text: str) -> None:
    """Print a sentence on standard error, under the command's name."""
    with contextlib.suppress(OSError):
        print(f"trident: {text}", file=sys.stderr, flush=True)


def _forget_output() -> None:
    """Let the interpreter flush standard output into nothing as it ends, because its reader or its disk has gone."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
