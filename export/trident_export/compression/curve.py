"""Pruned models at several sparsities, each through export and evaluation: `trident-export prune`."""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from trident_export import corpora, tasks
from trident_export.compression import models, pruning
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.measure import quality
from trident_export.models_file import ModelSpec
from trident_export.recipes import Recipe
from trident_serving.artefacts import VERSION

Row = dict[str, float]
_CHUNK = 2**24
ROUNDS = 3


def prune(
    spec: ModelSpec,
    source: HuggingFaceFolder,
    method: pruning.Method,
    sparsities: Sequence[float],
    output: Path,
    variant: str,
    recipe: Recipe,
    calibration: str,
    progress: Callable[[str], None],
) -> tuple[list[Row], list[Path]]:
    """Prune a model to each sparsity and measure the result, and the model itself.

    Args:
        output: where the pruned Hugging Face folders are written, `<method>-<percent>`.
        variant: how they are exported to be measured; `recipe` is its recipe.
        calibration: a file of representative text; "": the packaged texts.

    Returns:
        A row of measures for the model and for each sparsity, and the folders. The measures are those of `evaluate`
        against the model that was not pruned, with `zipped_mib`, the graph's bytes after zlib.

    Raises:
        UsageError, UnsupportedModel: a sparsity or the architecture does not fit the method.
    """
    runs = models.tokenize(source, corpora.calibration(calibration, samples=64, seed=0))
    shares = [0.0]
    folders: list[Path] = []
    for sparsity in sparsities:
        folder = output / name_of(method, sparsity)
        shares.append(pruned(spec, source, method, sparsity, runs, folder))
        folders.append(folder)
        progress(f"{method} {shares[-1]:.3g}: written to {folder}")
    made = [source, *map(HuggingFaceFolder, folders)]
    rows = measured(spec, source, made, variant, recipe, progress)
    return [{"sparsity": share, **row} for share, row in zip(shares, rows, strict=True)], folders


def name_of(method: pruning.Method, sparsity: float) -> str:
    """What the folder of a pruned model is called."""
    return f"{method.replace(':', '-of-')}-{100 * sparsity:.0f}"


def pruned(
    spec: ModelSpec,
    source: HuggingFaceFolder,
    method: pruning.Method,
    sparsity: float,
    runs: pruning.Runs,
    folder: Path,
) -> float:
    """Write the Hugging Face folder of a pruned model; the share that was removed.

    Raises:
        UsageError, UnsupportedModel: a sparsity or the architecture does not fit the method.
    """
    model = models.load(spec, source)
    reached = pruning.prune(model, method, sparsity, runs)
    models.save(model, source, folder)
    return reached


def measured(
    spec: ModelSpec,
    source: HuggingFaceFolder,
    folders: Sequence[HuggingFaceFolder],
    variant: str,
    recipe: Recipe,
    progress: Callable[[str], None],
) -> list[Row]:
    """Export Hugging Face folders and measure them, each by `evaluate` against `source`, with size and speed."""
    probe = dataclasses.replace(spec, variants=(variant,), default_variant=variant, recipes={variant: recipe})
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="trident-prune-") as work:
        built = [Path(work) / str(number) for number in range(len(folders))]
        evaluate: tasks.Evaluator | None = None
        root = Path(work) / "staging"  # the evaluator looks here
        for folder, kept in zip(folders, built, strict=True):
            export(probe, folder, root, progress)
            evaluate = evaluate or tasks.evaluator(probe, source, root)
            (graph,) = quality.graph_folders(probe, variant)
            rows.append({**evaluate(variant), "zipped_mib": zipped_mib(root / graph / VERSION)})
            root.rename(kept)
        progress("measuring speed")
        for row, found in zip(rows, costs(probe, built), strict=True):
            row |= found
    return rows


def export(probe: ModelSpec, folder: HuggingFaceFolder, root: Path, progress: Callable[[str], None]) -> None:
    """Write the Triton models of a spec of one variant from a Hugging Face folder."""
    root.mkdir()
    job = tasks.Job(probe, folder, root, progress)
    tasks.trace(job)
    tasks.write(job, probe.default_variant)
    shutil.rmtree(job.graphs)


def costs(probe: ModelSpec, built: Sequence[Path]) -> list[Row]:
    """Size, memory and speed of the default variant in each folder, medians of rounds.

    Each round runs all, because a machine is faster at some times than at others.
    """
    found: list[list[Row]] = [[] for _ in built]
    for _ in range(ROUNDS):
        for index, folder in enumerate(built):
            found[index].append(quality.cost(probe, probe.default_variant, folder))
    return [{name: statistics.median(cost[name] for cost in each) for name in each[0]} for each in found]


def zipped_mib(folder: Path) -> float:
    """Size of the graphs in a folder after the fastest zlib, MiB: what zeros save."""
    total = 0
    for file in folder.glob("*.onnx*"):
        packer = zlib.compressobj(level=1)
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                total += len(packer.compress(chunk))
        total += len(packer.flush())
    return total / quality.MEBIBYTE


def write(title: str, method: pruning.Method, rows: Sequence[Mapping[str, float]], folder: Path) -> str:
    """Write prune.md, prune.json and prune.svg; returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    table = quality.as_table({title: {f"{row['sparsity']:.3g}": dict(row) for row in rows}}).replace(
        "variant", "taken", 1
    )
    if not method.structured:
        table += (
            "\nZeros make a float32 graph compress better, see zipped_mib; "
            "ONNX Runtime multiplies by them as by any other weight.\n"
        )
    (folder / "prune.md").write_text(table, encoding="utf-8")
    (folder / "prune.json").write_text(json.dumps(list(rows), indent=2) + "\n", encoding="utf-8")
    plot(title, {"": rows}, folder / "prune.svg")
    return table


def plot(title: str, lines: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Error and speed against sparsity, a line of each for every kind of model; "" is not named."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    first = next(iter(lines.values()))[0]
    error = next(name for name in ("kl", "mean_cosine", "agreement") if name in first)
    speed = next(name for name in quality.SPEEDS if name in first)
    figure, left = pyplot.subplots(figsize=(6, 4))
    right = left.twinx()
    for (name, rows), mark in zip(lines.items(), "os^", strict=False):
        taken = [row["sparsity"] for row in rows]
        left.plot(taken, [row[error] for row in rows], f"{mark}-", color="tab:red", label=name)
        right.plot(taken, [row[speed] for row in rows], f"{mark}--", color="tab:blue")
    left.set_xlabel("sparsity")
    left.set_ylabel(error, color="tab:red")
    right.set_ylabel(quality.SPEEDS[speed], color="tab:blue")
    if any(lines):
        left.legend()
    left.set_title(title)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
