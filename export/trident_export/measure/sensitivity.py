"""How much each part of a model loses by a recipe: `trident-export sensitivity MODEL --variant V`.

The recipe is applied to one group of matmuls at a time, the rest stays float32, and the result is measured as its gate
would. What comes out names the matmuls that a recipe should keep.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import onnx_ir as ir

from trident_export import recipes, tasks
from trident_export.errors import NoMatmuls, UsageError
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.models_file import ModelSpec
from trident_export.passes import Pass
from trident_export.passes.base import Keep
from trident_export.passes.base import matmuls as matmuls_of
from trident_export.passes.cache import Cache
from trident_export.passes.embedding import Embedding
from trident_export.passes.rotate import Rotate
from trident_export.recipes import Kind, Recipe

PROBE = "probe"
# How a measure becomes a loss: the first that was measured, and its best value.
_LOSSES = {"kl": 0.0, "mean_cosine": 1.0, "score_error": 0.0}
_LAYER = re.compile(r"^(.*?(?:layers?|block|h)[./]\d+)")


class Grouping(StrEnum):
    """What is quantized at a time: a layer, every matmul of one kind, or one matmul."""

    LAYER = "layer"
    KIND = "kind"
    MATMUL = "matmul"

    @classmethod
    def _missing_(cls, value: object) -> Grouping | None:
        if value != "product":
            return None
        print("trident-export: --by product is called --by matmul now, the old name goes away", file=sys.stderr)
        return cls.MATMUL


@dataclass(frozen=True)
class Loss:
    """What one group of matmuls loses.

    Attributes:
        group: the layer, kind or matmul.
        matmuls: names of its matmuls.
        loss: KL, 1 - mean cosine, or score error, with only this group quantized.
        measure: which of the three.
    """

    group: str
    matmuls: list[str]
    loss: float
    measure: str


def analyze(
    spec: ModelSpec,
    source: HuggingFaceFolder,
    recipe: Recipe,
    grouping: Grouping,
    progress: Callable[[str], None],
    texts: Sequence[str] | None = None,
) -> list[Loss]:
    """The loss of each group, the largest first.

    Args:
        recipe: what is applied.
        texts: to measure with; None: the packaged ones that nothing is calibrated on.

    Raises:
        NoMatmuls, UsageError: no matmul takes the recipe.
    """
    kind = spec.kind
    with tempfile.TemporaryDirectory(prefix="trident-sensitivity-") as folder:
        job = tasks.Job(probing(spec, recipe, kind, None), source, Path(folder), progress)
        tasks.trace(job)
        names = [name for file in sorted(job.graphs.glob("*.onnx")) for name in matmuls_of(ir.load(file))]
        if not any(step.for_matmuls for step in recipe.passes[kind]):
            raise UsageError("the recipe quantizes nothing: name another with --variant")
        evaluate: tasks.Evaluator | None = None
        losses = []
        groups = group(names, grouping)
        for number, (label, matmuls) in enumerate(groups.items()):
            probe = probing(spec, recipe, kind, matmuls)
            try:
                tasks.write(dataclasses.replace(job, spec=probe), PROBE)
            except NoMatmuls:
                continue  # the recipe does not quantize them
            evaluate = evaluate or tasks.evaluator(probe, source, job.staging, texts)
            measured = evaluate(PROBE)
            measure = next(name for name in _LOSSES if name in measured)
            losses.append(Loss(label, matmuls, abs(measured[measure] - _LOSSES[measure]), measure))
            progress(f"{number + 1} of {len(groups)}: {label}: {measure} {measured[measure]:.6g}")
    if not losses:
        raise NoMatmuls(f"the recipe quantizes no matmul of {spec.name}")
    return sorted(losses, key=lambda loss: -loss.loss)


def group(names: Sequence[str], grouping: Grouping) -> dict[str, list[str]]:
    """Matmuls by group, in the order of the graph."""
    groups: dict[str, list[str]] = {}
    for name in names:
        found = _LAYER.match(name)
        label = name
        if grouping is Grouping.LAYER:
            label = found[1].strip("/") if found else name.strip("/")
        elif grouping is Grouping.KIND:
            label = (name[found.end() :] if found else name).strip("/").removesuffix("/MatMul")
        groups.setdefault(label, []).append(name)
    return groups


def kept(variant: str, recipe: Recipe, kind: Kind, losses: Sequence[Loss], count: int) -> str:
    """A table for recipes.toml that leaves the most sensitive groups in float32 and does the rest as before."""
    names = [name for loss in losses[:count] for name in loss.matmuls]
    keep = Keep(nodes=f"^({'|'.join(map(re.escape, names))})$")
    steps = recipes.as_toml(_with(keep, recipe.passes[kind]))
    return f'[{variant}_kept]\nprecision = "{recipe.precision}"\n{kind} = {steps}\n'


def _with(keep: Keep, steps: Sequence[Pass]) -> tuple[Pass, ...]:
    """A recipe's passes after one that keeps matmuls; a rotation is of all matmuls and comes first."""
    first = 1 if steps and isinstance(steps[0], Rotate) else 0
    return (*steps[:first], keep, *steps[first:])


def as_table(losses: Sequence[Loss]) -> str:
    """A Markdown table, a row for each group."""
    measure = losses[0].measure
    title = f"1 - {measure}" if _LOSSES[measure] else measure
    rows = [f"| {loss.group} | {len(loss.matmuls)} | {loss.loss:.4g} |" for loss in losses]
    return "\n".join([f"| quantized | matmuls | {title} |", "|---|---:|---:|", *rows, ""])


def as_json(losses: Sequence[Loss]) -> str:
    """The same for programs."""
    return json.dumps([dataclasses.asdict(loss) for loss in losses], indent=2) + "\n"


def probing(spec: ModelSpec, recipe: Recipe, kind: Kind, matmuls: Sequence[str] | None) -> ModelSpec:
    """The spec with one variant, whose recipe quantizes only some matmuls."""
    steps: Mapping[Kind, tuple[Pass, ...]] = recipe.passes
    if matmuls is not None:
        others = "|".join(re.escape(name) for name in matmuls)
        # Embedding tables and the cache are no matmuls: their loss would be in every group's.
        wanted = [step for step in recipe.passes[kind] if not isinstance(step, Embedding | Cache)]
        steps = {kind: _with(Keep(nodes=f"^(?!({others})$)"), wanted)}
    probe = dataclasses.replace(recipe, passes=steps)
    return dataclasses.replace(spec, variants=(PROBE,), default_variant=PROBE, recipes={PROBE: probe})
