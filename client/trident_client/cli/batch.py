"""`trident batch`: asks for each line of a file, many at a time, and goes on where it was interrupted.

What is wrong with a line is written as its result. What is wrong with the server stops the batch: lines that it could
not answer have no result, and are asked when the same command is given again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trident_client import CancelledError, Client, ForbiddenError, NotFoundError, TridentError, UnavailableError
from trident_client.cli import batch_output, connection, exits, output, progress, texts, verbs
from trident_client.cli.batch_output import Output
from trident_client.cli.connection import number
from trident_client.cli.exits import Exit, InputError
from trident_client.cli.verbs import VERBS, Asked

FIRST_PAUSE = 0.05  # seconds before a line is asked again that found no room; doubled each time
LONGEST_PAUSE = 2.0
_ENDING = 10.0  # seconds that calls may take to be cancelled
_ANOTHER = {
    False: "OUTPUT has the result of another request for line {line}: give another OUTPUT, or --overwrite",
    True: "OUTPUT has the error of another request for line {line}: --retry-failed asks it again",
}


def add(command: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    command.add_argument(
        "input", type=Path, metavar="INPUT", help="JSON Lines: an object of fields, or a text; -: stdin"
    )
    command.add_argument(
        "output", type=Path, metavar="OUTPUT", help="gets a line for each; what is there already isn't asked; -: stdout"
    )
    command.add_argument("--verb", choices=tuple(VERBS), help="what is asked of lines without a verb of their own")
    command.add_argument("--model", help="of lines without one; default: the server's only model of the task")
    command.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of every line without it; the value is JSON or a text, and @FILE is read from a file",
    )
    command.add_argument("--lines", action="store_true", help="INPUT has plain texts, and no JSON")
    command.add_argument(
        "--concurrency", type=number(1), default=16, help="lines asked at a time (default %(default)s)"
    )
    command.add_argument("--retry-failed", action="store_true", help="ask the lines again whose results are errors")
    command.add_argument("--overwrite", action="store_true", help="throw away what OUTPUT has")
    command.add_argument("--max-errors", type=number(1), metavar="N", help="stop after so many lines with errors")
    command.add_argument(
        "--patience",
        type=connection.seconds,
        default=60.0,
        metavar="SECONDS",
        help="to wait for a server that is full or away; then the batch stops (default 60)",
    )
    command.add_argument("--quiet", action="store_true", help="say nothing on standard error but what is wrong")
    command.add_argument("--json", action="store_true", help="print the counts as one JSON document at the end")


def run(options: argparse.Namespace) -> int:
    """Run a batch."""
    _check_files(options)
    defaults = dict(_default(each) for each in options.option)
    if options.model is not None:
        defaults["model"] = options.model
    total = None if str(options.input) == texts.STDIN else batch_output.count(options.input)
    with (
        connection.client(options) as client,
        contextlib.closing(
            Output(options.output, overwrite=options.overwrite, retry_failed=options.retry_failed)
        ) as results,
    ):
        if results.repaired:
            exits.say(f"{options.output}: its last line was half-written and is asked again")
        if not client.health().live:
            raise UnavailableError(f"no server can be reached at {', '.join(connection.urls(options))}")
        stopping = threading.Event()
        asked = _asked(options, defaults, stopping)
        work = _Work(client, results, asked, options.patience, options.max_errors, stopping)
        with progress.shown("lines", total, options.quiet) as show:
            status = work.run(options.concurrency, show)
    return _tell(options, work, status)


def _check_files(options: argparse.Namespace) -> None:
    to_stdout = str(options.output) == texts.STDIN
    if to_stdout and options.json:
        raise InputError("--json prints the counts where the results go: give a file as OUTPUT")
    if to_stdout and (options.retry_failed or options.overwrite):
        raise InputError("standard output holds no earlier results")
    if str(options.input) == texts.STDIN:
        return
    with options.input.open("rb"):  # before OUTPUT is made
        pass
    if not to_stdout and options.output.exists() and os.path.samefile(options.input, options.output):
        raise InputError("INPUT and OUTPUT are the same file")


def _default(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")
    allowed = {name for verb in VERBS.values() for name in verb.takes + verb.needs}
    if not equals or name not in allowed:
        raise InputError(f"--option {text!r}: give NAME=VALUE, with one of the names {', '.join(sorted(allowed))}")
    if value.startswith("@"):
        value = texts.read(Path(value[1:]))
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _asked(options: argparse.Namespace, defaults: dict[str, Any], stopping: threading.Event) -> Iterator[Asked]:
    """The lines of the input, until the batch ends."""
    first: dict[str | int, int] = {}
    for line, content in batch_output.lines(options.input, stopping.is_set):
        asked = verbs.read(line, content, options.verb, defaults, texts=options.lines)
        if asked.id is not None:
            other = first.setdefault(asked.key, line)
            if other != line:
                asked = Asked(line, None, wrong=f"line {line} has the id of line {other}: {json.dumps(asked.id)}")
        yield asked


@dataclass
class _Work:
    """What the threads of a batch share.

    Attributes:
        lines: those of the input; a thread takes the next one.
        stopping: that the batch ends.
        answered, failed, skipped: lines of this run that got a result or an error, and those that had one before.
        before: those of the skipped that have an error.
        waiting: why lines are asked again; "" if none is.
        stopped: whether there were too many errors.
    """

    client: Client
    results: Output
    lines: Iterator[Asked]
    patience: float | None
    max_errors: int | None
    stopping: threading.Event
    answered: int = 0
    failed: int = 0
    skipped: int = 0
    before: int = 0
    seconds: float = 0.0
    waiting: str = ""
    stopped: bool = False
    _changed: threading.Event = field(default_factory=threading.Event)
    _reading: threading.Lock = field(default_factory=threading.Lock)
    _writing: threading.Lock = field(default_factory=threading.Lock)
    _failure: BaseException | None = None
    _last_answer: float = field(default_factory=time.monotonic)

    def run(self, concurrency: int, show: Callable[[_Work], None]) -> int:
        """Answer every line; returns the exit status.

        Args:
            show: is called with this object a few times a second.
        """
        began = time.monotonic()
        threads = [threading.Thread(target=self._thread, daemon=True) for _ in range(concurrency)]
        status: int = Exit.DONE
        with _interruptions() as interrupted:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads) and not self.stopping.is_set():
                self._changed.wait(0.2)
                self._changed.clear()
                show(self)
                if interrupted.is_set():
                    status = Exit.INTERRUPTED
                    break
            self.stopping.set()
            self.client.close()  # ends what still runs, on the server, too
            until = time.monotonic() + _ENDING
            for thread in threads:
                if thread.ident is not None:
                    thread.join(max(0.0, until - time.monotonic()))
        show(self)
        self.seconds = time.monotonic() - began
        if isinstance(self._failure, BrokenPipeError):
            raise self._failure
        if self._failure is not None and status is not Exit.INTERRUPTED:
            exits.say(exits.sentence(self._failure))
            return exits.status_of(self._failure)
        return status or (Exit.SOME_FAILED if self.failed + self.before else Exit.DONE)

    def _thread(self) -> None:
        try:
            while not self.stopping.is_set() and (asked := self._next()) is not None:
                self._answer(asked)
        except BaseException as error:  # the main thread tells it
            self._stop(error)
        finally:
            self._changed.set()

    def _stop(self, error: BaseException) -> None:
        with self._writing:
            if self._failure is None and not self.stopping.is_set():
                self._failure = error
        self.stopping.set()

    def _next(self) -> Asked | None:
        """The next line that has no result yet."""
        with self._reading:
            for asked in self.lines:
                done = self.results.done.get(asked.key)
                if done is None:
                    return asked
                if done.digest != asked.digest:
                    raise InputError(_ANOTHER[done.failed].format(line=asked.line))
                self.skipped += 1
                self.before += done.failed
        return None

    def _answer(self, asked: Asked) -> None:
        """Write a line's result, or its error; nothing if the batch ends before it has one."""
        pause = FIRST_PAUSE
        while not self.stopping.is_set():
            try:
                result = asked.answer(self.client)
                if isinstance(result, dict) and result.get("finish_reason") == "cancelled":
                    raise UnavailableError("the server ended the answer")  # it shuts down
            except UnavailableError as error:
                self.waiting = exits.sentence(error)
                if self.patience is not None and time.monotonic() - self._last_answer > self.patience:
                    raise
                self.stopping.wait(pause * random.uniform(0.5, 1))
                pause = min(2 * pause, LONGEST_PAUSE)
            except (CancelledError, ForbiddenError):
                raise
            except NotFoundError as error:
                if not asked.own_model:  # no other line would find it either
                    raise
                return self._write(asked, error=_error(error))
            except Exception as error:
                return self._write(asked, error=_error(error))
            else:
                return self._write(asked, result=result)
        return None

    def _write(self, asked: Asked, **outcome: Any) -> None:
        with self._writing:
            self.results.write(asked, **outcome)
            self._last_answer = time.monotonic()
            self.waiting = ""
            if "result" in outcome:
                self.answered += 1
                return
            self.failed += 1
            if self.max_errors is not None and self.failed >= self.max_errors:
                self.stopped = True
                self.stopping.set()


