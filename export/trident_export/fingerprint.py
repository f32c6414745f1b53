"""What an artefact depends on, as one digest: another digest means another artefact, so the model is exported again.

It covers the table of models.toml, the source, the draft model, the calibration texts, the packages that trace and
quantize, the format of artefacts, and the exporter's own modules that make or gate the artefact. Those are found from
the model's task and the passes of its recipes by their imports, and enter by their syntax trees without docstrings: a
comment or a sentence in a docstring exports nothing again.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import json
from dataclasses import replace
from pathlib import Path

from trident_export import tasks
from trident_export.errors import TextError
from trident_export.huggingface import sources
from trident_export.models_file import ModelSpec
from trident_serving.artefacts import FORMAT
from trident_serving.schema.limits import GenerationLimits

_PACKAGES = ("onnx", "onnx-ir", "onnxruntime", "tokenizers", "torch", "transformers")
_ROOT = Path(__file__).parent
# Modules that decide nothing about an artefact: what is said meanwhile, whether there is room, how the tables are read
# (what they say counts by itself), and the list of all passes.
_OUTSIDE = frozenset({"disk", "errors", "memory", "models_file", "passes", "progress", "quiet", "report"})
# It applies passes, and imports all of them to read recipes: only those of the model's own recipes count.
_NOT_FOLLOWED = frozenset({"recipes"})
# It imports what traces image towers, and counts for generators that have one.
_FOR_IMAGES = "tasks.image_parts"


def fingerprint(spec: ModelSpec, base: Path) -> str:
    """The digest of everything that the artefacts of a spec depend on.

    Args:
        base: the folder of the models file, where relative paths start.

    Raises:
        TextError: the calibration text can't be read.
    """
    parts: list[object] = [FORMAT, spec.as_dict()]
    if not spec.template:
        calibration = hashlib.sha256(_content(Path(spec.calibration))).hexdigest() if spec.calibration else corpus()
        parts += [calibration, sources.identity(spec, base), [code(module) for module in sorted(makers(spec))]]
        parts += [f"{package}=={importlib.metadata.version(package)}" for package in _PACKAGES]
    if spec.draft:
        parts.append(code("drafts"))
    if spec.draft_spec is not None:
        parts.append(fingerprint(_graph_only(spec.draft_spec, spec.draft), base))
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()


def _graph_only(spec: ModelSpec, public_name: str) -> ModelSpec:
    """A generator with all that decides the graph of one variant, and nothing else."""
    (variant,) = (each for each in spec.variants if spec.public_name(each) == public_name)
    limits = spec.generation
    assert limits is not None
    return replace(
        spec,
        variants=(variant,),
        default_variant=variant,
        limits=GenerationLimits(
            context=limits.context,
            prefill_chunk=limits.prefill_chunk,
            device=limits.device,
            images=limits.images,
            image_tokens=limits.image_tokens,
        ),
        on_demand=False,
        gates={},
        draft="",
        draft_spec=None,
        recipes={variant: spec.recipes[variant]},
    )


def makers(spec: ModelSpec) -> frozenset[str]:
    """The exporter's modules, by their names in the package, that make or gate the artefacts of a spec."""
    passes = {type(step).__module__ for recipe in spec.recipes.values() for step in recipe.passes[spec.kind]}
    found: set[str] = set()
    waiting = [tasks.module_name(spec), *passes]
    images = spec.generation is not None and spec.generation.images > 0
    while waiting:
        module = waiting.pop().removeprefix("trident_export.")
        if module not in found and module not in _OUTSIDE and (images or module != _FOR_IMAGES):
            found.add(module)
            waiting += imports(module) if module not in _NOT_FOLLOWED else ()
    return frozenset(found)


@functools.cache
def imports(module: str) -> frozenset[str]:
    """The modules of this package that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trident_export":
            package = (node.module or "").removeprefix("trident_export").removeprefix(".")
            names = [f"{package}.{alias.name}".removeprefix(".") for alias in node.names]
            found |= {name if _file(name) is not None else package for name in names}
    return frozenset(found - {""})


@functools.cache
def code(module: str) -> str:
    """A digest of what a module does: its syntax tree without docstrings, comments and layout."""
    tree = _tree(module)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            first = body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = body[1:]
    return hashlib.sha256(f"{module}\0{ast.dump(tree)}".encode()).hexdigest()


@functools.cache
def corpus() -> str:
    """A digest of the packaged texts that variants are calibrated and measured with."""
    digest = hashlib.sha256()
    for file in sorted((_ROOT / "corpus").rglob("*")):
        if file.is_file():
            digest.update(file.relative_to(_ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _file(module: str) -> Path | None:
    path = _ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _tree(module: str) -> ast.Module:
    file = _file(module)
    assert file is not None, module
    return ast.parse(file.read_text(encoding="utf-8"))


def _content(calibration: Path) -> bytes:
    try:
        return calibration.read_bytes()
    except OSError as error:
        raise TextError(f"the calibration text {calibration} can't be read: {error.strerror}") from None
