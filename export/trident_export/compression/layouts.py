"""Where an architecture keeps its layers, heads and feed-forward columns. A new architecture is a row of LAYOUTS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trident_export.errors import UnsupportedModel


@dataclass(frozen=True)
class Layout:
    """The parts of a layer, as paths from it; the layers themselves from the base model.

    Attributes:
        layers: the list of layers.
        queries, keys, values, joined: projections into heads and back, where the config has numbers of heads and their
            size; "" where it has not, so that heads can't be removed.
        inner: matmuls into the feed-forward columns.
        outer: the matmul out of them.
        layers_key, inner_key: what the config calls their numbers.
    """

    layers: str
    inner: tuple[str, ...]
    outer: str
    layers_key: str = "num_hidden_layers"
    inner_key: str = "intermediate_size"
    queries: str = ""
    keys: str = ""
    values: str = ""
    joined: str = ""


_LLAMA = Layout(
    "layers",
    ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj",
    queries="self_attn.q_proj",
    keys="self_attn.k_proj",
    values="self_attn.v_proj",
    joined="self_attn.o_proj",
)
_BERT = Layout("encoder.layer", ("intermediate.dense",), "output.dense")
LAYOUTS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": Layout("h", ("mlp.c_fc",), "mlp.c_proj", layers_key="n_layer", inner_key="n_inner"),
    "opt": Layout("decoder.layers", ("fc1",), "fc2", inner_key="ffn_dim"),
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "distilbert": Layout(
        "transformer.layer",
        ("ffn.lin1",),
        "ffn.lin2",
        layers_key="n_layers",
        inner_key="hidden_dim",
    ),
}


def layout_of(model: PreTrainedModel) -> Layout:
    """The layout of a model's architecture.

    Raises:
        UnsupportedModel: it is not known.
    """
    kind = model.config.model_type
    if kind not in LAYOUTS:
        raise UnsupportedModel(f"models of type {kind} can't be pruned or distilled; known are {', '.join(LAYOUTS)}")
    return LAYOUTS[kind]


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The model's layers."""
    found = model.base_model.get_submodule(layout_of(model).layers)
    assert isinstance(found, nn.ModuleList)
    return found


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every matmul of the model's layers by name; embeddings and heads are none of them."""
    prefix = next(name for name, module in model.named_modules() if module is layers_of(model))
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(f"{prefix}.") and isinstance(module, nn.Linear | Conv1D)
    }


def matrix(module: nn.Module) -> torch.Tensor:
    """The weight of a matmul as [outputs, inputs]; a view, so it can be changed in place."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.data.T if isinstance(module, Conv1D) else weight.data


def keep_rows(module: nn.Module, kept: Sequence[int]) -> None:
    """Leave some of the outputs of a matmul."""
    index = torch.tensor(list(kept))
    _replace(module, matrix(module)[index])
    bias = module.bias
    if isinstance(bias, torch.Tensor):
        module.bias = nn.Parameter(bias.data[index].clone())


def keep_columns(module: nn.Module, kept: Sequence[int]) -> None:
    """Leave some of the inputs of a matmul."""
    _replace(module, matrix(module)[:, torch.tensor(list(kept))])


def _replace(module: nn.Module, weight: torch.Tensor) -> None:
    stored = weight.T if isinstance(module, Conv1D) else weight
    module.weight = nn.Parameter(stored.contiguous().clone())
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    else:
        assert isinstance(module, Conv1D)
        module.nf, module.nx = weight.shape
