"""LoRA adapters that stay beside their base, to be chosen for each request.

They are read by peft, which knows their scales, ranks and patterns. What is more than two small matrices beside a
linear layer (DoRA, biases, embeddings, layers saved whole, other kinds of adapters) has no form in the graph that a
step shares; it can be merged into the base as a model of its own, see `adapters`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trident_export.errors import SourceError, UnsupportedModel
from trident_export.graphs.lora import Lora, Low
from trident_export.huggingface import adapters
from trident_export.huggingface.folder import HuggingFaceFolder, reading

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

# Ways to begin that change the base as well; others are known by what they leave in the weights.
_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MERGE = "merge it by a table of its own, source = { ..., adapter = ... }"
# What decides ids; a trainer that saves a tokenizer changes truncation and padding, which nothing here reads.
_VOCABULARY = ("model", "added_tokens", "normalizer", "pre_tokenizer")


class BaseWithAdapters(HuggingFaceFolder):
    """The folder of a base, and those of the adapters that are served with it.

    Args:
        base: its folder.
        adapters: folders of the adapters by name, in their order.
    """

    def __init__(self, base: HuggingFaceFolder, adapters: Mapping[str, Path]) -> None:
        super().__init__(base.path, trust_remote_code=base.trust_remote_code)
        self.adapters = dict(adapters)

    def reference_with(self, name: str, head: Any) -> PreTrainedModel:
        """The base with an adapter beside its layers, as peft runs it."""
        return adapters.AdaptedFolder(self.path, self, self.adapters[name]).reference(head)


def adapters_of(folder: HuggingFaceFolder) -> Mapping[str, Path]:
    """The adapters that are served with a base, by name."""
    return folder.adapters if isinstance(folder, BaseWithAdapters) else {}


def check(adapter: Path, base: HuggingFaceFolder) -> None:
    """Refuse what an adapter's small files show to have no form beside its base.

    Raises:
        SourceError: the folder is no adapter, or its tokenizer is not the base's.
        UnsupportedModel: it does more than LoRA of linear layers.
    """
    found = adapters.settings(adapter)
    if (more := _more(found)) is not None:
        raise UnsupportedModel(f"{adapter} {more}, which can't be chosen for each request: {_MERGE}")
    ours, own = (folder / "tokenizer.json" for folder in (base.path, adapter))
    if own.is_file() and ours.is_file() and _vocabulary(adapter) != _vocabulary(base.path):
        raise SourceError(
            f"{adapter} has another tokenizer than {base}, and requests of all adapters share the base's: {_MERGE}"
        )


def _more(config: PeftConfig) -> str | None:
    """What an adapter does beside LoRA of linear layers."""
    said: dict[str, Any] = config.to_dict()
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        return f"is an adapter of kind {kind}"
    for key, words in (
        ("use_dora", "uses DoRA"),
        ("modules_to_save", f"saves whole layers ({', '.join(said.get('modules_to_save') or ())})"),
        ("trainable_token_indices", "trains tokens of the embedding"),
        ("target_parameters", "adapts parameters that are no linear layer's"),
        ("lora_bias", "has biases"),
        ("layer_replication", "repeats layers of its base"),
    ):
        if said.get(key):
            return words
    if str(said.get("init_lora_weights")).startswith(_CHANGING):
        return f"changes its base where it begins ({said['init_lora_weights']})"
    return "has biases" if said.get("bias", "none") != "none" else None


def _vocabulary(folder: Path) -> list[Any]:
    name = "tokenizer.json"
    with reading(folder, name):
        found = json.loads((folder / name).read_text(encoding="utf-8"))
        return [found.get(key) for key in _VOCABULARY]


def read(base: HuggingFaceFolder, name: str, adapter: Path, head: Any) -> Lora:
    """An adapter's matrices.

    Args:
        head: an Auto class of transformers.

    Raises:
        SourceError: it is damaged, or of another base.
        UnsupportedModel: it does more than LoRA of linear layers.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    check(adapter, base)
    model: Any = adapters.attach(base, adapter, head).get_base_model()
    layers: dict[str, Low] = {}
    adapted: list[tuple[str, Any]] = [item for item in model.named_modules() if isinstance(item[1], LoraLayer)]
    for path, module in adapted:
        inner = module.get_base_layer()
        if not isinstance(inner, torch.nn.Linear) or module is model.get_output_embeddings():
            raise UnsupportedModel(
                f"{adapter} adapts {path}: only linear layers of attention and feed-forward can have an adapter for "
                f"each request: {_MERGE}"
            )
        if variants := [type(variant).__name__ for variant in module.lora_variant.values() if variant is not None]:
            raise UnsupportedModel(
                f"{adapter} is a variant of LoRA ({variants[0]}) that can't be chosen for each request: {_MERGE}"
            )
        for key, down in module.lora_A.items():
            up = module.lora_B[key].weight * module.scaling[key]
            pair = (down.weight.detach().T, up.detach().T)
            layers[path] = Low(*(matrix.float().contiguous().numpy() for matrix in pair))
    if not layers:
        raise SourceError(f"{adapter} adapts no layer of {base}: name the base that it was trained on")
    return Lora(name, layers)
