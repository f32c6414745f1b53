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
    probe = dataclasses.replace(spec, variants=(variant,), default_variant=variant, recipes={variant: recipe})
    rows: list[Row] = []
    folders: list[Path] = []
    with tempfile.TemporaryDirectory(prefix="trident-prune-") as work:
        root = Path(work) / "staging"
        evaluate: tasks.Evaluator | None = None
        for sparsity in (0.0, *sparsities):
            folder, reached = source.path, 0.0
            if sparsity:
                model = models.load(spec, source)
                reached = pruning.prune(model, method, sparsity, runs)
                folder = output / f"{method.replace(':', '-of-')}-{100 * sparsity:.0f}"
                models.save(model, source, folder)
                folders.append(folder)
                progress(f"{method} {reached:.3g}: written to {folder}")
            root.mkdir()
            job = tasks.Job(probe, HuggingFaceFolder(folder), root, progress)
            tasks.trace(job)
            tasks.write(job, variant)
            shutil.rmtree(job.graphs)
            evaluate = evaluate or tasks.evaluator(probe, source, root)
            (graph,) = quality.graph_folders(probe, variant)
            zipped = {"zipped_mib": zipped_mib(root / graph / VERSION)}
            rows.append({"sparsity": reached, **evaluate(variant), **zipped})
            root.rename(Path(work) / str(len(rows)))
        progress("measuring speed")
        built = [Path(work) / str(number + 1) for number in range(len(rows))]
        costs: list[list[Row]] = [[] for _ in rows]
        for _ in range(ROUNDS):  # round by round, because a machine is faster at some times than at others
            for index, folder in enumerate(built):
                costs[index].append(quality.cost(probe, variant, folder))
    for row, found in zip(rows, costs, strict=True):
        row |= {name: statistics.median(cost[name] for cost in found) for name in found[0]}
    return rows, folders


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
    _plot(title, rows, folder / "prune.svg")
    return table


def _plot(title: str, rows: Sequence[Mapping[str, float]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    error = next(name for name in ("kl", "mean_cosine", "agreement") if name in rows[0])
    speed = next(name for name in quality.SPEEDS if name in rows[0])
    figure, left = pyplot.subplots(figsize=(6, 4))
    taken = [row["sparsity"] for row in rows]
    left.plot(taken, [row[error] for row in rows], "o-", color="tab:red")
    left.set_xlabel("sparsity")
    left.set_ylabel(error, color="tab:red")
    right = left.twinx()
    right.plot(taken, [row[speed] for row in rows], "s--", color="tab:blue")
    right.set_ylabel(quality.SPEEDS[speed], color="tab:blue")
    left.set_title(title)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
