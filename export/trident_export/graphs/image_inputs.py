"""Images in a decoder: a graph that reads them, and inputs by which the decoder takes what that one says.

The graph of the tower has the input `pixel_values`, float32 [batch, 3, tile, tile], and gives `image_embeds`, float32
[batch, tokens, numbers of a token]: what transformers' `get_image_features` gives for each tile. It takes the passes of
vision transformers, see `vision`. The decoder gets two more inputs:

    image_embeds     float32 [n, numbers of a token]
    image_positions  int64   [n, 2]                      the token of each, as (0, token)

A token's embedding is replaced where it is named. Without images both are empty, and nothing else is computed.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from trident_export.errors import UnsupportedArchitecture
from trident_export.graphs.editing import make, rank_of_weight
from trident_export.graphs.vision import export_image_graph
from trident_serving.generation.decoder import IMAGE_EMBEDS

_POSITIONS = "image_positions"


def export_tower(model: PreTrainedModel, path: Path, of: str, tile: int) -> None:
    """Write the graph of a model's image tower and connector to `path`, in float32; the tower is changed.

    Args:
        model: whole, of Idefics3's or SmolVLM's class.
        of: what is traced, as errors name it.
        tile: height and width of a tile.

    Raises:
        UnsupportedArchitecture: it can't be traced.
    """
    inner: Any = model.model
    _fix_positions(inner.vision_model.embeddings, tile)
    export_image_graph(inner, path, of, (tile, tile), _read, IMAGE_EMBEDS)


def _read(inner: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The connector joins squares of patches; here in four dimensions, which no pass takes for tokens of the tower."""
    patches: torch.Tensor = inner.vision_model(pixel_values=pixels).last_hidden_state
    factor, width = inner.connector.scale_factor, inner.config.vision_config.hidden_size
    side = int(patches.shape[1] ** 0.5) // factor
    squares = patches.reshape(-1, side, factor, side, factor, width).permute(0, 1, 3, 2, 4, 5)
    joined = inner.connector.modality_projection(squares.reshape(-1, side, side, factor * factor * width))
    found: torch.Tensor = joined.reshape(-1, side * side, inner.config.text_config.hidden_size)
    return found


def _fix_positions(embeddings: Any, tile: int) -> None:
    """Let the tower add the positions of whole tiles, which it would look up by fractions of an image each time."""
    side = tile // embeddings.patch_size
    asked: list[torch.Tensor] = []
    hook = embeddings.position_embedding.register_forward_pre_hook(lambda module, given: asked.append(given[0]))
    with torch.inference_mode():
        embeddings(torch.zeros(1, 3, tile, tile), torch.ones(1, side, side, dtype=torch.bool))
    hook.remove()
    with torch.no_grad():
        positions: torch.Tensor = embeddings.position_embedding(asked[0])

    def forward(self: Any, pixel_values: torch.Tensor, patch_attention_mask: torch.Tensor) -> torch.Tensor:
        patches: torch.Tensor = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        return patches + positions

    embeddings.forward = types.MethodType(forward, embeddings)


def add_image_inputs(model: ir.Model) -> None:
    """Let a decoder's graph read vectors in place of the embeddings of some tokens.

    Raises:
        UnsupportedArchitecture: it does not look its tokens up one by one.
    """
    graph = model.graph
    ids = next(value for value in graph.inputs if value.name == "input_ids")
    readers = list(ids.consumers())
    if len(readers) != 1 or readers[0].op_type != "Gather" or rank_of_weight(readers[0].inputs[0]) != 2:
        raise UnsupportedArchitecture(
            "its decoder does more with tokens than to look up their embeddings, so it can't read images here: set "
            "images = 0"
        )
    (lookup,) = readers
    width = lookup.inputs[0].shape[1]
    vectors = ir.Value(name=IMAGE_EMBEDS, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["images", width]))
    positions = ir.Value(name=_POSITIONS, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["images", 2]))
    graph.inputs.extend([vectors, positions])
    looked_up = lookup.outputs[0]
    scatter = make("ScatterND", [looked_up, positions, vectors], f"{looked_up.name}/with_images")
    looked_up.replace_all_uses_with(scatter.outputs[0])
    scatter.replace_input_with(0, looked_up)
    lookup.append(scatter)
