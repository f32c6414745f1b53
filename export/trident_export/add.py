"""`trident-export add`: look at a model, work out its table of models.toml, and tell what was decided and why."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForSeq2SeqLM, PretrainedConfig

from trident_export import models_file, needs, tasks
from trident_export.errors import ModelsFileError
from trident_export.huggingface import images, text_part, vision_language
from trident_export.huggingface.folder import HuggingFaceFolder, is_text
from trident_export.huggingface.seq2seq import generation_config
from trident_export.models_file import PROMPT_TASKS
from trident_export.tasks import encoders, text_generation
from trident_serving.encoders import TASKS
from trident_serving.generation.vision import PatchVision
from trident_serving.schema.limits import LIMITS, ImageLimits

# The head that a class of transformers has, by the end of its name, and the pipeline for it; the first that fits.
_HEADS = (
    ("ForCausalLM", "text-generation"),
    ("LMHeadModel", "text-generation"),
    ("ForConditionalGeneration", "translation"),
    ("MTModel", "translation"),
    *((encoders.of(task).architecture, task) for task in TASKS if encoders.of(task).architecture),
    ("CLIPModel", "zero-shot-image-classification"),
    ("MetaClip2Model", "zero-shot-image-classification"),
    ("SiglipModel", "zero-shot-image-classification"),
    ("Model", "feature-extraction"),
)
_SUMMARIZERS = ("bart", "pegasus")
_SPEECH = "automatic-speech-recognition"
_MAX_CONTEXT = 4096
_CACHE_MIB = 1024
_MOST_IMAGES = 4  # of a request, where the context has room


@dataclass(frozen=True)
class Proposal:
    """A table for models.toml.

    Attributes:
        name: of the table.
        table: its keys.
        reasons: what was decided, a sentence each.
    """

    name: str
    table: Mapping[str, Any]
    reasons: tuple[str, ...]

    def as_toml(self) -> str:
        """The table as text."""
        header = self.name if re.fullmatch(r"[a-z0-9-]+", self.name) else f'"{self.name}"'
        lines = [f"{key} = {_value(value)}" for key, value in self.table.items()]
        return "\n".join([f"[{header}]", *lines]) + "\n"


def propose(folder: Path, source: Mapping[str, str], name: str = "") -> Proposal:
    """What a Hugging Face folder should be served as.

    Args:
        source: the table's source: `{ hub, revision }` or `{ path }`, with an adapter or without.
        name: of the table; "": from the adapter, or else the source.

    Raises:
        ModelsFileError: it is no model of a task that Trident serves.
        ExportError: an export would refuse it, as far as that can be told without the weights' numbers.
    """
    name = name or _name(source)
    models_file.check_name(name)
    if unwritable := [value for value in source.values() if not is_text(value)]:
        raise ModelsFileError(f"{unwritable[0]!r} is no text in UTF-8, which models.toml is: rename it")
    if not (folder / "config.json").is_file():
        raise ModelsFileError(f"{folder} is no Hugging Face folder, it has no config.json")
    model = HuggingFaceFolder(folder)
    config = model.config
    task, why = _task(folder, config)
    reasons = [f"task {task}: {why}"]
    if adapter := source.get("adapter"):
        reasons.append(f"adapter {adapter}: merged into the weights at export, with its tokenizer where it has one")
    seen: list[str] = []
    vision = _images_of(model, seen) if task == "text-generation" else {}
    if task == "text-generation" and not vision and text_part.whole_class(config) is not None:
        parts = ", ".join(text_part.left_out(config)) or "everything else"
        reasons.append(f"left out: {parts}; a {config.model_type} model is served by its text part")
    table: dict[str, Any] = {"task": task, "source": dict(source)}
    if task == "text-generation":
        table["variants"] = ["int8", "fp32"]
        limits = _generation_limits(model.text_config, reasons)
        limits |= vision
        reasons += seen
    else:
        table["variants"] = ["fp32", "int8"]
        if task == _SPEECH:
            limits = {"max_target_tokens": config.max_target_positions}
            reasons.append(f"max_target_tokens {config.max_target_positions}: the decoder's positions")
        else:
            encodes = task in TASKS
            read = _image_limits if issubclass(LIMITS[task], ImageLimits) else _encoder_limits
            limits = read(model, task, reasons) if encodes else _seq2seq_limits(model, table, reasons)
    reasons.append(f"variants {', '.join(table['variants'])}: the first is served under the plain name")
    if task in ("feature-extraction", "hybrid-embedding"):
        settings = model.pooling
        normalized = "normalized" if settings.normalize else "not normalized"
        pooling = ", ".join((settings.pooling, *settings.more))
        reasons.append(f"pooling {pooling}, {normalized}: the model's files")
    prompts = model.roles().prompts if task in PROMPT_TASKS else {}
    if any(prompts.values()):
        table["prompts"] = True
        reasons.append(f"prompts {', '.join(prompts)}: config_sentence_transformers.json")
    table |= {"limits": limits, "on_demand": True}
    proposal = Proposal(name, table, tuple(reasons))
    spec = models_file.parse(proposal.name, tomllib.loads(proposal.as_toml())[proposal.name])  # it can be read
    tasks.check(spec, model)
    if parameters := model.parameters or _parameters(config):
        takes = f"its export takes {needs.sentence(parameters, spec.kind, spec.recipes)}"
        return replace(proposal, reasons=(*reasons, takes))
    return proposal


def _parameters(config: PretrainedConfig) -> int:
    """How many numbers a model of this configuration has, whose weights are not here; 0 where nothing says it."""
    kind = getattr(transformers, _architecture(config), None)
    try:
        with torch.device("meta"):
            return int(kind(config).num_parameters()) if kind is not None else 0
    except Exception:  # a model's own code can raise anything, and this is only a figure
        return 0


def append(path: Path, proposal: Proposal) -> None:
    """Write a proposal to the end of a models file.

    Raises:
        ModelsFileError: there is a table of that name, or the file is not TOML.
    """
    text, tables = models_file.read(path) if path.exists() else ("", {})
    if proposal.name in tables:
        raise ModelsFileError(f"{path} has a table [{proposal.name}] already: give another --name")
    path.write_text(text + ("\n" if text else "") + proposal.as_toml(), encoding="utf-8")


def _task(folder: Path, config: PretrainedConfig) -> tuple[str, str]:
    architecture = _architecture(config)
    if found := HuggingFaceFolder(folder).sentence.task:
        return found, "sentence-transformers' files say so"
    if text_part.whole_class(config) is not None:
        return "text-generation", f"its architecture is {architecture}, whose text part generates text"
    for ending, task in _HEADS:
        if not architecture.endswith(ending):
            continue
        if task == "text-classification" and _is_cross_encoder(config):
            return "text-ranking", f"a {architecture} with sentence-transformers' activation for cross-encoders"
        if task == "feature-extraction" and _reads_images(architecture):
            return "image-feature-extraction", f"its architecture is {architecture}, which reads images"
        if config.model_type == "whisper":
            return _SPEECH, f"a {architecture} of type 'whisper', which writes what it hears"
        if task == "translation" and type(config) not in AutoModelForSeq2SeqLM._model_mapping:
            raise ModelsFileError(
                f"{folder} is a {architecture} of type {config.model_type!r}, which does not turn text into text: "
                "Trident has no task for it"
            )
        specific = getattr(config, "task_specific_params", None) or {}
        if task == "translation" and (config.model_type in _SUMMARIZERS or "summarization" in specific):
            return "summarization", f"a {architecture}; models of this kind summarize"
        return task, f"its architecture is {architecture}"
    known = ", ".join(ending for ending, _ in _HEADS)
    raise ModelsFileError(f"architecture {architecture or 'unknown'!r} is of no task here; known endings: {known}")


def _architecture(config: PretrainedConfig) -> str:
    """The class that config.json names first; "" where it names none."""
    named = config.architectures
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""


def _reads_images(architecture: str) -> bool:
    """Whether a class of transformers reads images and no text."""
    return getattr(getattr(transformers, architecture, None), "main_input_name", "") == "pixel_values"


def _is_cross_encoder(config: PretrainedConfig) -> bool:
    keys = ("sentence_transformers", "sbert_ce_default_activation_function")
    return config.num_labels == 1 and any(getattr(config, key, None) for key in keys)


def _generation_limits(config: PretrainedConfig, reasons: list[str]) -> dict[str, Any]:
    longest = getattr(config, "max_position_embeddings", None) or 1024
    fixed = text_generation.fixed_context(config)
    context = min(longest, _MAX_CONTEXT, fixed or longest)
    why = f", and its rotary embedding changes beyond {fixed}" if fixed == context else ""
    reasons.append(f"context {context}: the model's is {longest}{why}")
    reasons.append(f"kv_cache_mib {_CACHE_MIB}: keys and values of 8 slots never take more")
    return {"context": context, "slots": 8, "kv_cache_mib": _CACHE_MIB}


def _images_of(model: HuggingFaceFolder, reasons: list[str]) -> dict[str, int]:
    """Images of a request at most that the context has room for, and their size; {} of a model that reads none."""
    if not vision_language.reads_images(model):
        return {}
    context = min(getattr(model.text_config, "max_position_embeddings", None) or 0, _MAX_CONTEXT)
    settings = vision_language.settings(model)
    most, share = settings.most_tokens, context // _MOST_IMAGES
    limits: dict[str, int] = {}
    if isinstance(settings, PatchVision) and most > share and share * settings.factor**2 >= settings.min_pixels:
        reasons.append(f"image_tokens {share}: larger images are made smaller; its image processor allows {most}")
        limits["image_tokens"] = share
        most = vision_language.settings(model, share).most_tokens
    images = min(_MOST_IMAGES, context // most)
    if not images:
        return {}
    reasons.append(f"images {images}: of a request at most; its image tower becomes a graph of its own")
    return {"images": images, **limits}


def _encoder_limits(model: HuggingFaceFolder, task: str, reasons: list[str]) -> dict[str, Any]:
    export, longest = encoders.of(task), model.longest_input or 512
    most = min(longest, export.proposed_tokens)
    limits = export.proposed_limits(model, most)
    if "labels" in limits:
        more = " ..." if len(model.labels) > 6 else ""
        reasons.append(f"labels {limits['labels']}: {', '.join(model.labels[:6])}{more}")
    reasons.append(f"max_tokens {most}: the model reads {longest}")
    return {**limits, "max_tokens": most}


def _image_limits(model: HuggingFaceFolder, task: str, reasons: list[str]) -> dict[str, Any]:
    height, width = images.size_of(images.settings(model))
    reasons.append(f"height {height}, width {width}: what the model's image processor makes")
    limits = encoders.of(task).proposed_limits(model, 0)
    if "labels" in limits:
        more = " ..." if len(model.labels) > 6 else ""
        reasons.append(f"labels {limits['labels']}: {', '.join(model.labels[:6])}{more}")
    if task == "zero-shot-image-classification":
        reasons.append(
            "its vectors alone: tables of image-feature-extraction and feature-extraction with the same source"
        )
    return {**limits, "height": height, "width": width}


def _seq2seq_limits(model: HuggingFaceFolder, table: dict[str, Any], reasons: list[str]) -> dict[str, Any]:
    longest = model.longest_input or 512
    source = min(longest, 1024)
    reasons.append(f"max_source_tokens {source}: the model reads {longest}")
    target = min(longest, 512)
    params = (getattr(model.config, "task_specific_params", None) or {}).get(table["task"], {})
    generation = generation_config(model, params)
    if generation.max_length and generation.max_length > 20:
        target = min(target, generation.max_length)
    reasons.append(f"max_target_tokens {target}: the generation config's, as far as the decoder has positions")
    if source_lang := getattr(model.tokenizer, "src_lang", None):
        table["source_lang"] = source_lang
        reasons.append(f"source_lang {source_lang}: the tokenizer's; a request may name another")
    return {"max_source_tokens": source, "max_target_tokens": target}


def _name(source: Mapping[str, str]) -> str:
    named = source.get("adapter") or source.get("hub") or Path(source["path"]).resolve().name
    last = named.rstrip("/").rsplit("/", 1)[-1].lower().removesuffix(".gguf")
    return re.sub(r"[^a-z0-9.-]+", "-", last).strip("-.")


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)  # texts, numbers, booleans and lists of them are the same in TOML
