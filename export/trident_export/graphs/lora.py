"""Adapters beside the matmuls of a decoder: each token has its own.

To a matmul `x @ W` is added `(x @ A) @ B`, where A has the columns of all adapters side by side and B their rows one
below the other; between the two, every number that is not of the token's adapter becomes zero. So a step with any mix
of adapters is two more matmuls, of constant matrices, and what a token gets does not depend on its company: the sums
are always the same ones, and foreign terms are exact zeros. A base's token gets zeros only.

    adapters     int64 [1, tokens]    0: the base; otherwise the number of an adapter, from 1

An input of the graph, and matmuls whose names begin with `PREFIX`; passes that quantize do not see them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from trident_export.errors import UnsupportedArchitecture
from trident_export.graphs.editing import constant, make, parts_of
from trident_serving.generation.decoder import ADAPTERS

PREFIX = "adapters/"
_MODEL = "/model/"  # what the traced model is called in the graph


@dataclass(frozen=True)
class Low:
    """What an adapter adds to a linear layer: `x @ down @ up`.

    Attributes:
        down: float32 [inputs, rank].
        up: float32 [rank, outputs], its scale included.
    """

    down: NDArray[np.float32]
    up: NDArray[np.float32]


@dataclass(frozen=True)
class Lora:
    """One adapter.

    Attributes:
        name: as requests call it.
        layers: by the layer's name in the base.
    """

    name: str
    layers: Mapping[str, Low]

    @property
    def rank(self) -> int:
        """The largest of its layers."""
        return max(low.down.shape[1] for low in self.layers.values())


def add_adapters(model: ir.Model, adapters: Sequence[Lora]) -> None:
    """Put adapters beside the matmuls of their layers; the model is changed.

    Args:
        model: the float32 graph of a packed decoder, behind `decoder_passes.join_matmuls`.

    Raises:
        UnsupportedArchitecture: a layer of an adapter is no matmul of the packed tokens.
    """
    if not adapters:
        return
    graph = model.graph
    tokens = next(value for value in graph.inputs if value.name == "input_ids").shape[1]
    chosen = ir.Value(name="adapters", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1, tokens]))
    graph.inputs.append(chosen)
    masks = _Masks(graph, chosen, len(adapters), max(adapter.rank for adapter in adapters))
    adapted = {layer for adapter in adapters for layer in adapter.layers}
    left = set(adapted)
    for node in [node for node in graph if node.op_type == "MatMul" and node.inputs[1].is_initializer()]:
        parts = [(_layer(name), columns) for name, columns in parts_of(node)]
        if adapted.intersection(layer for layer, _ in parts):
            _add_beside(node, parts, adapters, masks)
            left.difference_update(layer for layer, _ in parts)
    if missing := sorted(left):
        raise UnsupportedArchitecture(
            f"{missing[0]} has an adapter, and is no matmul of one token after the other in the graph: merge the "
            "adapter by a table of its own, source = { ..., adapter = ... }"
        )
    model.metadata_props[ADAPTERS] = json.dumps([adapter.name for adapter in adapters])
    graph.sort()


def _layer(name: str) -> str:
    """The layer that a node computes, by the name that torch gives both: `/model/model/layers.0/mlp/up_proj/MatMul`."""
    return name.removeprefix(_MODEL).rpartition("/")[0].replace("/", ".")


class _Masks:
    """Which columns of a matmul with several adapters a token keeps.

    Args:
        chosen: the adapter of each token.
        count: of the adapters.
        rank: columns of each.
    """

    def __init__(self, graph: ir.Graph, chosen: ir.Value, count: int, rank: int) -> None:
        self._graph, self._chosen = graph, chosen
        self.count, self.rank = count, rank
        self._made: dict[int, ir.Value] = {}

    @property
    def columns(self) -> int:
        """Of a layer's first matrix."""
        return self.count * self.rank

    def of(self, layers: int) -> ir.Value:
        """For so many layers of one input, bool [1, tokens, layers x columns]."""
        if layers not in self._made:
            kept = np.repeat(np.eye(self.count + 1, dtype=bool)[:, 1:], self.rank, axis=1)
            table = constant(self._graph, f"{PREFIX}kept_{layers}", np.tile(kept, layers))
            node = make("Gather", [table, self._chosen], f"{PREFIX}mask_{layers}")
            self._graph.insert_before(self._graph[0], [node])
            self._made[layers] = node.outputs[0]
        return self._made[layers]