def _error(error: Exception) -> dict[str, str]:
    kind = type(error).__name__ if isinstance(error, TridentError) else "InvalidLineError"
    if not isinstance(error, TridentError | InputError | ValueError | TypeError):
        kind = type(error).__name__
    return {"type": kind, "message": exits.sentence(error) if isinstance(error, TridentError) else str(error)}


def _tell(options: argparse.Namespace, work: _Work, status: int) -> int:
    """Say what came of a batch."""
    counts = {"answered": work.answered, "failed": work.failed, "skipped": work.skipped, "skipped_failed": work.before}
    if options.json:
        output.document({**counts, "seconds": round(work.seconds, 3), "exit_status": int(status)})
    if not options.quiet:
        text = f"{work.answered} lines answered, {work.failed} failed in {work.seconds:.1f} s"
        if work.skipped:
            text += f"; {work.skipped} were there before" + (f", {work.before} of them failed" if work.before else "")
        if status not in (Exit.DONE, Exit.SOME_FAILED) or work.stopped:
            text += "; the same command goes on"
        if work.failed + work.before and not options.retry_failed:
            text += "; --retry-failed asks the failed ones again"
        exits.say(text)
    return status


@contextlib.contextmanager
def _interruptions() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set in a `with` block.

    They raise nothing there: an exception that comes while a library's callback runs would be lost.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: interrupted.set()) for number in numbers]
    try:
        yield interrupted
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
