"""Writes reports/load.json, load.md and load.svg."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.load.figures import Figures, Percentiles, Run
from benchmarks.load.ratios import processor, ratios
from benchmarks.load.session import DRIVER, Found, Settings
from benchmarks.load.workloads import Generation


@dataclass(frozen=True)
class Machine:
    """Where it was measured.

    Attributes:
        busy: processes that ran or waited to run when it began, on average over a minute (the load average).
    """

    processor: str
    cores: int
    busy: float

    @classmethod
    def here(cls) -> Machine:
        """This machine, now."""
        return cls(processor(), os.cpu_count() or 1, os.getloadavg()[0])


def median(rounds: Sequence[Figures]) -> Figures:
    """The rounds of one measurement as one: medians of rates and times, sums of counts."""

    def middle(values: Sequence[float | None]) -> float | None:
        given = [value for value in values if value is not None]
        return statistics.median(given) if given else None

    def spread(name: str) -> Percentiles | None:
        given = [getattr(each, name) for each in rounds if getattr(each, name) is not None]
        return {key: statistics.median(each[key] for each in given if each) for key in given[0]} if given else None

    first = rounds[0]
    return Figures(
        *(first.model, first.task, first.driver, first.door, first.streams, first.rate),
        requests=sum(each.requests for each in rounds),
        wrong=None if first.wrong is None else sum(each.wrong or 0 for each in rounds),
        full=sum(each.full for each in rounds),
        failed=sum(each.failed for each in rounds),
        requests_per_second=statistics.median(each.requests_per_second for each in rounds),
        tokens_per_second=middle([each.tokens_per_second for each in rounds]),
        latency=spread("latency") or {},
        first_token=spread("first_token"),
        inter_token=spread("inter_token"),
        goodput=middle([each.goodput for each in rounds]),
    )


def as_json(found: Found, settings: Settings, machine: Machine) -> dict[str, Any]:
    """Everything that was measured."""
    return {
        "machine": asdict(machine),
        "settings": asdict(settings),
        "runs": [
            asdict(median(rounds)) | {"rounds": [asdict(each) for each in rounds]} for rounds in found.runs.values()
        ],
        "ratios": ratios(found.runs),
        "left_out": found.left_out,
        "faults": found.faults,
    }


def as_markdown(found: Found, settings: Settings, machine: Machine) -> str:
    """The report that a person reads."""
    own = [figures for run, rounds in found.runs.items() if run.driver == DRIVER for figures in rounds]
    compared, wrong = sum(each.requests for each in own), sum(each.wrong or 0 for each in own)
    lines = [
        "# Load",
        "",
        f"{machine.processor}, {machine.cores} cores; {machine.busy:.1f} processes were running or waiting before. "
        f"Callers and server share them. Each measurement took {settings.seconds:g} s, {settings.rounds} times over; "
        f"generated answers have {settings.tokens} tokens. Times are in milliseconds.",
        "",
        f"{compared} answers were compared with those of lone requests, to the last bit; {wrong} were others. "
        f"Goodput is the share of requests with the right answer and {settings.limits.told()}.",
    ]
    for title, sentences in (("Faults", found.faults), ("Left out", found.left_out)):
        if sentences:
            lines += ["", f"## {title}", "", *(f"- {sentence}" for sentence in sentences)]
    for model in found.workloads:
        mine = [median(rounds) for run, rounds in found.runs.items() if run.model == model]
        if mine:
            lines += ["", f"## {model} ({mine[0].task})", "", *_table(mine)]
    lines += ["", "## Ratios of throughput", "", "| model | ratio | |", "|---|---|---:|"]
    lines += [
        f"| {model} | {name} | {value:.2f} |"
        for model, names in ratios(found.runs).items()
        for name, value in names.items()
    ]
    return "\n".join([*lines, "", "![throughput and latency](load.svg)"]) + "\n"


def _table(every: Sequence[Figures]) -> list[str]:
    streamed = any(each.first_token for each in every)
    head = ["driver", "door", "requests", "answered", "full, failed", "requests/s"]
    head += ["tokens/s", "first token p50", "p99", "between tokens p50", "p99"] if streamed else []
    head += ["latency p50", "p90", "p99", "goodput"]
    lines = [f"| {' | '.join(head)} |", "|---|---|---|" + "---:|" * (len(head) - 3)]
    for each in every:
        how = f"{each.rate:g} a second, at random" if each.streams is None else f"{each.streams} at a time"
        cells = [each.driver, each.door, how, str(each.requests), f"{each.full}, {each.failed}"]
        cells.append(f"{each.requests_per_second:.1f}")
        if streamed:
            cells.append(_cell(each.tokens_per_second))
            cells += [_cell((each.first_token or {}).get(key)) for key in ("p50", "p99")]
            cells += [_cell((each.inter_token or {}).get(key)) for key in ("p50", "p99")]
        cells += [_cell(each.latency.get(key)) for key in ("p50", "p90", "p99")]
        cells.append("" if each.goodput is None else f"{each.goodput:.0%}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def plot(found: Found, path: Path) -> None:
    """Throughput and waits over the streams, a row for each model and a line for each door."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    models = list(found.workloads)
    figure, axes = pyplot.subplots(len(models), 2, figsize=(10, 3 * len(models)), squeeze=False)
    for model, (left, right) in zip(models, axes, strict=True):
        generates = isinstance(found.workloads[model], Generation)
        for door, mine in _by_door(found, model).items():
            streams = [each.streams for each in mine]
            speeds = [each.tokens_per_second if generates else each.requests_per_second for each in mine]
            waits = [(each.first_token if generates else each.latency) or {} for each in mine]
            (line,) = left.plot(streams, speeds, "o-", label=door)
            for key, style in (("p50", "o-"), ("p99", "o--")):
                values = [wait.get(key, float("nan")) for wait in waits]
                right.plot(streams, values, style, color=line.get_color(), label=f"{door} {key}")
        left.set_ylabel("tokens/s" if generates else "requests/s")
        right.set_ylabel("first token, ms" if generates else "latency, ms")
        left.set_title(model, fontsize=10)
        for each in (left, right):
            each.set_xlabel("requests at a time")
            each.set_ylim(bottom=0)
            if each.get_legend_handles_labels()[0]:
                each.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _by_door(found: Found, model: str) -> dict[str, list[Figures]]:
    """The medians of our own driver, by door, with rising numbers of streams."""
    by_door: dict[str, list[Figures]] = {}
    runs: list[Run] = [
        run for run in found.runs if run.model == model and run.driver == DRIVER and run.streams is not None
    ]
    for run in sorted(runs, key=lambda run: run.streams or 0):
        by_door.setdefault(run.door, []).append(median(found.runs[run]))
    return by_door


def write(found: Found, settings: Settings, machine: Machine, folder: Path) -> None:
    """Write the three files."""
    folder.mkdir(exist_ok=True)
    content = json.dumps(as_json(found, settings, machine), indent=2)
    (folder / "load.json").write_text(content + "\n", encoding="utf-8")
    (folder / "load.md").write_text(as_markdown(found, settings, machine), encoding="utf-8")
    if found.workloads:
        plot(found, folder / "load.svg")
