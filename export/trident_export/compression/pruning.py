"""Pruning: a Hugging Face model with fewer weights.

Structured: `heads`, `columns` (of the feed-forward matmuls) and `layers` are cut out, which leaves a smaller and
faster graph. Unstructured, and experimental: `magnitude`, `wanda` and `2:4` set weights to zero, which makes a float32
file that compresses better; ONNX Runtime multiplies by zero as fast as by anything else.
What matters least is found on calibration text. Sources: magnitude (Han et al. 2015), Wanda (Sun et al. 2023; 2:4 by
its scores), layers by the change of direction that they make (ShortGPT, Men et al. 2024).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trident_export.compression import layouts
from trident_export.compression.methods import Method as Method
from trident_export.errors import UnsupportedModel, UsageError

# Columns are cut to a multiple of the group size of ONNX Runtime's quantized matmuls.
GROUP = 32

# Inputs of the model, a run each.
Runs = Sequence[Mapping[str, torch.Tensor]]


def prune(model: PreTrainedModel, method: Method, sparsity: float, runs: Runs) -> float:
    """Remove a share of the weights, heads, columns or layers, in place; returns the share that was removed.

    Args:
        runs: representative inputs, on the model's device.

    Raises:
        UnsupportedModel, UsageError: the architecture is not known, or the share leaves nothing or takes nothing.
    """
    if not 0 < sparsity < 1:
        raise UsageError(f"sparsity must be between 0 and 1, found {sparsity:g}")
    layouts.layout_of(model)
    steps: dict[Method, Callable[[PreTrainedModel, float, Runs], float]] = {
        Method.MAGNITUDE: _magnitude,
        Method.WANDA: _wanda,
        Method.TWO_OF_FOUR: _two_of_four,
        Method.HEADS: _heads,
        Method.COLUMNS: _columns,
        Method.LAYERS: _layers,
    }
    with torch.no_grad():
        return steps[method](model, sparsity, runs)


def _magnitude(model: PreTrainedModel, sparsity: float, runs: Runs) -> float:
    """The smallest weights of each matmul."""
    shares = []
    for module in layouts.linear_layers(model).values():
        weight = layouts.matrix(module)
        weight[_smallest(weight.abs().reshape(1, -1), sparsity).reshape(weight.shape)] = 0
        shares.append(float((weight == 0).float().mean()))
    return sum(shares) / len(shares)


def _wanda(model: PreTrainedModel, sparsity: float, runs: Runs) -> float:
    """The smallest contributions to each output: weight times the norm of its input."""
    shares = []
    modules = layouts.linear_layers(model)
    for name, norm in input_norms(model, modules, runs).items():
        weight = layouts.matrix(modules[name])
        weight[_smallest(weight.abs() * norm, sparsity)] = 0
        shares.append(float((weight == 0).float().mean()))
    return sum(shares) / len(shares)


def _two_of_four(model: PreTrainedModel, sparsity: float, runs: Runs) -> float:
    """Two of each four weights of an output."""
    if sparsity != 0.5:
        raise UsageError(f"2:4 takes half of the weights: sparsity must be 0.5, found {sparsity:g}")
    modules = layouts.linear_layers(model)
    for name, norm in input_norms(model, modules, runs).items():
        weight = layouts.matrix(modules[name])
        scores = weight.abs() * norm
        if scores.shape[1] % 4:
            raise UnsupportedModel(f"2:4 needs matmuls of a multiple of four inputs, {name} has {scores.shape[1]}")
        small = _smallest(scores.reshape(-1, 4), 0.5).reshape(weight.shape)
        weight[small] = 0
    return 0.5


def _heads(model: PreTrainedModel, sparsity: float, runs: Runs) -> float:
    """Heads whose outputs say least, the same number in every layer; groups where queries share keys and values."""
    check_heads(model)
    layout, config = layouts.layout_of(model), model.config
    layers = layouts.layers_of(model)
    heads = config.num_attention_heads
    groups = config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    removed = _count(groups, sparsity, "groups of heads")
    scores = _column_scores(model, layout.joined, runs)
    kept = []
    for score in scores:
        by_group = score.reshape(groups, -1).sum(dim=1)
        kept.append(sorted(by_group.argsort(descending=True)[: groups - removed].tolist()))
    wide = size * heads // groups  # numbers that a group's queries have
    for layer, good in zip(layers, kept, strict=True):
        keep = {width: [g * width + n for g in good for n in range(width)] for width in (wide, size)}
        layouts.keep_rows(layer.get_submodule(layout.queries), keep[wide])
        layouts.keep_columns(layer.get_submodule(layout.joined), keep[wide])
        for name in (layout.keys, layout.values):
            layouts.keep_rows(layer.get_submodule(name), keep[size])
    config.head_dim = size
    config.num_attention_heads = heads // groups * (groups - removed)
    config.num_key_value_heads = groups - removed
    return float(removed / groups)


def check_heads(model: PreTrainedModel) -> None:
    """Raises UnsupportedModel where heads can't be removed."""
    if not layouts.layout_of(model).joined:
        raise UnsupportedModel(f"heads of {model.config.model_type} models can't be removed; columns and layers can")


