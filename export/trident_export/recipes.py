"""Recipes: how a variant is made from the float32 graph. They are data, `recipes.toml`; the passes are in `passes`."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from importlib import resources
from pathlib import Path

import onnx_ir as ir

from trident_export.errors import ModelsFileError, NoMatmuls, UsageError
from trident_export.graphs.editing import link, save, save_beside, scratch
from trident_export.graphs.editing import load as load_graph
from trident_export.passes import PASSES, RENAMED_KEYS, RENAMED_PASSES, Cache, CalibrationRuns, Pass, Rotate
from trident_export.passes.base import matmuls
from trident_export.processors import Processor
from trident_serving.errors import ReadingError
from trident_serving.schema import reading

FILE = "recipes.toml"


class Kind(StrEnum):
    """A graph's kind, which decides between the passes of a recipe.

    Both graphs of translation and summarization are made by a recipe's `seq2seq` passes, or by those for decoders where
    it has none.
    """

    DECODER = "decoder"
    SEQ2SEQ = "seq2seq"
    ENCODER = "encoder"


@dataclass(frozen=True)
class Recipe:
    """How a variant is made.

    Attributes:
        precision: the variant whose default gate holds.
        size: the variant's bytes as a share of the float32 graph's, at most.
        passes: by kind of graph, in order; a kind that is not here has no such variant.
        name: of the table that the passes are from.
        processors: the recipe whose passes are in the place of these on some processors, by its name.
    """

    precision: str
    size: float
    passes: Mapping[Kind, tuple[Pass, ...]]
    name: str = field(default="", repr=False)  # not in the representation, which decides whether an artefact is current
    processors: Mapping[Processor, str] = field(default_factory=dict, repr=False)

    def on(self, processor: Processor, known: Mapping[str, Recipe], kind: Kind) -> Recipe:
        """The recipe that is in the place of this one on a processor, for a kind of graph.

        Args:
            known: all recipes, by name.
        """
        other = known.get(self.processors.get(processor, ""))
        steps = other.passes.get(kind) if other is not None else None
        if other is None or steps is None:
            return self
        if kind == Kind.SEQ2SEQ and steps is other.passes.get(Kind.DECODER):
            return self  # it has none of its own
        return replace(self, passes={**self.passes, kind: steps}, name=other.name)

    def check(self, name: str, kind: Kind, device: str) -> None:
        """Refuse what can't be made or makes no sense.

        Raises:
            ModelsFileError: the recipe is for another kind of model, or one of its passes not for this device.
        """
        if kind not in self.passes:
            raise ModelsFileError(f"variant {name} is for {' and '.join(self.passes)} models, this is {kind}")
        for step in self.passes[kind]:
            if device in step.refused:
                raise ModelsFileError(f"variant {name} makes no sense on device {device}: {step.refused[device]}")


def load(folder: Path | None = None) -> dict[str, Recipe]:
    """Recipes by variant: the built-in ones, and those of `recipes.toml` in a folder, which replace built-in ones.

    Raises:
        ModelsFileError: a file says something impossible.
    """
    built_in = (resources.files("trident_export") / FILE).read_text(encoding="utf-8")
    recipes = parse(built_in, FILE)
    own = folder / FILE if folder is not None else None
    if own is not None and own.is_file():
        recipes |= parse(own.read_text(encoding="utf-8"), str(own))
    for name, recipe in recipes.items():
        for other in recipe.processors.values():
            if other not in recipes or recipes[other].processors:
                raise ModelsFileError(f"[{name}] processors: {other!r} must be another recipe, one without processors")
    return recipes


def parse(text: str, where: str) -> dict[str, Recipe]:
    """Recipes of a file's text.

    Raises:
        ModelsFileError: a key or pass is unknown, or a value is impossible.
    """
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not all of it is a TOMLDecodeError
        raise ModelsFileError(f"{where} is not TOML: {error}") from None
    return {name: _recipe(f"{where} [{name}]", name, table) for name, table in tables.items()}


def _recipe(where: str, name: str, table: object) -> Recipe:
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise ModelsFileError(f"{where}: a variant's name has only lower-case letters, digits and '_'")
    known = ("precision", "size", "processors", *Kind)
    if not isinstance(table, dict) or not set(table) <= set(known) or not set(Kind) & set(table):
        raise ModelsFileError(f"{where} must be a table of {', '.join(known)}, with {' or '.join(Kind)} among them")
    size, precision = table.get("size", 1.0), table.get("precision", name)
    if not isinstance(size, float) or not 0 < size <= 1 or not isinstance(precision, str):
        raise ModelsFileError(f"{where}: size must be a number up to 1.0 and precision a variant's name")
    for kind in Kind:
        if not isinstance(table.get(kind, []), list):
            raise ModelsFileError(f"{where} {kind} must be a list of passes, found {table[kind]!r}")
    passes = {
        kind: tuple(_pass(f"{where} {kind}[{index}]", step) for index, step in enumerate(table[kind]))
        for kind in Kind
        if kind in table
    }
    if Kind.DECODER in passes:
        passes.setdefault(Kind.SEQ2SEQ, passes[Kind.DECODER])
    if any(isinstance(step, Cache) for steps in passes.values() for step in steps[:-1]):
        raise ModelsFileError(f"{where}: cache must be the last pass, since the others run the float32 cache")
    if any(isinstance(step, Rotate) for steps in passes.values() for step in steps[1:]):
        raise ModelsFileError(f"{where}: rotate must be the first pass, since it changes all matmuls")
    return Recipe(precision, size, passes, name, _processors(where, table.get("processors", {})))


def _processors(where: str, table: object) -> Mapping[Processor, str]:
    known = list(Processor)
    if not isinstance(table, dict) or not set(table) <= set(known):
        raise ModelsFileError(f"{where} processors must be a table of {', '.join(known)}, found {table!r}")
    if not all(isinstance(name, str) for name in table.values()):
        raise ModelsFileError(f"{where} processors must name recipes, found {table!r}")
    return {Processor(processor): name for processor, name in table.items()}


def _pass(where: str, table: object) -> Pass:
    name = table.get("pass") if isinstance(table, dict) else None
    if not isinstance(table, dict) or not isinstance(name, str) or name not in {**PASSES, **RENAMED_PASSES}:
        raise ModelsFileError(f"{where}: pass must be one of {', '.join(PASSES)}, found {table!r}")
    kind = PASSES[_current(where, name, RENAMED_PASSES)]
    known = [field.name for field in fields(kind)]
    renamed = {old: new for old, new in RENAMED_KEYS.items() if new in known and new not in table}
    values = {_current(where, key, renamed): value for key, value in table.items() if key != "pass"}
    try:
        return reading.read(kind, values, where, positive=False)
    except ReadingError as error:
        raise ModelsFileError(str(error)) from None
    except (UsageError, re.error) as error:
        raise ModelsFileError(f"{where}: {error}") from None


def _current(where: str, name: str, renamed: Mapping[str, str]) -> str:
    """A name as it is today; one of the last release comes with a warning."""
    if name in renamed:
        new = renamed[name]
        print(f"trident-export: {where}: {name} is called {new} now, the old name goes away", file=sys.stderr)
    return renamed.get(name, name)


def transform(model: ir.Model, passes: Sequence[Pass], runs: CalibrationRuns | None = None) -> ir.Model:
    """The model after some passes; the one that is given may be changed.

    Args:
        runs: inputs of the graph, for passes that look at activations.

    Raises:
        NoMatmuls: the passes are for matmuls, some are not kept, and none took one: the architecture has no such.
    """
    if not passes:
        return model
    names = matmuls(model)
    left, taken = list(names), 0
    for step in passes:
        chosen = [name for name in left if re.search(step.nodes, name)]
        model, done = step.apply(model, chosen, runs)
        left = [name for name in left if name not in done]
        taken += len(done) if step.for_matmuls else 0
    if not taken and (left or not names) and any(step.for_matmuls for step in passes):
        some = ", ".join(names[:4]) or "none"
        raise NoMatmuls(f"the recipe fits no matmul of this architecture; its matmuls are {some} ...")
    return model


def apply(
    recipe: Recipe,
    kind: Kind,
    graph: Path,
    target: Path,
    runs: CalibrationRuns | None = None,
    finish: Callable[[ir.Model], None] | None = None,
) -> None:
    """Write `target` (weights in `<target>.data`) from the float32 graph at `graph`; see `transform`.

    Args:
        finish: changes the model behind all passes, but none of its large weights.
    """
    if not recipe.passes[kind]:
        if finish is None:
            link(graph, target)
        else:
            model = load_graph(graph)
            finish(model)
            save_beside(model, graph, target)
        return
    with scratch():
        model = transform(load_graph(graph), recipe.passes[kind], runs)
        if finish is not None:
            finish(model)
        save(model, target)


def as_toml(steps: Sequence[Pass]) -> str:
    """Passes as recipes.toml has them."""
    names = {kind: name for name, kind in PASSES.items()}
    shown = []
    for step in steps:
        values = {field.name: getattr(step, field.name) for field in fields(step)}
        changed = {field.name: values[field.name] for field in fields(step) if values[field.name] != field.default}
        keys = {"pass": names[type(step)], **changed}
        shown.append("{ " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in keys.items()) + " }")
    return "[\n" + "".join(f"    {text},\n" for text in shown) + "]"
