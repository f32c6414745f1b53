"""`trident top`: what the models of a server do now, from its metrics."""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from trident_client import TridentError, UnavailableError
from trident_client._settings import Address
from trident_client.cli import connection, extras, metrics, output
from trident_client.cli.exits import Exit
from trident_client.cli.metrics import Generator, Reader, Sample, Snapshot

URL = "TRIDENT_METRICS_URL"
PORT = 8002
_WINDOW = 30.0  # seconds over which the live view counts latencies
_ASKING = 2.0  # seconds for what is only an ornament


def add(command: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    command.add_argument(
        "--metrics-url",
        metavar="URL",
        help=f"page of the metrics (default ${URL}, or port {PORT} of the server that --url names)",
    )
    command.add_argument(
        "--interval", type=connection.seconds, default=1.0, metavar="SECONDS", help="between samples (default 1)"
    )
    command.add_argument("--once", action="store_true", help="print one snapshot, as to no terminal")
    command.add_argument("--all", action="store_true", help="the stages and variants of models, too")
    output.add(command, lines=True)


def run(options: argparse.Namespace) -> int:
    """Show the models until Ctrl-C, or once."""
    with extras.installed("trident top"):
        import prometheus_client.parser  # noqa: F401
        import rich  # noqa: F401
    page = _Page(options)
    try:
        if options.jsonl:
            return page.lines()
        if options.json or options.once or not sys.stdout.isatty():
            return page.once(options.json)
        return page.live()
    except KeyboardInterrupt:
        return Exit.DONE  # that is how a live view ends


def metrics_url(options: argparse.Namespace) -> str:
    """Where the metrics are."""
    given: str | None = options.metrics_url or os.environ.get(URL)
    if given is None:
        address = Address.parse(connection.urls(options)[0], False)
        # For gRPC "host:port", perhaps behind a resolver ("dns:///"); for HTTP a URL, perhaps with a path.
        host = address.target.split("/")[2] if address.protocol == "http" else address.target.rpartition("/")[2]
        host = re.sub(r"^(dns|ipv4|ipv6):|:\d+$", "", host)
        given = f"{host}:{PORT}"
    if "://" not in given:
        given = f"http://{given}"
    return given if given.count("/") > 2 else f"{given}/metrics"


class _Page:
    """The metrics of one server."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._url = metrics_url(options)
        self._slots: dict[str, int] = {}
        self._asked: set[str] = set()
        arguments = connection.arguments(options)
        self._headers = dict(arguments["headers"] or {})
        if arguments["api_key"]:
            self._headers["authorization"] = f"Bearer {arguments['api_key']}"

    def sample(self) -> Sample:
        """The metrics now."""
        ca = None if self._options.ca is None else str(self._options.ca)
        text = metrics.fetch(self._url, self._headers, ca, min(self._options.timeout or 10.0, 10.0))
        return metrics.read(text, time.monotonic())

    def compared(self, new: Sample, old: Sample, since: Sample) -> Snapshot:
        """What happened between samples."""
        for _ in range(2):
            found = metrics.compare(new, old, self._slots, latencies=since, stages=self._options.all)
            unknown = [model.model for model in found.generators if model.model not in self._asked]
            if not unknown:
                break
            self._ask_slots(unknown)
        return found

    def _ask_slots(self, models: list[str]) -> None:
        """How many slots models have, which no metric tells; a server that doesn't say is not asked again."""
        self._asked.update(models)
        with contextlib.suppress(TridentError, ValueError), connection.client(self._options) as client:
            for model in models:
                slots = client.parameters(model, timeout=_ASKING).get("slots", "")
                if slots.isdecimal():
                    self._slots[model] = int(slots)

    def once(self, as_json: bool) -> int:
        """Print one snapshot: rates over an interval, latencies since the server started."""
        old = self.sample()
        time.sleep(self._options.interval or 1.0)
        new = self.sample()
        found = self.compared(new, old, Sample(0.0))
        if as_json:
            output.document({"url": self._url, **output.plain(found)})
        else:
            from rich.console import Console

            console = Console(width=None if sys.stdout.isatty() else 160)
            console.print(_view(found, self._url, "since the server started", console.width))
        return Exit.DONE

    def lines(self) -> int:
        """Print a snapshot an interval, as JSON Lines, until Ctrl-C."""
        old = self.sample()
        while True:
            time.sleep(self._options.interval or 1.0)
            new = self.sample()
            told = {"time": datetime.now().astimezone().isoformat(timespec="seconds"), "url": self._url}
            output.rows([told | output.plain(self.compared(new, old, old))])
            old = new

    def live(self) -> int:
        """Show the models until Ctrl-C; a server that goes away is waited for."""
        from rich.console import Group
        from rich.live import Live
        from rich.text import Text

        samples = collections.deque([self.sample()])
        note = f"of the last {_WINDOW:g} s"
        shown: Any = Text("counting ...")
        with Live(shown, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(self._options.interval or 1.0)
                try:
                    samples.append(self.sample())
                except UnavailableError as error:
                    live.update(Group(Text(str(error), style="bold red"), shown), refresh=True)
                    continue
                while len(samples) > 2 and samples[-1].at - samples[1].at >= _WINDOW:
                    samples.popleft()
                found = self.compared(samples[-1], samples[-2], samples[0])
                shown = _view(found, self._url, note, live.console.width)
                live.update(shown, refresh=True)


def _view(found: Snapshot, url: str, note: str, width: int) -> Any:
    """The tables, in so many columns of the terminal."""
    from rich.console import Group
    from rich.text import Text

    head = Text.assemble((url, "bold"), f"   {datetime.now():%H:%M:%S}", f"   latencies and shares {note}")
    if found.cpu is not None:
        head.append(f"   CPU {found.cpu:.0%}")
    for number, use in enumerate(found.gpu.values()):
        head.append(f"   GPU {number} {use:.0%}")
    parts: list[Any] = [head]
    if found.generators:
        parts.append(_table("generators", GENERATOR_COLUMNS, found.generators, width))
    if found.readers:
        parts.append(_table("other models", READER_COLUMNS, found.readers, width))
    if len(parts) == 1:
        parts.append(Text("no model has metrics"))
    return Group(*parts)


def _table(title: str, columns: Mapping[str, Callable[[Any], str]], rows: Sequence[Any], width: int) -> Any:
    """A table; where it is too wide, the columns of `_FIRST_TO_GO` are left out, one after the other."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    cells = {name: [show(row) for row in rows] for name, show in columns.items()}
    wide = {name: max(len(name), *(len(Text.from_markup(cell)) for cell in its)) + 3 for name, its in cells.items()}
    for name in _FIRST_TO_GO:
        if sum(wide.values()) <= width:
            break
        wide.pop(name, None)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in wide:
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for row in zip(*(cells[name] for name in wide), strict=True):
        table.add_row(*row)
    return table


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.0f}ms" if value < 1 else f"{value:.1f}s"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _rate(value: float) -> str:
    return "-" if value == 0 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _count(value: int, style: str = "red") -> str:
    return f"[{style}]{value}[/]" if value else "0"


_FIRST_TO_GO = (
    *("restarts", "drafts", "KV tok", "gone", "queue p99", "texts/run", "prefix", "ITL p99", "full", "req/s"),
    *("mean queue", "TTFT p50", "failed", "ITL p50"),
)
GENERATOR_COLUMNS: dict[str, Callable[[Generator], str]] = {
    "model": lambda row: row.model,
    "run": lambda row: str(row.requests_running),
    "wait": lambda row: _count(row.requests_waiting, "yellow"),
    "slots": lambda row: f"{row.slots_used}" if row.slots is None else f"{row.slots_used}/{row.slots}",
    "req/s": lambda row: _rate(row.requests_per_second),
    "tok/s": lambda row: _rate(row.tokens_per_second),
    "TTFT p50": lambda row: _seconds(row.first_token.p50),
    "TTFT p99": lambda row: _seconds(row.first_token.p99),
    "ITL p50": lambda row: _seconds(row.inter_token.p50),
    "ITL p99": lambda row: _seconds(row.inter_token.p99),
    "queue p99": lambda row: _seconds(row.queue.p99),
    "KV tok": lambda row: str(row.kv_cache_tokens),
    "prefix": lambda row: _share(row.prefix_reused),
    "drafts": lambda row: _share(row.drafts_accepted),
    "failed": lambda row: _count(row.failed),
    "full": lambda row: _count(row.rejected),
    "gone": lambda row: _count(row.cancelled, "default"),
    "restarts": lambda row: _count(row.loop_restarts, "bold red"),
}
READER_COLUMNS: dict[str, Callable[[Reader], str]] = {
    "model": lambda row: row.model,
    "wait": lambda row: _count(row.waiting, "yellow"),
    "req/s": lambda row: _rate(row.requests_per_second),
    "texts/s": lambda row: _rate(row.texts_per_second),
    "texts/run": lambda row: "-" if row.batch is None else f"{row.batch:.1f}",
    "mean": lambda row: _seconds(row.mean_request),
    "mean queue": lambda row: _seconds(row.mean_queue),
    "failed": lambda row: _count(row.failed),
}
