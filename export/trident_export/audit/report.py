"""One audit as Markdown and JSON, and whether it stays within limits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trident_client import Client, TridentError
from trident_export.audit import measuring
from trident_export.audit.cases import Cases
from trident_export.audit.measuring import Gap, Shift
from trident_export.errors import TextError, UsageError


@dataclass(frozen=True)
class Audit:
    """What was found, by model and axis."""

    task: str
    baseline: str
    sentences: int
    gaps: Mapping[str, Mapping[str, Sequence[Gap]]]
    shifts: Mapping[str, Mapping[str, Sequence[Shift]]]


def check(task: str) -> None:
    """Refuse a task that has no audit.

    Raises:
        UsageError: it has none.
    """
    if task not in measuring.TASKS:
        raise UsageError(f"{task} models have no audit; {' and '.join(measuring.TASKS)} have one")


def audit(client: Client, task: str, models: Sequence[str], cases: Cases, baseline: str) -> Audit:
    """Ask a server about every model.

    Raises:
        UsageError: the task has no audit, or the baseline is none of the models.
        TextError: the server refuses a text, or can't be asked.
    """
    check(task)
    if baseline not in models:
        raise UsageError(f"the baseline {baseline} is none of {', '.join(models)}")
    try:
        gaps, shifts = measuring.audit(client, task, models, cases, baseline)
    except TridentError as error:
        raise TextError(f"the server says: {error}") from error
    count = len(cases.sentences if task == measuring.CLASSIFYING else cases.endings)
    return Audit(task, baseline, count, gaps, shifts)


def as_table(found: Audit) -> str:
    """Markdown: the gaps of each model, and what variants change."""
    unit = "probabilities" if found.task == measuring.CLASSIFYING else "nats"
    lines = [
        f"## {found.baseline}: gaps between groups, in {unit}",
        "",
        f"{found.sentences} sentences for each group. Intervals are 95 %, over the sentences; p is against groups that",
        "are exchanged at random.",
        "",
        "| model | axis | score | gap | p | highest | lowest |",
        "|---|---|---|---:|---:|---|---|",
    ]
    for model, axes in found.gaps.items():
        for axis, gaps in axes.items():
            for each in gaps:
                ends = sorted(each.means.items(), key=lambda pair: pair[1])
                (lowest, low), (highest, high) = ends[0], ends[-1]
                lines.append(
                    f"| {model} | {axis} | {each.score} | {each.value:.3g} [{each.low:.3g}, {each.high:.3g}] "
                    f"| {each.p:.4f} | {highest} {high:+.3g} | {lowest} {low:+.3g} |"
                )
    if found.shifts:
        lines += [
            "",
            f"What a variant changes of {found.baseline}:",
            "",
            "| model | axis | score | gap | largest change of a group's mean |",
            "|---|---|---|---:|---:|",
        ]
        for model, shifted in found.shifts.items():
            lines += [
                f"| {model} | {axis} | {each.score} | {each.gap:+.3g} [{each.low:+.3g}, {each.high:+.3g}] "
                f"| {each.largest:.3g} |"
                for axis, shifts in shifted.items()
                for each in shifts
            ]
    return "\n".join(lines) + "\n"


def beyond(found: Audit, max_gap: float | None, max_shift: float | None) -> list[str]:
    """What is beyond the limits, a sentence each; a gap counts where chance explains it in less than one case of 20."""
    told = []
    for model, axes in found.gaps.items():
        for axis, gaps in axes.items():
            told += [
                f"{model}: the gap of {axis} in {each.score} is {each.value:.3g}, at most {max_gap:g} is allowed"
                for each in gaps
                if max_gap is not None and each.value > max_gap and each.p < 0.05
            ]
    for model, shifted in found.shifts.items():
        for axis, shifts in shifted.items():
            told += [
                f"{model} moves a group's mean of {axis} in {each.score} by {each.largest:.3g} from that of "
                f"{found.baseline}, at most {max_shift:g} is allowed"
                for each in shifts
                if max_shift is not None and each.largest > max_shift
            ]
    return told


def write(found: Audit, folder: Path) -> str:
    """Write audit.json and audit.md into a folder; returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    table = as_table(found)
    (folder / "audit.json").write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
    (folder / "audit.md").write_text(table, encoding="utf-8")
    return table
