"""A model within a budget: pruned as little as the budget asks, then trained as the student of what it was.

Sizes are counted from the shapes of weights. Times are measured on the exported graph: the model itself and a candidate
in turn, first the one with the most removed, then where the line through both meets the budget.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from trident_export import corpora
from trident_export.compression import curve, distillation, layouts, models, pruning
from trident_export.compression.methods import Method
from trident_export.errors import UsageError
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.measure import quality
from trident_export.models_file import ModelSpec
from trident_export.recipes import Recipe
from trident_export.training import run

Row = dict[str, float]
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9}
WHOLE, STAGES = "whole", ("pruned", "trained")
_MOST_TRIALS = 4  # exports that a search for a latency makes, after the first


@dataclass(frozen=True)
class Budget:
    """What a compressed model may have or take.

    Attributes:
        what: "parameters" or "latency": milliseconds of a step of eight sequences, or of a batch of eight texts.
        limit: the most; a share of the model's own where `relative`.
    """

    what: str
    limit: float
    relative: bool

    @classmethod
    def read(cls, what: str, text: str) -> Budget:
        """A budget as it is written: "110M", "0.2B", "80%", or milliseconds for a latency.

        Raises:
            UsageError: it is none.
        """
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB%]?)", text.strip(), re.IGNORECASE | re.ASCII)
        unit = found[2].upper() if found else ""
        if not found or not float(found[1]) or (what == "latency" and unit not in ("", "%")):
            examples = "110M, or 80%" if what == "parameters" else "12.5, in milliseconds, or 80%"
            raise UsageError(f"--{what} must be a number like {examples}, found {text!r}")
        if unit == "%":
            return cls(what, float(found[1]) / 100, True)
        return cls(what, float(found[1]) * _UNITS[unit], False)

    def of(self, whole: float) -> float:
        """The most, for a model that has `whole` itself.

        Raises:
            UsageError: the model is within it as it is.
        """
        limit = self.limit_of(whole)
        if limit >= whole:
            shown = f"{whole:,.0f} parameters" if self.what == "parameters" else f"{whole:.3g} ms"
            raise UsageError(f"the model has {shown}, which is within the budget: nothing is left to do")
        return limit

    def limit_of(self, whole: float) -> float:
        """The same, unchecked."""
        return self.limit * whole if self.relative else self.limit


@dataclass(frozen=True)
class Removable:
    """What a method can take from a model.

    Attributes:
        total: how many units: layers, groups of heads, or columns of each layer.
        step: units that go together.
        size: parameters of a unit.
        parameters: of the whole model.
    """

    total: int
    step: int
    size: int
    parameters: int

    @property
    def most(self) -> int:
        """The most units that can be removed."""
        return (self.total - 1) // self.step * self.step

    def within(self, limit: float) -> int:
        """The fewest units by whose removal the model has at most so many parameters.

        Raises:
            UsageError: all that can be removed are too few.
        """
        wanted = math.ceil((self.parameters - limit) / self.size / self.step) * self.step
        if wanted > self.most:
            left = self.parameters - self.most * self.size
            raise UsageError(
                f"a budget of {limit:,.0f} parameters can't be met: with all removed that can be, {left:,} are left"
            )
        return wanted


def removable(model: PreTrainedModel, method: Method) -> Removable:
    """What a structured method can take from a model.

    Raises:
        UnsupportedModel: the architecture is not known, or has no heads that can be removed.
    """
    layers, layout, config = layouts.layers_of(model), layouts.layout_of(model), model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if method is Method.LAYERS:
        return Removable(len(layers), 1, min(_numbers(layer) for layer in layers), parameters)
    if method is Method.COLUMNS:
        width = layouts.matrix(layers[0].get_submodule(layout.outer)).shape[1]
        size = sum(_of_each(layer, layout.inner, (layout.outer,), width) for layer in layers)
        return Removable(width, pruning.GROUP if width % pruning.GROUP == 0 else 1, size, parameters)
    pruning.check_heads(model)
    rows = (layout.queries, layout.keys, layout.values)
    size = sum(_of_each(layer, rows, (layout.joined,), config.num_key_value_heads) for layer in layers)
    return Removable(config.num_key_value_heads, 1, size, parameters)


def _numbers(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


def _of_each(layer: nn.Module, rows: Sequence[str], columns: Sequence[str], units: int) -> int:
    """Numbers that belong to one of `units` equal parts of some matmuls: outputs with their biases, or inputs."""
    found = 0
    for name in (*rows, *columns):
        module = layer.get_submodule(name)
        found += layouts.matrix(module).numel()
        if name in rows and isinstance(module.bias, torch.Tensor):
            found += module.bias.numel()
    return found // units


def compress(
    spec: ModelSpec,
    source: HuggingFaceFolder,
    method: Method,
    budget: Budget,
    points: int,
    texts: Sequence[str],
    output: Path,
    settings: distillation.Settings,
    variant: str,
    recipe: Recipe,
    progress: Callable[[str], None],
) -> tuple[dict[str, Row], Path]:
    """Prune a model to a budget and train what is left; the same at smaller sparsities, for the curve.

    Args:
        points: of the curve, evenly up to the budget's sparsity; each is pruned, measured, trained and measured.
        texts: to learn from.
        output: the students' folders are written there, `<method>-<percent>`.
        variant: how models are exported to be measured; `recipe` is its recipe.

    Returns:
        A row of measures for the model, and one for each sparsity before and after training; and the folder of the
        student that is within the budget.

    Raises:
        UsageError, TextError, UnsupportedModel: the budget, the text or the architecture does not allow it.
    """
    if run.processes() > 1:
        raise UsageError("compress measures times, and so runs in one process: distill runs in several")
    if points < 1:
        raise UsageError(f"--points must be 1 or more, found {points}")
    if not method.structured:
        raise UsageError(f"{method} makes no graph smaller or faster: choose {', '.join(Method.standard())}")
    runs = models.tokenize(source, corpora.calibration(spec.calibration, samples=64, seed=0))
    model = models.load(spec, source)
    found = removable(model, method)
    del model
    if not found.most:
        raise UsageError(f"nothing can be removed by {method}: the model has {found.total} of them")
    probe = dataclasses.replace(spec, variants=(variant,), default_variant=variant, recipes={variant: recipe})

    def prune(units: int, folder: Path) -> HuggingFaceFolder:
        curve.pruned(spec, source, method, units / found.total, runs, folder)
        return HuggingFaceFolder(folder)

    if budget.what == "parameters":
        units = found.within(budget.of(found.parameters))
    else:
        units = _within_latency(probe, source, found, budget, prune, progress)
    progress(f"the budget asks for {units} of {found.total} {method} to go")
    steps = [_stepped(units * (point + 1) / points, found.step) for point in range(points)]
    chosen = {curve.name_of(method, removed / found.total): removed for removed in steps if removed}
    rows: dict[str, Row] = {WHOLE: {"sparsity": 0.0, "parameters_m": found.parameters / 1e6}}
    for name in chosen:
        models.check_output(output / name)
    made = [source]
    try:
        for name, removed in chosen.items():
            before = _before(output, name)
            made.append(prune(removed, before))
            # A student that is a number of layers knows which of its teacher's each of them was.
            begun = str(found.total - removed) if method is Method.LAYERS else str(before)
            distillation.distill(spec, source, begun, texts, output / name, settings, progress, spec.calibration)
            made.append(HuggingFaceFolder(output / name))
            left = (found.parameters - removed * found.size) / 1e6
            for stage in STAGES:
                rows[f"{name}, {stage}"] = {"sparsity": removed / found.total, "parameters_m": left}
        measured = curve.measured(spec, source, made, variant, recipe, progress)
    finally:
        for name in chosen:
            shutil.rmtree(_before(output, name), ignore_errors=True)
    for row, measures in zip(rows.values(), measured, strict=True):
        row |= measures | {"step_ms": _milliseconds(measures)}
    return rows, made[-1].path


def _before(output: Path, name: str) -> Path:
    """Where a pruned model lies until its student is done; a run that goes on looks for it by this name."""
    return output / f"{name}-pruned"


def _stepped(units: float, step: int) -> int:
    return round(units / step) * step


def _within_latency(
    probe: ModelSpec,
    source: HuggingFaceFolder,
    found: Removable,
    budget: Budget,
    prune: Callable[[int, Path], HuggingFaceFolder],
    progress: Callable[[str], None],
) -> int:
    """The fewest units, as far as few trials tell, by whose removal a step takes no longer than the budget."""
    with tempfile.TemporaryDirectory(prefix="trident-budget-") as work:
        root = Path(work)
        curve.export(probe, source, root / "whole", progress)

        def measure(units: int) -> tuple[float, float]:
            """Milliseconds of the model and of a candidate, both of now."""
            curve.export(probe, prune(units, root / "folder"), root / "candidate", progress)
            whole, candidate = map(_milliseconds, curve.costs(probe, [root / "whole", root / "candidate"]))
            shutil.rmtree(root / "candidate")
            progress(f"with {units} of {found.total} removed a step takes {candidate:.3g} ms instead of {whole:.3g}")
            return whole, candidate

        slow, fast = 0, found.most
        whole, taken = measure(fast)
        limit = budget.of(whole)
        if taken > limit:
            raise UsageError(
                f"a budget of {limit:.3g} ms can't be met: with all removed that can be, a step takes {taken:.3g} ms"
            )
        above, below = whole - limit, limit - taken
        for _ in range(_MOST_TRIALS):
            if fast - slow <= found.step:
                break
            guess = slow + (fast - slow) * above / (above + below)
            units = min(max(math.ceil(guess / found.step) * found.step, slow + found.step), fast - found.step)
            whole, taken = measure(units)
            limit = budget.limit_of(whole)
            if taken <= limit:
                fast, below = units, limit - taken
            else:
                slow, above = units, taken - limit
        return fast


def write(title: str, rows: Mapping[str, Row], folder: Path) -> str:
    """Write compress.md, compress.json and compress.svg; returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    table = quality.as_table({title: dict(rows)}).replace("variant", "model", 1)
    (folder / "compress.md").write_text(table, encoding="utf-8")
    (folder / "compress.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    lines = {stage: [row for name, row in rows.items() if name == WHOLE or name.endswith(stage)] for stage in STAGES}
    curve.plot(title, lines, folder / "compress.svg")
    return table


def _milliseconds(measures: Row) -> float:
    """Of a step, or of a batch of texts."""
    speed = next(measures[name] for name in quality.SPEEDS if name in measures)
    return 1000 * quality.BATCH / speed
