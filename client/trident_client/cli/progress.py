"""Says on standard error how far long work is: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from trident_client.cli import exits

PERIOD = 30.0  # seconds between two lines


class Counts(Protocol):
    """What is counted."""

    answered: int
    failed: int
    skipped: int
    waiting: str


@contextlib.contextmanager
def shown(what: str, total: int | None, quiet: bool) -> Iterator[Callable[[Counts], None]]:
    """Gives a function that shows how far the work is.

    Args:
        what: is counted.
        total: how many there are; None: that isn't known.
        quiet: whether nothing is shown.
    """
    if quiet:
        yield lambda counts: None
    elif sys.stderr.isatty() and (rich := _rich()) is not None:
        with rich(what, total) as show:
            yield show
    else:
        yield _Lines(what, total).show


class _Lines:
    def __init__(self, what: str, total: int | None) -> None:
        self._what = what
        self._of = "" if total is None else f" of {total}"
        self._next = time.monotonic() + PERIOD

    def show(self, counts: Counts) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + PERIOD
        done = counts.answered + counts.failed + counts.skipped
        waiting = f"; {counts.waiting}" if counts.waiting else ""
        exits.say(f"{done}{self._of} {self._what}, {counts.failed} failed{waiting}")


def _rich() -> Any:
    """The bar; None without rich."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        return None

    @contextlib.contextmanager
    def bar(what: str, total: int | None) -> Iterator[Callable[[Counts], None]]:
        columns = (
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("[red]{task.fields[failed]}[/] [yellow]{task.fields[waiting]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(what, total=total, rate="", failed="", waiting="")
            began = time.monotonic()

            def show(counts: Counts) -> None:
                asked = counts.answered + counts.failed
                progress.update(
                    task,
                    completed=asked + counts.skipped,
                    rate=f"{asked / max(time.monotonic() - began, 1e-9):.1f}/s",
                    failed=f"{counts.failed} failed" if counts.failed else "",
                    waiting=counts.waiting[:60],
                )

            yield show

    return bar