def _columns(model: PreTrainedModel, sparsity: float, runs: Runs) -> float:
    """Feed-forward columns that say least, the same number in every layer; a multiple of `GROUP` stays one."""
    layout = layouts.layout_of(model)
    scores = _column_scores(model, layout.outer, runs)
    width = len(scores[0])
    left = width - _count(width, sparsity, "columns")
    if width % GROUP == 0:
        left = max(GROUP, round(left / GROUP) * GROUP)
    for layer, score in zip(layouts.layers_of(model), scores, strict=True):
        kept = sorted(score.argsort(descending=True)[:left].tolist())
        for name in layout.inner:
            layouts.keep_rows(layer.get_submodule(name), kept)
        layouts.keep_columns(layer.get_submodule(layout.outer), kept)
    setattr(model.config, layout.inner_key, left)
    return 1 - left / width


def _layers(model: PreTrainedModel, sparsity: float, runs: Runs) -> float:
    """Layers that change their input's direction least."""
    layers = layouts.layers_of(model)
    removed = _count(len(layers), sparsity, "layers")
    influence = layer_influence(model, runs)
    kept = sorted(influence.argsort(descending=True)[: len(layers) - removed].tolist())
    total = len(layers)
    keep_layers(model, kept)
    return removed / total


def keep_layers(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Keep some of the layers, in place."""
    layout = layouts.layout_of(model)
    *path, name = layout.layers.split(".")
    parent = model.base_model.get_submodule(".".join(path)) if path else model.base_model
    setattr(parent, name, nn.ModuleList([layouts.layers_of(model)[index] for index in kept]))
    for index, layer in enumerate(layouts.layers_of(model)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010  (a module's attributes are modules to mypy)
    setattr(model.config, layout.layers_key, len(kept))
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[index] for index in kept]


def layer_influence(model: PreTrainedModel, runs: Runs) -> torch.Tensor:
    """1 - the cosine between what goes into a layer and what comes out, the mean over tokens; [layers]."""
    layers = layouts.layers_of(model)
    changes: list[list[torch.Tensor]] = [[] for _ in layers]

    def watch(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            similar = torch.cosine_similarity(inputs[0].float(), after.float(), dim=-1)
            changes[index].append(1 - similar.flatten())

        return hook

    handles = [layer.register_forward_hook(watch(index)) for index, layer in enumerate(layers)]
    try:
        for run in runs:
            model(**run)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([torch.cat(found).mean() for found in changes])


def input_norms(model: PreTrainedModel, modules: Mapping[str, nn.Module], runs: Runs) -> dict[str, torch.Tensor]:
    """The norm of each input of some matmuls over all tokens, [inputs] each."""
    sums: dict[str, torch.Tensor] = {}
    with _watching(modules) as seen:
        for run in runs:
            model(**run)
            for name, rows in seen.items():
                squares = torch.cat(rows).square().sum(dim=0)
                sums[name] = sums[name] + squares if name in sums else squares
            seen.clear()
    return {name: total.sqrt() for name, total in sums.items()}


@contextmanager
def _watching(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Collects the inputs of modules, [tokens, inputs] for each run."""
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: object) -> None:
            seen[name].append(inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float())

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _column_scores(model: PreTrainedModel, matmul: str, runs: Runs) -> list[torch.Tensor]:
    """For each layer, how much each input of a matmul contributes: its norm times that of its weights."""
    modules = {str(n): layer.get_submodule(matmul) for n, layer in enumerate(layouts.layers_of(model))}
    norms = input_norms(model, modules, runs)
    return [norms[name] * layouts.matrix(module).norm(dim=0) for name, module in modules.items()]


def _smallest(scores: torch.Tensor, share: float) -> torch.Tensor:
    """A mask of the smallest scores of each row."""
    count = round(scores.shape[1] * share)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if count:
        mask.scatter_(1, scores.topk(count, dim=1, largest=False).indices, True)
    return mask


def _count(total: int, share: float, what: str) -> int:
    count = round(total * share)
    if not 0 < count < total:
        raise UsageError(
            f"a sparsity of {share:g} takes {count} of {total} {what}: the smallest step is {1 / total:.3g}"
        )
    return count
