"""Images in a decoder: a graph that reads them, and inputs by which the decoder takes what that one says.

The graph of the tower has the input `pixel_values`, float32 [batch, 3, tile, tile], and gives `image_embeds`, float32
[batch, tokens, numbers of a token]: what transformers' `get_image_features` gives for each tile. It takes the passes of
vision transformers, see `vision`. The decoder gets two more inputs:

    image_embeds     float32 [n, numbers of a token]
    image_positions  int64   [n, 2]                      the token of each, as (0, token)

A token's embedding is replaced where it is named. Without images both are empty, and nothing else is computed. A
decoder whose tokens have positions in time, height and width gets one more:

    rope_positions   int64   [3, tokens]                 those of each; the same three, its place, for a text's

The attention operator goes on rotating queries and keys. Its tables become those of a run: a row for each token, whose
numbers are those of one of its three positions, and the operator's positions are the rows.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from trident_export.errors import UnsupportedArchitecture
from trident_export.graphs.decoder_passes import attention_nodes
from trident_export.graphs.editing import constant, drop_unused, make, rank_of_weight
from trident_export.graphs.vision import export_image_graph
from trident_serving.generation.decoder import IMAGE_EMBEDS, ROPE_POSITIONS

_POSITIONS = "image_positions"
_TOTAL, _COS, _SIN, _ROWS = 6, 7, 8, 9  # among the attention operator's inputs


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


def add_rope_positions(model: ir.Model, sections: Sequence[int]) -> None:
    """Let a decoder's graph rotate by positions in time, height and width.

    Args:
        sections: how many of the rotated pairs of a head each of the three rotates.

    Raises:
        UnsupportedArchitecture: its rotation is not the attention operator's, or not that of all layers.
    """
    graph, nodes = model.graph, attention_nodes(model)
    inputs = {value.name: value for value in graph.inputs}
    tables = {tuple(map(_origin, node.inputs[_COS : _SIN + 1])) for node in nodes}
    half = sum(sections)
    rotating = [table for pair in tables for table in pair if table is not None and rank_of_weight(table) == 2]
    if [table.shape[1] for table in rotating] != [half, half] or any(node.inputs[_ROWS] for node in nodes):
        raise UnsupportedArchitecture(
            "its layers are not all rotated in one way by the attention operator, so it can't read images here: set "
            "images = 0"
        )
    positions = ir.Value(name=ROPE_POSITIONS, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([3, "tokens"]))
    graph.inputs.append(positions)
    made: list[ir.Node] = []

    def add(kind: str, given: Sequence[ir.Value | None], output: str, **attributes: Any) -> ir.Value:
        made.append(make(kind, given, f"rope/{output}", **attributes))
        return made[-1].outputs[0]

    def number(name: str, *values: int) -> ir.Value:
        return constant(graph, f"rope/{name}", np.array(values, np.int64))

    chosen = np.zeros((3, 1, half), np.float32)
    for part, end in enumerate(np.cumsum(sections)):
        chosen[part, 0, end - sections[part] : end] = 1
    mask = constant(graph, "rope/chosen", chosen)
    # The operator reads the rows of the run's tokens, and wants as many as the slot with the most keys has of these: so
    # it is told how many they are, not how many there could be.
    one = constant(graph, "rope/one", np.array(1, np.int32))
    longest = add("Add", [add("ReduceMax", [inputs["seqlens_k"]], "last", keepdims=0), one], "longest")
    wanted = add("Cast", [longest], "wanted", to=ir.DataType.INT64)
    missing = add("Sub", [wanted, add("Shape", [positions], "tokens", start=1, end=2)], "missing")
    behind = add("Max", [missing, number("none", 0)], "behind")
    padding = add("Concat", [number("before", 0, 0), behind, number("none", 0)], "padding", axis=0)
    found = []
    for table, name in zip(rotating, ("cos", "sin"), strict=True):
        three = add("Mul", [add("Gather", [table, positions], f"{name}_three"), mask], f"{name}_chosen")
        rows = add("ReduceSum", [three, number("none", 0)], f"{name}_rows", keepdims=0)
        found.append(add("Pad", [rows, padding], name))
    index = constant(graph, "rope/second", np.array(1, np.int64))
    found.append(add("Gather", [inputs["attention_tokens"], index], "row_of_place", axis=2))
    graph.insert_before(graph[0], made)
    for node in nodes:
        for place, value in zip((_TOTAL, _COS, _SIN, _ROWS), (longest, *found), strict=True):
            node.replace_input_with(place, value)
    drop_unused(model, inputs=True)


def _origin(value: ir.Value | None) -> ir.Value | None:
    """What torch's exporter gives to several layers by other names."""
    while value is not None and (node := value.producer()) is not None and node.op_type == "Identity":
        value = node.inputs[0]
    return value
