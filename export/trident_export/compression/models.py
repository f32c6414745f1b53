"""Hugging Face folders as torch models that can be changed, and back."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trident_export import disk
from trident_export.errors import NoSpace, NotWritable, UsageError
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.models_file import ModelSpec
from trident_export.tasks import encoders, text_generation

# Tokens of a text that is looked at.
LONGEST = 128
_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json", "*.gguf", "*.onnx", "*.h5", "*.msgpack")


def load(spec: ModelSpec, source: HuggingFaceFolder) -> PreTrainedModel:
    """The model of a spec in float32, in evaluation mode.

    Raises:
        UsageError: models of this kind can't be compressed.
    """
    if spec.generation:
        return text_generation.load_model(source)
    if spec.encoder:
        return source.load(encoders.of(spec.task).head)
    raise UsageError(f"{spec.name} is for {spec.task}: only encoders and decoders can be pruned or distilled")


def tokenize(source: HuggingFaceFolder, texts: Sequence[str], longest: int = LONGEST) -> list[dict[str, torch.Tensor]]:
    """A run of the model for each text."""
    tokenizer: PreTrainedTokenizerBase = source.tokenizer
    return [dict(tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")) for text in texts]


def check_output(folder: Path) -> None:
    """A model's folder is replaced; anything else is somebody's.

    Raises:
        NotWritable: there is a file of that name, or a folder with other things.
    """
    disk.require_folder(folder.parent)
    empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not empty and not (folder / "config.json").is_file():
        raise NotWritable(f"{folder} is there and is no model's folder: name another one, or remove it")


def save(model: PreTrainedModel, source: HuggingFaceFolder, folder: Path) -> None:
    """Write a Hugging Face folder: the model, and every other file of its source but the weights.

    It appears complete or not at all.

    Raises:
        NoSpace, NotWritable: the disk has too little room, or is another user's; nothing is left of it.
    """
    check_output(folder)
    wanted = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) + 2**26
    with disk.writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(folder.parent).free
    if room < wanted:
        raise NoSpace(f"the model needs {wanted / 2**20:.0f} MiB in {folder.parent}, {room / 2**20:.0f} MiB are free")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with disk.writing(folder.parent):
            shutil.copytree(source, partial, ignore=shutil.ignore_patterns(*_WEIGHTS))
            model.save_pretrained(partial)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def table(spec: ModelSpec, name: str, folder: Path, variant: str) -> str:
    """A table of models.toml for a compressed model: the original's, with another name and source.

    Its variants are `variant`, by which it was measured, and float32 where the original has that: what others get
    wrong on the new weights their gates have to say.
    """
    kept = spec.as_dict()["limits"].items()
    if spec.generation:  # of a model with images its text part is written
        kept = [(key, value) for key, value in kept if not key.startswith("image")]
    limits = ", ".join(f"{key} = {_toml(value)}" for key, value in kept)
    chosen = [variant, *(each for each in spec.variants if each == "fp32" != variant)]
    variants = ", ".join(f'"{each}"' for each in chosen)
    prompts = ", ".join(f"{key} = {json.dumps(text)}" for key, text in (spec.own_prompts or {}).items())
    said = f"{{ {prompts} }}" if spec.own_prompts is not None else "true"
    return (
        f"{begin_of_table(name, spec.task, folder)}variants = [{variants}]\n"
        f'default_variant = "{variant}"\nlimits = {{ {limits} }}\n'
    ) + (f"prompts = {said}\n" if spec.prompts is not False else "")


def begin_of_table(name: str, task: str, folder: Path) -> str:
    """The first lines of a table of models.toml for a Hugging Face folder."""
    key = name if re.fullmatch(r"[\w-]+", name, re.ASCII) else json.dumps(name, ensure_ascii=False)
    path = json.dumps(str(folder.resolve()), ensure_ascii=False)
    return f'[{key}]\ntask = "{task}"\nsource = {{ path = {path} }}\n'


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)
