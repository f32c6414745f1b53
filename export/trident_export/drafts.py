"""Draft models: which are exported first, what is refused, and how a draft's graph comes into a model's folder.

A draft is another generator of the models file, or a variant of the model itself. Its graph is linked into the version
folder of every variant that it drafts for, so that this holds all that is served, and the disk holds the graph once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from tokenizers import Tokenizer

from trident_export.errors import ModelsFileError
from trident_export.graphs import editing
from trident_export.models_file import ModelSpec, as_installed
from trident_serving.artefacts import DRAFT, VERSION, DraftSettings, version_folder
from trident_serving.generation.drafting import MAX_DRAFT

if TYPE_CHECKING:
    from trident_export.huggingface.folder import HuggingFaceFolder  # which imports torch

_PAST_STATES = "past_states."  # of `graphs.states`, which imports transformers


def first(specs: Sequence[ModelSpec], repository: Path) -> list[ModelSpec]:
    """Models in the order of their export: each behind the one that drafts for it, which is added if it is missing."""
    given = {spec.name: spec for spec in specs}

    def chain(spec: ModelSpec) -> Iterator[ModelSpec]:
        if spec.draft_spec is not None:
            other = spec.draft_spec
            yield from chain(given.get(other.name) or as_installed(other, repository))
        yield spec

    return list({each.name: each for spec in specs for each in chain(spec)}.values())


def check(spec: ModelSpec, source: HuggingFaceFolder, repository: Path) -> None:
    """Refuse another model as the draft that has other tokens, or keeps states.

    Raises:
        ModelsFileError: it has, or does.
    """
    if spec.draft_spec is None:
        return
    drafting = version_folder(repository, spec.draft)
    inputs = onnx.load(str(drafting / "model.onnx"), load_external_data=False).graph.input
    if any(value.name.startswith(_PAST_STATES) for value in inputs):
        raise ModelsFileError(
            f"[{spec.name}]: draft {spec.draft!r} keeps states, from which a token that is refused can't be taken back"
        )
    ours = _tokens(source.fast_tokenizer.backend_tokenizer)
    theirs = _tokens(Tokenizer.from_file(str(drafting / "tokenizer.json")))
    different = [name for name, tokens in ours.items() if theirs[name] != tokens]
    if different:
        raise ModelsFileError(
            f"[{spec.name}]: draft {spec.draft!r} has another {' and other '.join(different)} than this model: a draft "
            "model must have the same tokens, as smaller models of one family mostly do"
        )


def _tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """What gives token ids their meaning."""
    state = json.loads(tokenizer.to_str())
    return {
        "vocabulary": state["model"].get("vocab"),
        "merges": state["model"].get("merges"),
        "added tokens": {token["id"]: token["content"] for token in state["added_tokens"]},
    }


def link(spec: ModelSpec, staging: Path, repository: Path) -> dict[str, str]:
    """Give every variant that is drafted the graph that drafts for it.

    Args:
        staging: where the variants are built.
        repository: where the other model lies.

    Returns:
        The public name of the model that drafts, by variant.
    """
    names = {}
    for variant in spec.variants:
        found = spec.draft_of(variant)
        if found is None:
            continue
        owner, drafting = found
        folder = staging / spec.public_name(variant) / VERSION
        named = owner.public_name(drafting)
        drafts = staging / named / VERSION if owner.name == spec.name else version_folder(repository, named)
        graph = drafts / "model.onnx"
        editing.link(graph, folder / DRAFT / "model.onnx")
        limits = owner.generation
        assert limits is not None
        settings = DraftSettings(named, limits.context, max(limits.prefill_chunk, MAX_DRAFT + 1))
        settings.write(folder / DRAFT)
        names[variant] = settings.name
    return names
