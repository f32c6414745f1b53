"""Export of a vision transformer, with one contract for every architecture.

The graph has the input `pixel_values`, float32 [batch, 3, height, width], and one output, float32 [batch, ...]. An
image is cut into patches, and these are tokens as those of a text are: the graph takes the passes of encoders of texts
(`unpadding`, `attention`, `fused`), with a mask of its own that has no padding. So matmuls work on [tokens, features],
which the recipes quantize, each image attends by itself, and its numbers are the same in any company, to the last bit.

Three things differ from how transformers writes the model. Biases of positions, which only depend on the image's size,
are computed once. A mean over tokens is one over a last dimension: over the middle one, ONNX Runtime sums a single
image in another order than several. A matmul of one row for each image runs on each row twice (`two_rows`).
"""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import torch
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

from trident_export.errors import UnsupportedArchitecture
from trident_export.graphs.attention import attend, drop_heads, write_attention
from trident_export.graphs.editing import constant, make, replace, save
from trident_export.graphs.encoder import attend_plainly
from trident_export.graphs.fused import fuse
from trident_export.graphs.tracing import running, trace
from trident_export.graphs.two_rows import with_two_rows
from trident_export.graphs.unpadding import unpad

PIXELS = "pixel_values"
_ATTENTION = "trident_image_attention"
_TOKENS = "ImageTokens"  # our own operator, which marks the tokens that the first layer reads
_MASK = "image_tokens"
_BATCH = 2
_SERVED = "ViT, DeiT, BEiT, DINOv2, CLIP and SigLIP"

Size = tuple[int, int]
Outputs = Callable[[Any, torch.Tensor], torch.Tensor]


def export_image_graph(model: PreTrainedModel, path: Path, of: str, size: Size, read: Outputs, output: str) -> None:
    """Write what a model says of images to `path`, in float32; the model is changed.

    Args:
        of: what is traced, as errors name it.
        size: height and width of the images.
        read: calls the model with `pixel_values`.
        output: the graph's name for what it gives.

    Raises:
        UnsupportedArchitecture: it is no vision transformer whose tokens all attend to each other, or can't be traced.
    """
    said = f"{of}, a {type(model).__name__},"
    lengths = _prepare(model, said)
    pixels = torch.linspace(-1.0, 1.0, _BATCH * 3 * size[0] * size[1]).reshape(_BATCH, 3, *size)
    with running(said), torch.inference_mode(), _sizes_kept():
        given = read(model, pixels)
        if len(lengths) != 1 or 0 in lengths:
            raise UnsupportedArchitecture(
                f"{said} does not attend from all patches of an image to all: Trident serves vision transformers that "
                f"do, such as {_SERVED}"
            )
        graph = trace(
            _Reader(model, read),
            [pixels],
            inputs=[PIXELS],
            outputs=[output],
            axes={PIXELS: {0: "batch"}, output: {0: "batch"}},
            of=said,
            operators=False,
        )
    graph.graph.outputs[0].shape = ir.Shape(["batch", *given.shape[1:]])
    (tokens,) = lengths
    begin = _begin(graph, tokens)
    drop_heads(graph)
    _add_mask(graph, tokens)
    unpad(graph, _MASK, begin)
    write_attention(graph, _MASK)
    fuse(graph)
    with_two_rows(graph)
    _mean_by_rows(graph)
    graph.opset_imports.pop("trident", None)
    save(graph, path)


class _Reader(torch.nn.Module):
    """The model with one flat tensor in and out."""

    def __init__(self, model: PreTrainedModel, read: Outputs) -> None:
        super().__init__()
        self.model, self.read = model, read

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.read(self.model, pixels)


def _prepare(model: PreTrainedModel, said: str) -> set[int]:
    """Let the model be traced; returns how many tokens attend to each other, once it has run."""
    lengths: set[int] = set()

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **more: Any) -> Any:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        lengths.add(int(query.shape[2]) if int(query.shape[0]) == _BATCH else 0)
        whole = query.shape[2] == key.shape[2] and query.shape[1] == key.shape[1] and more.get("softcap") is None
        if not whole or 0 in lengths:
            lengths.add(0)
            return attend_plainly(query, key, value, mask, scaling, more.get("softcap")), None
        return attend(query, key, value, None, mask, scaling), None

    vision = getattr(model, "vision_model", model)
    if not getattr(vision, "_supports_attention_backend", False):
        raise UnsupportedArchitecture(f"{said} attends by itself: Trident serves vision transformers such as {_SERVED}")
    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_ATTENTION, lambda *sizes, **options: None)  # all patches see all
    vision.set_attn_implementation(_ATTENTION)
    layers = [
        module
        for module in vision.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == getattr(vision.config, "num_hidden_layers", 0)
    ]
    if not layers:
        raise UnsupportedArchitecture(f"{said} has no list of layers that all read the same patches: choose another")
    layers[0][0].register_forward_pre_hook(lambda _, given: _marked(*given))
    for module in vision.modules():
        if isinstance(module, SiglipMultiheadAttentionPoolingHead):
            _divide_weights(module)
            module.forward = types.MethodType(_pool, module)
        elif hasattr(module, "relative_position_bias_table") and "window_size" in _arguments(module):
            with torch.no_grad():
                bias = module(module.window_size)
            module.forward = lambda *_, bias=bias, **options: bias
    return lengths


