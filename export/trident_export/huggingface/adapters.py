"""PEFT adapters: merged into their base once, and kept beside it unmerged as what the gate compares with.

peft itself reads and merges them, so every method that it can merge is served (LoRA with DoRA, rsLoRA and rank
patterns, LoHa, LoKr, OFT, IA3). What runs beside the weights at every request (prompts, prefixes, mixtures) is refused.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trident_export.errors import SourceError, UnsupportedModel
from trident_export.huggingface.converted import SETTINGS_FILES, copy_settings
from trident_export.huggingface.folder import HuggingFaceFolder, reading, reason

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

SETTINGS = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# What a tokenizer consists of: an adapter's takes the place of the base's, all of it.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.spm",
)
_TEMPLATE_FILES = ("chat_template.json", "additional_chat_templates/*")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
# The last layer of a classifier, whose rows are its labels.
_HEADS = re.compile(r"\.(score|classifier|qa_outputs)(\.out_proj|\.dense)?(\.modules_to_save)?(\.default)?\.weight$")
# Numbers of a vector that are compared.
_BEGINNING = 4096
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class AdaptedFolder(HuggingFaceFolder):
    """The folder of a base with an adapter merged into it; the gate's reference is the base with the adapter beside it.

    Args:
        path: the merged folder.
        base: the base's.
        adapter: the adapter's.
    """

    def __init__(self, path: Path, base: HuggingFaceFolder, adapter: Path) -> None:
        super().__init__(path, trust_remote_code=base.trust_remote_code)
        self.base, self.adapter = base, adapter

    def reference(self, head: Any) -> PreTrainedModel:
        """The base with the adapter's layers in it, unmerged; otherwise as `load`."""
        return _inner(attach(self.base, self.adapter, head))


def settings(adapter: Path) -> PeftConfig:
    """What an adapter says about itself.

    Raises:
        SourceError: the folder is no adapter.
        UnsupportedModel: it is of a kind that can't be merged.
    """
    from peft import PeftConfig

    if not (adapter / SETTINGS).is_file():
        raise SourceError(f"{adapter} is no adapter, it has no {SETTINGS}: name the folder that peft wrote")
    if not any((adapter / name).is_file() for name in WEIGHTS):
        raise SourceError(f"{adapter} has no {' or '.join(WEIGHTS)}: copy the adapter again")
    with reading(adapter, SETTINGS):
        raw = json.loads((adapter / SETTINGS).read_text(encoding="utf-8"))
        kind = str(raw.get("peft_type"))
        found: PeftConfig = PeftConfig.from_pretrained(str(adapter))
    if not _merges(kind) or getattr(found, "alora_invocation_tokens", None):
        what = "activated LoRA" if _merges(kind) else kind
        raise UnsupportedModel(
            f"{adapter} is an adapter of kind {what}, which can't be merged into weights: train a LoRA, or "
            "another kind that peft merges"
        )
    return found


def _merges(kind: str) -> bool:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    tuner: Any = {str(key.value): value for key, value in PEFT_TYPE_TO_TUNER_MAPPING.items()}.get(kind)
    # X-LoRA weighs several adapters anew for each text.
    return isinstance(tuner, type) and issubclass(tuner, BaseTuner) and kind not in ("XLORA", "POLY")


def check_base(adapter: Path, base: Path, hub: str) -> None:
    """The base that an adapter names must be the one that it is given.

    Where the base that it names is on this machine, both are compared. A folder may have moved, and then only the
    shapes can tell; see `attach`.

    Args:
        base: the folder of the base, or its file, as the source names it.
        hub: its id on the hub; "" where it comes from elsewhere.

    Raises:
        SourceError: it is another.
    """
    named = settings(adapter).base_model_name_or_path or ""
    with reading(adapter, SETTINGS):
        there = _at_hand(named)
    if hub and str(named).lower() == hub.lower():
        return
    if there is not None and base.is_dir():
        other = not _same(there, base)
    else:
        other = bool(hub) and _HUB_ID.fullmatch(named) is not None and named.lower() != hub.lower()
    if other:
        raise SourceError(
            f"{adapter} is an adapter of another base: it was trained on {named}, and the source is {hub or base}: "
            f"name that base as the source, or, where both have the same weights, write the source into {SETTINGS}"
        )


