"""The image tower of Qwen2-VL and Qwen2.5-VL as a graph that reads one image at its own size.

Its inputs are described in `trident_serving.generation.vision`; it gives `image_embeds`, float32 [tokens, numbers of a
token]: what transformers' `get_image_features` gives for the image. Patches stand window by window. Layers that see the
whole image attend to all patches at once, without a mask, where ONNX Runtime keeps no scores. Layers that attend in
windows take them as a batch, and a short window's padding is masked. Queries and keys are rotated by row and column.

The embedding of a patch is a convolution whose kernel is the whole patch, so it is written as a matmul.
Operator references: onnxruntime docs/ContribOperators.md, MultiHeadAttention, RotaryEmbedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel

from trident_export.graphs.editing import save
from trident_export.graphs.tracing import trace
from trident_serving.generation.decoder import IMAGE_EMBEDS
from trident_serving.generation.vision import PatchVision

_LOWEST = -1e30  # as a score; its exponential is 0


class _Attention(torch.autograd.Function):
    """Computed plainly when the model runs, written to the graph as one operator on [batch, patches, features]."""

    @staticmethod
    def forward(ctx, heads, query, key, value, *mask):  # type: ignore[no-untyped-def]
        query, key, value = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (query, key, value))
        scores = torch.matmul(query, key.transpose(-2, -1)) * query.shape[-1] ** -0.5
        for each in mask:
            scores = scores + each
        return torch.matmul(scores.softmax(dim=-1), value).transpose(1, 2).flatten(2)

    @staticmethod
    def symbolic(g, heads, query, key, value, *mask):  # type: ignore[no-untyped-def]
        absent = g.op("prim::Constant")
        absent.setType(torch._C.OptionalType.ofTensor())
        more = [absent, absent, *mask] if mask else []
        found = g.op("com.microsoft::MultiHeadAttention", query, key, value, *more, num_heads_i=heads)
        found.setType(query.type())
        return found


class _Rotated(torch.autograd.Function):
    """Heads [patches, features] rotated by cosines and sines [patches, size / 2]."""

    @staticmethod
    def forward(ctx, heads, tensor, cos, sin):  # type: ignore[no-untyped-def]
        first, second = tensor.unflatten(1, (heads, -1)).chunk(2, dim=-1)
        cos, sin = cos[:, None], sin[:, None]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(1)

    @staticmethod
    def symbolic(g, heads, tensor, cos, sin):  # type: ignore[no-untyped-def]
        first = g.op("Constant", value_t=torch.tensor([0]))  # both axes' index, and the row of the first patch
        batch = g.op("Unsqueeze", tensor, first)
        rotated = g.op("com.microsoft::RotaryEmbedding", batch, first, cos, sin, num_heads_i=heads)
        found = g.op("Squeeze", rotated, first)
        found.setType(tensor.type())
        return found


class _Tower(torch.nn.Module):
    """The tower with flat tensors in and out."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual
        self.full = getattr(visual, "fullatt_block_indexes", None)

    def forward(
        self, pixels: torch.Tensor, positions: torch.Tensor, order: torch.Tensor, *windows: torch.Tensor
    ) -> torch.Tensor:
        visual = self.visual
        hidden = torch.nn.functional.linear(pixels, visual.patch_embed.proj.weight.flatten(1))
        cos, sin = (table.chunk(2, dim=-1)[0] for table in visual.rotary_pos_emb(hidden, positions))
        mask: list[torch.Tensor] = []
        if windows:
            width = windows[0].shape[1]
            outside = torch.arange(width)[None] >= windows[1][:, None]
            mask = [(outside.float() * _LOWEST)[:, None, None].expand(-1, 1, width, -1)]
        for number, block in enumerate(visual.blocks):
            attention, heads = block.attn, block.attn.num_heads
            query, key, value = attention.qkv(block.norm1(hidden)).chunk(3, dim=-1)
            query, key = (_Rotated.apply(heads, each, cos, sin) for each in (query, key))  # type: ignore[no-untyped-call]
            if self.full is None or number in self.full:
                found = _Attention.apply(heads, query[None], key[None], value[None])[0]  # type: ignore[no-untyped-call]
            else:
                cut = (each[windows[0]] for each in (query, key, value))
                in_windows = _Attention.apply(heads, *cut, *mask)  # type: ignore[no-untyped-call]
                found = in_windows.flatten(0, 1)[windows[2]]
            hidden = hidden + attention.proj(found)
            hidden = hidden + block.mlp(block.norm2(hidden))
        merged: torch.Tensor = visual.merger(hidden)[order]
        return merged


_AXES = {
    "pixel_values": {0: "patches"},
    "patch_positions": {0: "patches"},
    "token_order": {0: "tokens"},
    "window_patches": {0: "windows", 1: "longest"},
    "window_lengths": {0: "windows"},
    "window_places": {0: "patches"},
}


def export_patch_tower(model: PreTrainedModel, path: Path, of: str, settings: PatchVision) -> None:
    """Write the graph of a model's image tower to `path`, in float32.

    Args:
        model: whole, of Qwen2-VL's or Qwen2.5-VL's class.
        of: what is traced, as errors name it.

    Raises:
        UnsupportedArchitecture: it can't be traced.
    """
    # Several windows, and short ones among them.
    side = settings.factor + max(settings.window, settings.factor)
    (feed,) = settings.runs(Image.new("RGB", (side, side)))
    inputs = list(feed)
    graph = trace(
        _Tower(model.model.visual),
        [torch.from_numpy(numbers) for numbers in feed.values()],
        inputs=inputs,
        outputs=[IMAGE_EMBEDS],
        axes={name: _AXES[name] for name in inputs} | {IMAGE_EMBEDS: {0: "tokens"}},
        of=of,
    )
    save(graph, path)