def _arguments(module: Any) -> Collection[str]:
    return inspect.signature(module.forward).parameters


class _Tokens(torch.autograd.Function):
    """Marks the tokens that the first layer reads."""

    @staticmethod
    def forward(ctx, tokens):  # type: ignore[no-untyped-def]
        return tokens.clone()

    @staticmethod
    def symbolic(g, tokens):  # type: ignore[no-untyped-def]
        return g.op(f"trident::{_TOKENS}", tokens).setType(tokens.type())


def _marked(tokens: torch.Tensor, *more: Any) -> tuple[Any, ...]:
    """The arguments of the first layer, with its tokens marked."""
    return _Tokens.apply(tokens), *more  # type: ignore[no-untyped-call]


class _PooledAttention(torch.autograd.Function):
    """Attention of one query an image: [batch, tokens, features] in, [batch, 1, features] out."""

    @staticmethod
    def forward(ctx, heads, query, key, value):  # type: ignore[no-untyped-def]
        query, key, value = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (query, key, value))
        scores = torch.matmul(query, key.transpose(-2, -1)) * query.shape[-1] ** -0.5
        return torch.matmul(scores.softmax(dim=-1), value).transpose(1, 2).flatten(2)

    @staticmethod
    def symbolic(g, heads, query, key, value):  # type: ignore[no-untyped-def]
        found = g.op("com.microsoft::MultiHeadAttention", query, key, value, num_heads_i=heads)
        found.setType(query.type())
        return found


def _divide_weights(head: SiglipMultiheadAttentionPoolingHead) -> None:
    """Give SigLIP's pooling its query, and the matrices of keys and of values, which torch keeps in one."""
    weights, biases = (part.detach().chunk(3) for part in (head.attention.in_proj_weight, head.attention.in_proj_bias))
    head.register_buffer("query", torch.nn.functional.linear(head.probe.detach(), weights[0], biases[0]))
    for name, weight, bias in zip(("key", "value"), weights[1:], biases[1:], strict=True):
        head.register_buffer(f"{name}_matrix", weight.T.contiguous())
        head.register_buffer(f"{name}_bias", bias.clone())


def _pool(self: Any, hidden_state: torch.Tensor) -> torch.Tensor:
    """SigLIP's pooling, whose query is the same for every image."""
    query = self.query.expand(hidden_state.shape[0], -1, -1)
    key = torch.matmul(hidden_state, self.key_matrix) + self.key_bias
    value = torch.matmul(hidden_state, self.value_matrix) + self.value_bias
    found = _PooledAttention.apply(self.attention.num_heads, query, key, value)  # type: ignore[no-untyped-call]
    residual = self.attention.out_proj(found.reshape(-1, self.probe.shape[-1]))
    pooled: torch.Tensor = residual + self.mlp(self.layernorm(residual))
    return pooled


@contextlib.contextmanager
def _sizes_kept() -> Iterator[None]:
    """While this holds, what is interpolated to its own size stays as it is: positions are, whenever one traces."""
    original = torch.nn.functional.interpolate

    def interpolate(tensor: torch.Tensor, size: Any = None, **options: Any) -> torch.Tensor:
        wanted = None if size is None else tuple(map(int, size))
        return tensor if wanted == tuple(map(int, tensor.shape[2:])) else original(tensor, size=wanted, **options)

    with mock.patch.object(torch.nn.functional, "interpolate", interpolate):
        yield


def _mean_by_rows(model: ir.Model) -> None:
    """Let means over tokens be means over a last dimension."""
    for node in [node for node in model.graph if node.op_type == "ReduceMean"]:
        axes = node.attributes.get("axes")
        if axes is None or list(axes.as_ints()) != [1] or node.attributes.get_int("keepdims", 1):
            continue
        (output,) = node.outputs
        turned = make("Transpose", [node.inputs[0]], f"{output.name}/turned", perm=[0, 2, 1])
        # ONNX Runtime would move a Transpose in front of a mean into it, and sum over the tokens as before.
        kept = constant(model.graph, "turned/shape", np.array([0, 0, -1], np.int64))
        held = make("Reshape", [*turned.outputs, kept], f"{output.name}/held")
        mean = make("ReduceMean", list(held.outputs), output.name, name=node.name, axes=[2], keepdims=0)
        replace(node, [turned, held, mean])


def _begin(model: ir.Model, tokens: int) -> ir.Node:
    """The node that gives the tokens which the first layer reads, in the place of the mark."""
    (mark,) = [node for node in model.graph if node.op_type == _TOKENS]
    begin = make("Identity", list(mark.inputs), mark.outputs[0].name)
    replace(mark, [begin])
    begin.outputs[0].type, begin.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", tokens, None])
    return begin


def _add_mask(model: ir.Model, tokens: int) -> None:
    """Add the mask, ones of [batch, tokens]."""
    graph = model.graph
    (pixels,) = graph.inputs
    batch = make("Shape", [pixels], f"{_MASK}/batch", start=0, end=1)
    count = constant(graph, f"{_MASK}/count", np.array([tokens], np.int64))
    shape = make("Concat", [*batch.outputs, count], f"{_MASK}/shape", axis=0)
    ones = make("ConstantOfShape", list(shape.outputs), _MASK, value=ir.tensor(np.array([1], np.int64)))
    ones.outputs[0].type, ones.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape(["batch", tokens])
    graph.insert_before(graph[0], [batch, shape, ones])