def _at_hand(named: str) -> Path | None:
    """The folder that an adapter names as its base, or that the hub's cache has of it; None where neither is there."""
    from huggingface_hub import try_to_load_from_cache

    if not named:
        return None
    if (folder := Path(named).expanduser()).is_dir():
        return folder
    found = try_to_load_from_cache(named, "config.json") if _HUB_ID.fullmatch(named) else None
    folder = Path(found).parent if isinstance(found, str) else folder
    return folder if _sample(folder) else None


def _same(one: Path, other: Path) -> bool:
    """Whether two folders hold one model, maybe in two formats: by its type, and the beginning of each plain tensor."""
    import torch

    if one.samefile(other):
        return True
    kinds = [HuggingFaceFolder(folder).json("config.json").get("model_type") for folder in (one, other)]
    if kinds[0] != kinds[1]:
        return False
    ours, theirs = _beginnings(one), _beginnings(other)
    if not ours or not theirs:  # older files, and quantized ones without a plain tensor
        first, second = _sample(one), _sample(other)
        # Of other sizes, their shapes are compared when they meet; see `attach`.
        return first == second or [size for size, _ in first] != [size for size, _ in second]
    both = ours.keys() & theirs.keys()
    for name in both:
        (shape, a), (wanted, b) = ours[name], theirs[name]
        if shape != wanted:
            return False
        rounding = 0.0 if a.dtype == b.dtype else max(torch.finfo(a.dtype).eps, torch.finfo(b.dtype).eps)
        if not torch.allclose(a.float(), b.float(), rtol=rounding, atol=rounding * 1e-4, equal_nan=True):
            return False
    return bool(both)


