"""One evaluation: every variant of a model asked for its answers to a file of examples, and compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trident_client import Client
from trident_export.errors import UsageError
from trident_export.evaluation import asking, intervals, measures
from trident_export.evaluation.datasets import Dataset
from trident_export.evaluation.intervals import Difference, Interval


def evaluate(
    client: Client, task: str, models: Sequence[str], data: Dataset, baseline: str, resamples: int = intervals.RESAMPLES
) -> dict[str, Any]:
    """Figures of each model with their intervals, and the differences from the baseline's.

    Args:
        models: public names; served by the server that the client asks.
        baseline: one of them.

    Raises:
        TextError: see `asking.answers`.
        UsageError: the baseline is none of the models.
    """
    if baseline not in models:
        raise UsageError(f"the baseline {baseline} is none of {', '.join(models)}")
    found = {model: measures.of(data, asking.answers(client, task, model, data)) for model in models}
    weights = intervals.resamples(len(data.examples), resamples)
    figures = {
        model: {measure.name: intervals.interval(measure, weights) for measure in each} for model, each in found.items()
    }
    apart = {
        model: {
            mine.name: intervals.difference(mine, base, weights)
            for mine, base in zip(each, found[baseline], strict=True)
        }
        for model, each in found.items()
        if model != baseline
    }
    return {
        "dataset": str(data.path),
        "examples": len(data.examples),
        "task": task,
        "baseline": baseline,
        "higher_is_better": {measure.name: measure.higher for measure in found[baseline]},
        "models": figures,
        "differences": _adjusted(apart),
    }


def _adjusted(apart: Mapping[str, Mapping[str, Difference]]) -> dict[str, dict[str, Difference]]:
    """The same with p-values adjusted for the number of models that are compared by a measure."""
    adjusted: dict[str, dict[str, Difference]] = {model: {} for model in apart}
    for name in next(iter(apart.values()), {}):
        values = intervals.holm([each[name].p for each in apart.values()])
        for (model, each), p in zip(apart.items(), values, strict=True):
            adjusted[model][name] = Difference(each[name].interval, p)
    return adjusted


def as_table(found: Mapping[str, Any]) -> str:
    """Markdown: a table of the figures, and one of the differences."""
    names = list(found["higher_is_better"])
    lines = [
        f"## {found['dataset']}: {found['examples']} examples, {found['task']}",
        "",
        "Figures with their 95 % bootstrap intervals over the examples.",
        "",
        f"| model | {' | '.join(names)} |",
        "|---|" + "---:|" * len(names),
    ]
    for model, figures in found["models"].items():
        lines.append(f"| {model} | {' | '.join(_shown(figures[name]) for name in names)} |")
    if not found["differences"]:
        return "\n".join(lines) + "\n"
    lines += [
        "",
        f"Differences from {found['baseline']} on the same examples: a paired bootstrap, p adjusted by Holm's method.",
        "",
        "| model | measure | difference | p | |",
        "|---|---|---:|---:|---|",
    ]
    for model, differences in found["differences"].items():
        for name, each in differences.items():
            lines.append(
                f"| {model} | {name} | {_shown(each.interval, '+')} | {each.p:.4f} "
                f"| {_verdict(each, found['higher_is_better'][name])} |"
            )
    return "\n".join(lines) + "\n"


def _shown(interval: Interval, sign: str = "") -> str:
    return f"{interval.value:{sign}.4g} [{interval.low:{sign}.4g}, {interval.high:{sign}.4g}]"


def _verdict(found: Difference, higher: bool) -> str:
    if found.p >= 1 - intervals.LEVEL:
        return "no difference shown"
    return "better" if (found.interval.value > 0) == higher else "worse"


def write(found: Mapping[str, Any], folder: Path) -> str:
    """Write evaluation.json and evaluation.md into a folder; returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    table = as_table(found)
    plain = dict(found) | {
        "models": {model: {name: asdict(each) for name, each in row.items()} for model, row in found["models"].items()},
        "differences": {
            model: {name: asdict(each) for name, each in row.items()} for model, row in found["differences"].items()
        },
    }
    (folder / "evaluation.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    (folder / "evaluation.md").write_text(table, encoding="utf-8")
    return table
