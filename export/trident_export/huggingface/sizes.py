"""Whether the sizes in config.json can be those of the weights beside it, told before anything of that size is built.

A config of another model's would be found when the weights are loaded, too; a damaged one can ask for a million layers,
and building those takes hours or all memory.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trident_export.errors import UnreadableSource

if TYPE_CHECKING:
    from trident_export.huggingface.folder import HuggingFaceFolder

# Settings that every model with such a setting has one or more of.
_ONE_OR_MORE = frozenset(
    ("hidden_size", "d_model", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head", "vocab_size")
)
_LAYERS = re.compile(r"(\w+_)?layers?")
# What counts parts of a model, and more than any model has of them.
_COUNTS = (
    (_LAYERS, 10_000),
    (re.compile(r"(\w+_)?(heads?|experts)"), 100_000),
    (re.compile(r"num_labels"), 10_000_000),
)
# So many layers are built in any case; some models have fewer tensors than layers, which share them.
_FEW_LAYERS = 256
# Numbers that a model may have beyond those in its files: a head that is tied, weights in half the bytes.
_MOST_OVER, _FEW_NUMBERS = 3, 2**24


def check_counts(folder: object, raw: Mapping[str, Any]) -> None:
    """Check the numbers of a config.json.

    Args:
        folder: what a message names.

    Raises:
        UnreadableSource: one is no number of what it counts, or is larger than any model's.
    """
    for name, value in _settings(raw):
        key = name.rpartition(".")[2]
        if value is None or isinstance(value, list | dict):  # one a layer, or a part's own config
            continue
        if key in _ONE_OR_MORE and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UnreadableSource(
                f"{folder}: config.json has {name} {value!r:.40}, which must be a whole number, 1 or more: copy "
                "the file again"
            )
        for pattern, most in _COUNTS:
            if pattern.fullmatch(key) and isinstance(value, int) and value > most:
                raise UnreadableSource(
                    f"{folder}: config.json has {name} {value}, and no model has more than {most}: copy the file again"
                )


def check(source: HuggingFaceFolder, head: Any) -> None:
    """Check the sizes of config.json against the weight files; nothing where there are none, or they do not say it.

    Args:
        head: the Auto class of transformers that will be loaded.

    Raises:
        UnreadableSource: the config asks for a larger model than the files hold.
    """
    tensors, held = source.tensors, source.parameters
    if tensors:
        for name, value in _settings(source.raw_config):
            layers = isinstance(value, int) and _LAYERS.fullmatch(name.rpartition(".")[2])
            if layers and value > max(tensors, _FEW_LAYERS):
                raise UnreadableSource(
                    f"{source}: config.json has {name} {value}, and the weight files hold {tensors} tensors: one of "
                    "the two is another model's"
                )
    if held and (wanted := parameters(source.config, head)) > _MOST_OVER * held + _FEW_NUMBERS:
        raise UnreadableSource(
            f"{source}: config.json asks for {wanted:,} numbers, and the weight files hold {held:,}: one of the two is "
            "another model's"
        )


def parameters(config: Any, head: Any) -> int:
    """How many numbers a model of a configuration has; 0 where it can't be told without them."""
    import torch

    try:
        with torch.device("meta"):
            return int(head.from_config(copy.deepcopy(config)).num_parameters())
    except Exception:  # a model's own code can raise anything, and loading says it better
        return 0


def _settings(raw: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The settings of a config, and of its text part's."""
    text = raw.get("text_config")
    inner = text.items() if isinstance(text, dict) else ()
    return [*raw.items(), *((f"text_config.{key}", value) for key, value in inner)]
