"""Writes the results of a soak: findings, tables, a plot. A run without findings has passed."""

from __future__ import annotations

import json
import platform
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.soak import verdict
from benchmarks.soak.session import Outcome
from benchmarks.soak.verdict import Fit
from benchmarks.soak.watch import Series
from benchmarks.soak.workers import Entry

# The launcher's promise: the server has ended this long after the last answer.
STOP_SECONDS = 3.0
# The outcomes that no call may have.
FAULTY = {
    "error": "a good request saw an error",
    "wrong": "an answer is wrong",
    "unexpected": "a bad request is answered otherwise than it should",
}
EXAMPLES = 3
# A generator returns the memory of its cache and takes it again, so the memory of a shorter run depends on its prompts.
FIT_SECONDS = 300.0


def fits(outcome: Outcome) -> dict[str, Fit]:
    """The lines through all series of processes that lived all the time, by "what of process"."""
    found = {}
    end = outcome.watch.shared[0][-1] if outcome.watch.shared[0] else 0.0
    for name, several in outcome.watch.series.items():
        lived = several[-1]
        if len(several) > 1 or not lived.times or lived.times[-1] < 0.9 * end:
            continue
        for unit, values in _units(lived):
            if fit := verdict.fit(lived.times, values, unit):
                found[f"{unit} of {name}"] = fit
    if fit := verdict.fit(*outcome.watch.shared, "shared memory"):
        found["shared memory of the server"] = fit
    return found


def _units(series: Series) -> Iterator[tuple[str, list[float]]]:
    yield "memory", series.memory
    yield "threads", series.threads
    yield "files", series.files


def findings(outcome: Outcome, *, short: bool = False) -> list[str]:
    """Everything that is wrong, one line each.

    Args:
        short: the run is too short to tell whether a series is flat, or for a model that is reloaded all the time to
            have answered in every way.
    """
    found = []
    by_kind: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in outcome.entries:
        if entry.outcome in FAULTY:
            by_kind[entry.outcome, entry.kind].append(entry)
    for (kind, name), several in by_kind.items():
        seen = Counter(entry.detail for entry in several).most_common(EXAMPLES)
        examples = "; ".join(f"{detail[:400]} ({count})" for detail, count in seen)
        found.append(f"{FAULTY[kind]}, {len(several)} times, {name}: {examples}")
    found += [f"{name} is {value:g} at the end, expected 0" for name, value in outcome.left.items()]
    found += [f"restarted: {line}" for line in outcome.restarts]
    found += [f"the launcher says: {line}" for line in outcome.mended]
    found += [f"traffic failed: {line}" for line in outcome.failed_workers]
    found += [f"nothing was verified of: {kind}" for kind in _never_good(outcome, short)]
    if outcome.stop_seconds is not None:
        if outcome.stop_status:
            found.append(f"the launcher ended with status {outcome.stop_status}, expected 0")
        if outcome.stop_seconds > STOP_SECONDS:
            found.append(f"the stop took {outcome.stop_seconds:.1f} s, the limit is {STOP_SECONDS:g} s")
    for name, fit in fits(outcome).items() if not short and outcome.seconds >= FIT_SECONDS else ():
        if not fit.flat:
            found.append(f"{name} rises by {_amount(name, fit.rise)}, the limit is {_amount(name, fit.limit)}")
    return found