def _beginnings(folder: Path) -> dict[str, tuple[list[int], Any]]:
    """Shape and first row of each tensor of floating numbers in a folder's safetensors files."""
    from safetensors import safe_open

    found: dict[str, tuple[list[int], Any]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with reading(folder, file.name), safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                tensor = opened.get_slice(name)
                if tensor.get_dtype() in ("F64", "F32", "F16", "BF16") and (shape := tensor.get_shape()):
                    found[name] = (shape, tensor[:1] if len(shape) > 1 else tensor[:_BEGINNING])
    return found


def _sample(folder: Path) -> list[tuple[int, bytes]]:
    """Size, beginning and end of a folder's weight files: enough to tell them from others of the same shapes."""
    found = []
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        with file.open("rb") as stream:
            size, first = file.stat().st_size, stream.read(2**20)
            stream.seek(max(0, size - 2**20))
            found.append((size, first + stream.read()))
    return found


def attach(base: HuggingFaceFolder, adapter: Path, head: Any) -> PeftModel:
    """The base in float32 with the adapter's layers in it, in evaluation mode.

    Args:
        head: an Auto class of transformers.

    Raises:
        SourceError: the adapter is of another base, damaged, or leaves a layer without weights.
        UnsupportedModel: it can't be merged.
    """
    import torch
    from peft import PeftModel, set_peft_model_state_dict
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
    from peft.utils import load_peft_weights

    found = settings(adapter)
    with reading(adapter, "the adapter's weights"):
        weights = load_peft_weights(str(adapter), device="cpu")
    if bad := [name for name, value in weights.items() if not torch.isfinite(value).all()]:
        raise SourceError(f"{adapter}: {bad[0]} has values that are not finite: copy the adapter again, or train anew")
    config = copy.deepcopy(base.config)
    rows = [value.shape[0] for name, value in weights.items() if _HEADS.search(name)]
    if rows and rows[0] != config.num_labels:
        config.num_labels = rows[0]
    with reading(base.path, "the weights"):
        model, report = head.from_pretrained(
            base.path,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            trust_remote_code=base.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told from the report
        )
    # A classifier of other labels is the adapter's.
    mismatched = [entry for entry in report["mismatched_keys"] if not _brings(weights, entry[0])]
    base.check_weights(model, {**report, "missing_keys": (), "mismatched_keys": mismatched})
    _resize(model, weights)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
            result: Any = set_peft_model_state_dict(adapted, weights)
    except Exception as error:  # peft says by errors of every kind that a layer is not there or has another shape
        raise _another_base(adapter, base, reason(error)) from error
    prefix = dict[Any, str](PEFT_TYPE_TO_PREFIX_MAPPING).get(found.peft_type, "")
    if lacking := [name for name in result.missing_keys if prefix in name and "vector_bank" not in name]:
        raise _another_base(adapter, base, f"it has no {lacking[0]}")
    # peft writes an embedding that was trained whole twice.
    if unknown := [name for name in result.unexpected_keys if ".modules_to_save." not in name]:
        raise _another_base(adapter, base, f"the base has no place for {unknown[0]}")
    fresh = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    if unset := [name for name in sorted(fresh) if not _brings(weights, name)]:
        raise SourceError(
            f"neither {base} nor {adapter} has {unset[0]}, which the task needs: choose the task that the adapter was "
            "trained for"
        )
    return adapted.eval()


def _brings(weights: Mapping[str, Any], name: str) -> bool:
    """Whether an adapter has the layer of a parameter."""
    return any(name.rpartition(".")[0] in given for given in weights)


def _another_base(adapter: Path, base: HuggingFaceFolder, why: str) -> SourceError:
    named = settings(adapter).base_model_name_or_path or "a base that it does not name"
    return SourceError(
        f"{adapter} is no adapter of {base}: {why}: name the base that it was trained on ({named}), and its task"
    )


def _resize(model: PreTrainedModel, weights: Mapping[str, Any]) -> None:
    """Give a model the vocabulary that its adapter was trained with, where it brings the embedding."""
    embedding = model.get_input_embeddings()
    name = next((name for name, module in model.named_modules() if module is embedding), None)
    if name is None:
        return
    for key, value in weights.items():
        stem, _, part = key.rpartition(".")
        stem = stem.removesuffix(".base_layer").removesuffix(".modules_to_save")
        if stem.endswith(f".{name}") and part in ("weight", "lora_embedding_A"):
            rows = value.shape[0] if part == "weight" else value.shape[1]
            if rows != embedding.num_embeddings and value.shape[-1 if part == "weight" else 0]:
                model.resize_token_embeddings(rows, mean_resizing=False)
            return


def _inner(adapted: PeftModel) -> PreTrainedModel:
    """The base's own class, with the adapter's layers in it."""
    model: PreTrainedModel = adapted.get_base_model()
    return model


def merge(base: HuggingFaceFolder, adapter: Path, head: Any, folder: Path) -> None:
    """Write the merged model as a Hugging Face folder.

    The adapter's tokenizer and chat template take the place of the base's where it carries them.

    Raises:
        SourceError, UnsupportedModel: see `attach`; or merged weights are not finite.
    """
    adapted = attach(base, adapter, head)
    _untie(_inner(adapted))
    try:
        merged: Any = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise UnsupportedModel(
            f"{adapter} can't be merged into {base} ({reason(error)}): merge it with peft"
        ) from error
    inputs, outputs = merged.get_input_embeddings(), merged.get_output_embeddings()
    if outputs is not None and inputs.weight is not outputs.weight:
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = False
    merged.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    _copy_settings(base.path, adapter, folder)


def _untie(model: PreTrainedModel) -> None:
    """Two matrices where an adapter changes one of two that are the same: merging would change both."""
    import torch

    layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    inputs, outputs = (getattr(layer, "base_layer", layer) for layer in layers)
    changed = any(hasattr(layer, "base_layer") for layer in layers)
    if changed and outputs is not None and inputs.weight is outputs.weight:
        outputs.weight = torch.nn.Parameter(outputs.weight.detach().clone(), requires_grad=False)


def _copy_settings(base: Path, adapter: Path, folder: Path) -> None:
    own = any((adapter / name).is_file() for name in _TOKENIZER)
    if own:
        copy_settings(adapter, folder, _TOKENIZER_FILES)
    if template := _template(adapter):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    copy_settings(adapter, folder, (*_TEMPLATE_FILES, "generation_config.json"))
    if own and not template and not any(folder.glob("additional_chat_templates/*")) and (template := _template(base)):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    taken = {file.name for pattern in _TOKENIZER_FILES for file in base.glob(pattern)} if own else set()
    files = (file for pattern in SETTINGS_FILES for file in base.glob(pattern))
    copy_settings(base, folder, [str(file.relative_to(base)) for file in files if file.name not in taken])


def _template(folder: Path) -> str | None:
    """The one chat template of a folder; several by name stay in their files.

    Raises:
        UnreadableSource: its file is damaged.
    """
    if (plain := folder / "chat_template.jinja").is_file():
        with reading(folder, plain.name):
            return plain.read_text(encoding="utf-8")
    name = "tokenizer_config.json"
    written = HuggingFaceFolder(folder).table(name).get("chat_template") if (folder / name).is_file() else None
    return written if isinstance(written, str) else None
