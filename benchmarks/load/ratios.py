"""Ratios of a run, and how they differ from stored ones.

A ratio says the same on a fast and on a slow machine, and in a quiet and in a busy minute: both of its measurements are
of one round. docs/decisions/0055 gives the reasons.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.load.doors import GRPC
from benchmarks.load.figures import Figures, Run
from benchmarks.load.session import DRIVER

Ratios = dict[str, dict[str, float]]


def ratios(runs: Mapping[Run, Sequence[Figures]]) -> Ratios:
    """By model and name: the throughput of a door over that of gRPC, and with the most streams over that with one.

    Each is the median over the rounds. Runs of other drivers, and with random arrivals, are left out.
    """
    own = {run: several for run, several in runs.items() if run.driver == DRIVER and run.streams is not None}
    found: Ratios = {}
    for run, several in own.items():
        names = found.setdefault(run.model, {})
        base = own.get(Run(run.model, run.task, DRIVER, GRPC, run.streams))
        if run.door != GRPC and base:
            names[f"{run.door}/grpc at {run.streams}"] = _median(several, base)
        one = own.get(Run(run.model, run.task, DRIVER, run.door, 1))
        if run.streams != 1 and one:
            names[f"{run.door}: {run.streams} at a time/1"] = _median(several, one)
    return {model: dict(sorted(names.items())) for model, names in sorted(found.items()) if names}


def _median(upper: Sequence[Figures], lower: Sequence[Figures]) -> float:
    """Of the ratios of each round; 0 where nothing was answered."""
    pairs = zip(upper, lower, strict=True)
    return statistics.median(
        above.requests_per_second / below.requests_per_second if below.requests_per_second else 0.0
        for above, below in pairs
    )


@dataclass(frozen=True)
class Stored:
    """What a file holds.

    Attributes:
        processor: on which the ratios were measured, by its name.
        cores: that it had.
        tokens: of a generated answer.
    """

    processor: str
    cores: int
    tokens: int
    ratios: Ratios

    def on_this_machine(self) -> bool:
        """Whether processor and cores are this machine's."""
        return (self.processor, self.cores) == (processor(), os.cpu_count() or 1)


def processor() -> str:
    """The name of this machine's processor."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return "unknown"


def load(path: Path) -> Stored:
    """Read a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is none of these files.
    """
    content: Any = json.loads(path.read_text(encoding="utf-8"))
    try:
        return Stored(**content)
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from None


def store(path: Path, found: Ratios, tokens: int) -> None:
    """Write a file with the ratios of this machine."""
    rounded = {model: {name: round(value, 3) for name, value in names.items()} for model, names in found.items()}
    kept = Stored(processor(), os.cpu_count() or 1, tokens, rounded)
    path.write_text(json.dumps(vars(kept), indent=2) + "\n", encoding="utf-8")


def differences(stored: Ratios, found: Ratios, tolerance: float) -> list[str]:
    """A sentence for each ratio that is another one than before.

    Args:
        stored: of the models that were to be measured.
        found: of those that were.
        tolerance: the share of a stored ratio by which one may differ, to either side: one that rose may be one whose
            other measurement fell.
    """
    told = []
    for model, names in stored.items():
        for name, before in names.items():
            now = found.get(model, {}).get(name)
            if now is None:
                told.append(f"{model}: {name} was not measured, {before:.2f} is stored")
            elif abs(now - before) > tolerance * before:
                told.append(
                    f"{model}: {name} is {now:.2f}, {before:.2f} is stored, and the tolerance is {tolerance:.0%}"
                )
    for model, names in found.items():
        new = sorted(names.keys() - stored.get(model, {}).keys())
        if new:
            told.append(f"{model}: nothing is stored for {', '.join(new)}")
    return told