def _never_good(outcome: Outcome, short: bool) -> list[str]:
    """Kinds of traffic without a successful call; in a short run without those whose model was always away."""
    kinds = Counter(entry.kind for entry in outcome.entries)
    away = Counter(entry.kind for entry in outcome.entries if entry.outcome == "away")
    right = Counter(entry.kind for entry in outcome.entries if entry.outcome in ("good", "refused", "known", "done"))
    return sorted(kind for kind in kinds if not right[kind] and not (short and kinds[kind] == away[kind])) or (
        [] if kinds else ["any kind of traffic"]
    )


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Everything but the calls themselves."""
    return {
        "machine": {"processor": platform.processor() or platform.machine(), "system": platform.platform()},
        "seconds": outcome.seconds,
        "findings": findings(outcome),
        "outcomes": Counter(entry.outcome for entry in outcome.entries),
        "calls": {kind: Counter(e.outcome for e in several) for kind, several in _by_kind(outcome).items()},
        "left": outcome.left,
        "restarts": outcome.restarts,
        "mended": outcome.mended,
        "stop": {"seconds": outcome.stop_seconds, "status": outcome.stop_status},
        "fits": {name: vars(fit) | {"flat": fit.flat} for name, fit in fits(outcome).items()},
        "series": {name: [vars(each) for each in several] for name, several in outcome.watch.series.items()},
        "shared_memory": outcome.watch.shared,
    }


def as_markdown(outcome: Outcome) -> str:
    """The report that a person reads."""
    found = findings(outcome)
    count = outcome.count
    lines = [
        "# Soak",
        "",
        f"{outcome.seconds / 60:.1f} minutes of mixed traffic, {len(outcome.entries)} calls. "
        + ("**Nothing was found.**" if not found else f"**{len(found)} findings.**"),
        "",
        *(f"- {line}" for line in found),
        "",
        "| what | count | must be |",
        "|---|---:|---:|",
        f"| good answers, each verified | {count('good')} | |",
        f"| errors that good requests saw | {count('error')} | 0 |",
        f"| wrong answers | {count('wrong')} | 0 |",
        f"| bad requests refused as they should be | {count('refused')} | |",
        f"| bad requests refused with tritonserver's own wrong code (500 of its JSON parser) | {count('known')} | |",
        f"| bad requests answered otherwise | {count('unexpected')} | 0 |",
        f"| calls broken off, models unloaded and loaded | {count('done')} | |",
        f"| requests of a model that was away meanwhile ({', '.join(outcome.reloaded)}) | {count('away')} | |",
        f"| slots and requests left at the end | {sum(outcome.left.values()):g} | 0 |",
        f"| processes restarted | {len(outcome.restarts) + len(outcome.mended)} | 0 |",
    ]
    if outcome.stop_seconds is not None:
        lines += [
            f"| seconds of the stop | {outcome.stop_seconds:.1f} | {STOP_SECONDS:g} |",
            f"| exit status | {outcome.stop_status} | 0 |",
        ]
    return "\n".join([*lines, "", *_resources(outcome), "", *_calls(outcome)]) + "\n"


def _resources(outcome: Outcome) -> list[str]:
    lines = [
        "## Memory, threads, files",
        "",
        f"A line is fitted to the samples after the first third. It is flat if it then rises by no more than "
        f"{verdict.ALLOWED['memory'] / 2**20:.0f} MiB of memory, {verdict.ALLOWED['threads']:g} threads, "
        f"{verdict.ALLOWED['files']:g} open files, {verdict.ALLOWED['shared memory'] / 2**20:.0f} MiB of shared "
        f"memory, or {verdict.ALLOWED_SHARE:.1%} of the level, where that is more.",
        "",
        "| | level | rise | an hour | limit | |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name, fit in fits(outcome).items():
        cells = [_amount(name, value) for value in (fit.level, fit.rise, fit.slope_per_hour, fit.limit)]
        lines.append(f"| {name} | {' | '.join(cells)} | {'flat' if fit.flat else '**rises**'} |")
    renewed = {name: len(several) for name, several in outcome.watch.series.items() if len(several) > 1}
    if renewed:
        text = ", ".join(f"{name} ({count} processes seen)" for name, count in renewed.items())
        lines += ["", f"Not fitted, because they were unloaded and loaded: {text}."]
    return [*lines, "", "![memory over time](soak.svg)"]


def _calls(outcome: Outcome) -> list[str]:
    lines = [
        "## Calls",
        "",
        "| kind | calls | outcomes | median s | longest s |",
        "|---|---:|---|---:|---:|",
    ]
    for kind, several in sorted(_by_kind(outcome).items()):
        ends = ", ".join(f"{name} {count}" for name, count in Counter(e.outcome for e in several).items())
        seconds = [entry.seconds for entry in several]
        lines.append(f"| {kind} | {len(several)} | {ends} | {statistics.median(seconds):.2f} | {max(seconds):.2f} |")
    return lines


def _by_kind(outcome: Outcome) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = defaultdict(list)
    for entry in outcome.entries:
        found[entry.kind].append(entry)
    return found


def _amount(name: str, value: float) -> str:
    return f"{value / 2**20:.1f} MiB" if "memory" in name else f"{value:.1f}"


def plot(outcome: Outcome, path: Path) -> None:
    """Resident memory of each process, and shared memory, over time."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    for name, several in outcome.watch.series.items():
        color = None
        for series in several:
            minutes = [moment / 60 for moment in series.times]
            label = name if color is None else None
            (line,) = axes.plot(minutes, [value / 2**20 for value in series.memory], label=label, color=color)
            color = line.get_color()
    times, sizes = outcome.watch.shared
    axes.plot([moment / 60 for moment in times], [size / 2**20 for size in sizes], "k--", label="shared memory")
    axes.set_xlabel("minutes")
    axes.set_ylabel("memory, MiB")
    axes.set_yscale("log")
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def write(outcome: Outcome, folder: Path) -> None:
    """Write soak.json, soak.md and soak.svg."""
    folder.mkdir(exist_ok=True)
    (folder / "soak.json").write_text(json.dumps(as_json(outcome), indent=1) + "\n")
    (folder / "soak.md").write_text(as_markdown(outcome))
    plot(outcome, folder / "soak.svg")
