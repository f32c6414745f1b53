"""What sentence-transformers' files say of a model: the layers behind it, prompts, lengths, scores.

Both generations of these files are read: those of sentence-transformers up to 5.3, and those of 5.4 and later, which
name pooling under one key and write modules.json for cross-encoders too. What they mean is what sentence-transformers
6.2 makes of them; texts are not stripped.
Reference: sentence-transformers, `base.modules`, `sentence_transformer.modules`, `cross_encoder.modules`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trident_export.errors import UnreadableSource, UnsupportedModel
from trident_serving.encoders.labels import Activation
from trident_serving.encoders.pooling import Pooling, PoolingSettings

if TYPE_CHECKING:
    from trident_export.huggingface.folder import HuggingFaceFolder

Floats = NDArray[np.float32]

_CONFIG = "config_sentence_transformers.json"
_MODULES = "modules.json"
_TOKENIZER = "tokenizer_config.json"
SPARSE_LINEAR = "sparse_linear.pt"  # FlagEmbedding's: bge-m3's weight of a token
# The keys of the older files, in the order in which several poolings follow each other.
_POOLING_KEYS = {
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_max_tokens": Pooling.MAX,
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_mean_sqrt_len_tokens": Pooling.MEAN_BY_ROOT,
    "pooling_mode_weightedmean_tokens": Pooling.WEIGHTED_MEAN,
    "pooling_mode_lasttoken": Pooling.LAST_TOKEN,
}
_LAYERS = ("Dense", "LayerNorm", "Normalize")
_SUPPORTED = ("Transformer", "Pooling", *_LAYERS, "Dropout")
_ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU")
_SCORES = {"Identity": Activation.NONE, "Sigmoid": Activation.SIGMOID}


@dataclass(frozen=True)
class Dense:
    """A linear layer with its activation.

    Attributes:
        weight: float32 [out, in].
        bias: float32 [out].
        activation: the name of torch's class.
        residual: projects what is added to the output, float32 [out, in].
        adds_input: whether the input itself is added.
    """

    weight: Floats
    bias: Floats | None
    activation: str
    residual: Floats | None = None
    adds_input: bool = False


@dataclass(frozen=True)
class LayerNorm:
    """A layer norm; weight and bias are float32 [dimensions]."""

    weight: Floats
    bias: Floats
    epsilon: float = 1e-5


@dataclass(frozen=True)
class Normalize:
    """Vectors of length 1."""


@dataclass(frozen=True)
class Truncate:
    """The first numbers of a vector."""

    size: int


Layer = Dense | LayerNorm | Normalize | Truncate


def applied(layers: Sequence[Layer], vectors: Floats) -> Floats:
    """What layers make of pooled vectors, float32 [texts, dimensions], by torch's own functions."""
    import torch
    from torch.nn import functional

    found = torch.from_numpy(vectors)
    for layer in layers:
        if isinstance(layer, Dense):
            bias = None if layer.bias is None else torch.from_numpy(layer.bias)
            made = getattr(torch.nn, layer.activation)()(functional.linear(found, torch.from_numpy(layer.weight), bias))
            if layer.residual is not None:
                made = made + functional.linear(found, torch.from_numpy(layer.residual))
            found = made + found if layer.adds_input else made
        elif isinstance(layer, LayerNorm):
            weights = torch.from_numpy(layer.weight), torch.from_numpy(layer.bias)
            found = functional.layer_norm(found, layer.weight.shape, *weights, layer.epsilon)
        elif isinstance(layer, Truncate):
            found = found[:, : layer.size]
        else:
            found = functional.normalize(found, dim=-1)
    result: Floats = found.numpy()
    return result