def _add_beside(node: ir.Node, parts: Sequence[tuple[str, int]], adapters: Sequence[Lora], masks: _Masks) -> None:
    """Add to a matmul's output what adapters add to its layers, which stand in it side by side.

    Args:
        parts: each layer with the number of its outputs.
    """
    graph, path = node.graph, PREFIX + node.name.strip("/").rpartition("/")[0]
    inputs = node.inputs[1].shape[0]
    groups = _groups(parts, {layer for adapter in adapters for layer in adapter.layers})
    downs = [_down(layer, inputs, adapters, masks) for layer, *_ in groups]
    ups = [_up(layer, outputs, before, columns, adapters, masks) for layer, outputs, before, columns in groups]
    first = make(
        "MatMul",
        [node.inputs[0], constant(graph, f"{path}/A", np.concatenate(downs, axis=1))],
        f"{path}/A_output",
        name=f"{path}/A/MatMul",
    )
    zero = constant(graph, f"{PREFIX}zero", np.zeros(1, np.float32))
    kept = make("Where", [masks.of(len(groups)), first.outputs[0], zero], f"{path}/kept")
    made, halves = [first, kept], list(kept.outputs)
    if len(groups) > 1:
        halves = [ir.Value(name=f"{path}/kept_{index}") for index in range(len(groups))]
        sizes = constant(graph, f"{PREFIX}columns_{len(groups)}", np.full(len(groups), masks.columns, np.int64))
        made.append(ir.node("Split", [kept.outputs[0], sizes], {"axis": -1}, outputs=halves, name=f"{path}/Split"))
    seconds = [
        make(
            "MatMul",
            [half, constant(graph, f"{path}/B_{index}", up)],
            f"{path}/B_{index}_output",
            name=f"{path}/B_{index}/MatMul",
        )
        for index, (half, up) in enumerate(zip(halves, ups, strict=True))
    ]
    made += seconds
    if len(seconds) > 1:
        made.append(make("Concat", [second.outputs[0] for second in seconds], f"{path}/B_output", axis=-1))
    (output,) = node.outputs
    added = make("Add", [output, made[-1].outputs[0]], f"{path}/sum", name=f"{path}/Add")
    output.replace_all_uses_with(added.outputs[0])
    added.replace_input_with(0, output)
    graph.insert_after(node, [*made, added])


def _groups(parts: Sequence[tuple[str, int]], adapted: set[str]) -> list[tuple[str, int, int, int]]:
    """Adapted layers with the columns of the joined output that each one fills.

    A layer without an adapter gets no matmul of its own: zeros beside its neighbour's outputs are cheaper.

    Returns:
        Of each: the layer, its outputs, columns before them, columns in all.
    """
    found: list[tuple[str, int, int, int]] = []
    before = 0
    for layer, outputs in parts:
        if layer in adapted:
            found.append((layer, outputs, before, before + outputs))
            before = 0
        elif found:
            name, own, ahead, columns = found[-1]
            found[-1] = (name, own, ahead, columns + outputs)
        else:
            before += outputs
    return found


def _down(layer: str, inputs: int, adapters: Sequence[Lora], masks: _Masks) -> NDArray[np.float32]:
    """The first matrices of all adapters side by side, [inputs, columns]; zeros where one has none."""
    matrix = np.zeros((inputs, masks.count, masks.rank), np.float32)
    for number, adapter in enumerate(adapters):
        if (low := adapter.layers.get(layer)) is not None:
            matrix[:, number, : low.down.shape[1]] = low.down
    return matrix.reshape(inputs, -1)


def _up(
    layer: str, outputs: int, before: int, columns: int, adapters: Sequence[Lora], masks: _Masks
) -> NDArray[np.float32]:
    """The second matrices of all adapters one below the other, with zeros around them, [masks.columns, columns]."""
    matrix = np.zeros((masks.count, masks.rank, columns), np.float32)
    for number, adapter in enumerate(adapters):
        if (low := adapter.layers.get(layer)) is not None:
            matrix[number, : low.up.shape[0], before : before + outputs] = low.up
    return matrix.reshape(-1, columns)