class SentenceFiles:
    """The files of one folder, each read when it is first asked for."""

    def __init__(self, folder: HuggingFaceFolder) -> None:
        self._folder = folder

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config_sentence_transformers.json; {} without it."""
        return self._table(_CONFIG)

    @cached_property
    def modules(self) -> tuple[tuple[str, str], ...]:
        """Kind and folder of each module of modules.json, in order; () without it.

        Raises:
            UnreadableSource: the file is damaged.
        """
        from trident_export.huggingface.folder import inside, reading

        if not self._has(_MODULES):
            return ()
        with reading(self._folder.path, _MODULES):
            found = tuple((module["type"].rsplit(".", 1)[-1], module["path"]) for module in self._folder.json(_MODULES))
            for _, path in found:
                inside(self._folder.path, path, _MODULES)
        return found

    @cached_property
    def transformer(self) -> Mapping[str, Any]:
        """Settings of the first module; {} without any."""
        return self._table(self._transformer_file) if self._transformer_file else {}

    @cached_property
    def _transformer_file(self) -> str:
        files = sorted(self._folder.path.glob("sentence_*_config.json")) if self._folder.path.is_dir() else []
        return files[0].name if files else ""

    @property
    def task(self) -> str:
        """The task that the files are of; "" where there are none, or they do not say."""
        kinds = dict(self.modules)
        if "SpladePooling" in kinds or self.config.get("model_type") == "SparseEncoder":
            return "sparse-embedding"
        scores = self.transformer.get("transformer_task") in ("sequence-classification", "text-generation")
        if scores or "LogitScore" in kinds or self.config.get("model_type") == "CrossEncoder":
            return "text-ranking"
        if "Pooling" in kinds and self._has(SPARSE_LINEAR):
            return "hybrid-embedding"
        return "feature-extraction" if kinds else ""

    @property
    def prompts(self) -> dict[str, str]:
        """What goes before a text, by name; a name without a text stands for none.

        Raises:
            UnreadableSource: one is no text.
        """
        from trident_export.huggingface.folder import is_text

        found = self.config.get("prompts") or {}
        if not isinstance(found, Mapping):
            raise self._unfit(_CONFIG, "prompts", found, "a table of texts")
        for name, text in found.items():
            if not is_text(name) or not is_text("" if text is None else text):
                raise self._unfit(_CONFIG, "prompts", {name: text}, "texts by name")
        return {name: text or "" for name, text in found.items()}

    @property
    def default_prompt(self) -> str | None:
        """The name of the prompt of texts for which a request names none.

        Raises:
            UnreadableSource: it is no text.
        """
        from trident_export.huggingface.folder import is_text

        name = self.config.get("default_prompt_name")
        if not is_text("" if name is None else name):
            raise self._unfit(_CONFIG, "default_prompt_name", name, "the name of a prompt")
        return None if name is None else str(name)

    @property
    def lower_case(self) -> bool:
        """Whether texts are made lower-case before they are read."""
        return bool(self.transformer.get("do_lower_case"))

    @property
    def longest_input(self) -> int | None:
        """Tokens that the files allow; None where they say nothing.

        Raises:
            UnreadableSource: they say what is no number.
        """
        if found := self._number(self._transformer_file, self.transformer, "max_seq_length"):
            return found
        if not self.modules or not self._has(_TOKENIZER):
            return None
        return self._number(_TOKENIZER, self._table(_TOKENIZER), "model_max_length")  # without a limit it says 1e30

    @cached_property
    def _pooling(self) -> Mapping[str, Any]:
        if "Pooling" not in dict(self.modules):
            raise UnsupportedModel(
                f"{self._folder.path / _MODULES} names no Pooling step, without which there is no one vector a text"
            )
        return self._folder.table(f"{dict(self.modules)['Pooling']}/config.json")

    @cached_property
    def poolings(self) -> tuple[Pooling, ...]:
        """How the vectors of tokens become one, which the vectors of the next follow.

        Raises:
            UnsupportedModel: in a way that is not supported.
        """
        settings = self._pooling
        named = settings.get("pooling_mode")
        if named is None:
            active = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value]
            unknown = [name for name in active if name not in _POOLING_KEYS]
            found = tuple(mode for name, mode in _POOLING_KEYS.items() if name in active) or (Pooling.MEAN,)
        else:
            modes = [named] if isinstance(named, str) else named
            if not isinstance(modes, list) or not modes:
                raise self._unfit(
                    f"{dict(self.modules)['Pooling']}/config.json", "pooling_mode", named, "a mode, or several"
                )
            unknown = [mode for mode in modes if mode not in list(Pooling)]
            found = tuple(Pooling(mode) for mode in modes if mode in list(Pooling))
        if unknown:
            raise UnsupportedModel(f"the model pools by {unknown}; supported are {', '.join(Pooling)}")
        return found

    @property
    def counts_prompt(self) -> bool:
        """Whether the tokens of a prompt are pooled."""
        return "Pooling" not in dict(self.modules) or self._pooling.get("include_prompt", True) is not False

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """What a pooled vector goes through, but for a last step that makes it to length 1.

        Raises:
            UnreadableSource: a file is missing or damaged.
            UnsupportedModel: there is a step that is not supported.
        """
        found = list(self._all_layers)
        return tuple(found[:-1] if found and isinstance(found[-1], Normalize) else found)

    @property
    def settings(self) -> PoolingSettings:
        """What the postprocess stage does; mean and normalized for a folder without such files."""
        if not self.modules:
            return PoolingSettings(Pooling.MEAN, normalize=True)
        layers, (first, *more) = self._all_layers, self.poolings
        ends = bool(layers) and isinstance(layers[-1], Normalize)
        normalized = not ends and any(isinstance(layer, Normalize) for layer in layers)
        return PoolingSettings(first, normalize=ends, more=tuple(more), normalized=normalized)

    @cached_property
    def _all_layers(self) -> tuple[Layer, ...]:
        kinds = [kind for kind, _ in self.modules]
        unknown = sorted(set(kinds) - set(_SUPPORTED))
        if unknown:
            raise UnsupportedModel(f"the model has the modules {', '.join(unknown)}, which are not supported")
        if not self.modules:
            return (Normalize(),)
        _ = self.poolings
        if kinds[:2] != ["Transformer", "Pooling"] or kinds.count("Pooling") > 1:
            raise UnsupportedModel(
                f"the model has the modules {', '.join(kinds)}: supported is Transformer, then Pooling"
            )
        found = [self._layer(kind, path) for kind, path in self.modules[2:] if kind != "Dropout"]
        if size := self._number(_CONFIG, self.config, "truncate_dim"):
            found.append(Truncate(size))
        return tuple(found)

    def dimensions(self, hidden: int) -> int:
        """Numbers of an embedding.

        Args:
            hidden: of a token's vector.

        Raises:
            UnreadableSource: a layer is made for vectors of another size.
        """
        width = hidden * (1 + len(self.settings.more))
        for layer in self.layers:
            reads = _reads(layer)
            if reads not in (None, width):
                raise UnreadableSource(
                    f"{self._folder.path}: a {type(layer).__name__} of {_MODULES} reads {reads} numbers and is given "
                    f"{width}: one of them is another model's"
                )
            if isinstance(layer, Dense):
                width = len(layer.weight)
            elif isinstance(layer, Truncate):
                width = min(width, layer.size)
        return width

    def score_activation(self, config: Any, *, one: bool) -> Activation:
        """What a cross-encoder makes of its logits.

        Args:
            config: the model's.
            one: whether it gives one number.

        Raises:
            UnsupportedModel: the files name what is not supported.
        """
        older = getattr(config, "sentence_transformers", None)
        name = (
            self.config.get("activation_fn")
            or (older.get("activation_fn") if isinstance(older, Mapping) else None)
            or getattr(config, "sbert_ce_default_activation_function", None)
        )
        if name is None:
            return Activation.SIGMOID if one else Activation.NONE
        name = str(name)
        kind = name.rsplit(".", 1)[-1]
        if kind not in _SCORES or not name.startswith("torch."):
            raise UnsupportedModel(
                f"the cross-encoder's activation {name!r} is not one of {', '.join(_SCORES)} of torch"
            )
        return _SCORES[kind]

    def settings_of(self, kind: str) -> Mapping[str, Any]:
        """The config.json of the module of a kind; {} where it has none."""
        path = dict(self.modules).get(kind)
        return {} if path is None else self._table(f"{path}/config.json")

    def _layer(self, kind: str, path: str) -> Layer:
        settings = self._table(f"{path}/config.json")
        for key in ("module_input_name", "module_output_name"):
            if settings.get(key) not in (None, "sentence_embedding"):
                raise UnsupportedModel(
                    f"the module {path} works on {settings[key]!r}: supported are layers behind the pooled vector"
                )
        if kind == "Normalize":
            return Normalize()
        weights = self._weights(path)
        if kind == "LayerNorm":
            return LayerNorm(self._part(path, weights, "norm.weight", 1), self._part(path, weights, "norm.bias", 1))
        name = str(settings.get("activation_function") or "Identity")
        activation = name.rsplit(".", 1)[-1]
        if activation not in _ACTIVATIONS or not (name.startswith("torch.") or name == "Identity"):
            raise UnsupportedModel(
                f"the module {path} has the activation {name!r}; supported are {', '.join(_ACTIVATIONS)} of torch"
            )
        weight = self._part(path, weights, "linear.weight", 2)
        bias, residual = weights.get("linear.bias"), weights.get("residual.weight")
        adds = bool(settings.get("use_residual")) and residual is None
        fits = (bias is None or bias.shape == weight.shape[:1]) and (residual is None or residual.shape == weight.shape)
        if not fits or (adds and weight.shape[0] != weight.shape[1]):
            raise UnreadableSource(
                f"{self._folder.path}: linear.weight of {path} is {list(weight.shape)}, and what is added to its "
                "output has another size: copy the model again"
            )
        return Dense(weight, bias, activation, residual, adds)

    def _part(self, path: str, weights: Mapping[str, Floats], name: str, axes: int) -> Floats:
        found = weights.get(name)
        if found is None or found.ndim != axes:
            what = "are without it" if found is None else f"have it as {list(found.shape)}"
            raise UnreadableSource(
                f"{self._folder.path}: the weights of {path} need a {name} of {axes} axes and {what}: copy the "
                "model again"
            )
        return found

    def _number(self, file: str, table: Mapping[str, Any], key: str) -> int | None:
        """A number of 1 or more of a file; None where it has none."""
        found = table.get(key)
        if not found:
            return None
        if isinstance(found, bool) or not isinstance(found, int | float) or not 1 <= found < math.inf:
            raise self._unfit(file, key, found, "a positive number")
        return int(found)

    def _unfit(self, file: str, key: str, found: object, wanted: str) -> UnreadableSource:
        return UnreadableSource(f"{self._folder.path}: {file} has {key} {str(found)[:80]!r}, which must be {wanted}")

    def _weights(self, path: str) -> dict[str, Floats]:
        from trident_export.huggingface.folder import reading

        file = self._folder.path / path / "model.safetensors"
        with reading(self._folder.path, f"the weights of {path}"):
            if file.exists():
                from safetensors.torch import load_file

                return {name: tensor.float().numpy() for name, tensor in load_file(file).items()}
            return read_weights(file.with_name("pytorch_model.bin"))

    def _has(self, name: str) -> bool:
        return (self._folder.path / name).exists()

    def _table(self, name: str) -> Mapping[str, Any]:
        return self._folder.table(name) if self._has(name) else {}


def _reads(layer: Layer) -> int | None:
    """How many numbers a layer reads; None where it takes any."""
    if isinstance(layer, Dense):
        return int(layer.weight.shape[1])
    return len(layer.weight) if isinstance(layer, LayerNorm) else None


def read_weights(file: Path) -> dict[str, Floats]:
    """The tensors of a file of torch's, which can run nothing."""
    import torch

    return {name: tensor.float().numpy() for name, tensor in torch.load(file, weights_only=True).items()}
