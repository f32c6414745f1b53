"""Adapters beside the matmuls of a decoder: each token has its own.

To a matmul `x @ W` is added `(x @ A) @ B`, where A has the columns of several adapters side by side and B their rows
one below the other; between the two, every number that is not of the token's adapter becomes zero. So a step with any
mix of adapters is a few more matmuls of constant matrices, and what a token gets does not depend on its company: the
sums are always the same ones, and foreign terms are exact zeros. Adapters stand in blocks of about `COLUMNS` columns,
and a step leaves out the blocks that none of its tokens needs (`skip_idle_blocks`).

    adapters     int64 [1, tokens]    0: the base; otherwise the number of an adapter, from 1

is an input of the graph. Names of all that is added begin with `PREFIX`; passes that quantize do not see these matmuls.
Operator reference: ONNX, If.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from trident_export.errors import UnsupportedArchitecture
from trident_export.graphs.editing import constant, make, parts_of
from trident_serving.generation.decoder import ADAPTERS

PREFIX = "adapters/"
# Of a block at most, if it has several adapters: an If takes 3 microseconds, as long as a few dozen columns of SmolLM2.
COLUMNS = 64


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
        model: the float32 graph of a packed decoder, behind `causal.name_layers` and `decoder_passes.join_matmuls`.

    Raises:
        UnsupportedArchitecture: a layer of an adapter is no matmul of the packed tokens.
    """
    if not adapters:
        return
    graph = model.graph
    tokens = next(value for value in graph.inputs if value.name == "input_ids").shape[1]
    chosen = ir.Value(name="adapters", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1, tokens]))
    graph.inputs.append(chosen)
    blocks = _blocks(graph, chosen, adapters)
    adapted = {layer for adapter in adapters for layer in adapter.layers}
    left = set(adapted)
    for node in [node for node in graph if node.op_type == "MatMul" and node.inputs[1].is_initializer()]:
        parts = parts_of(node)
        if adapted.intersection(layer for layer, _ in parts):
            for block in blocks:
                block.add_beside(node, parts)
            left.difference_update(layer for layer, _ in parts)
    if missing := sorted(left):
        raise UnsupportedArchitecture(
            f"{missing[0]} has an adapter, and is no matmul of one token after the other in the graph: merge the "
            "adapter by a table of its own, source = { ..., adapter = ... }"
        )
    model.metadata_props[ADAPTERS] = json.dumps([adapter.name for adapter in adapters])
    graph.sort()


def _blocks(graph: ir.Graph, chosen: ir.Value, adapters: Sequence[Lora]) -> list[_Block]:
    rank = max(adapter.rank for adapter in adapters)
    size = max(1, COLUMNS // rank)
    numbers = range(len(adapters))
    return [
        _Block(
            graph, chosen, len(adapters), rank, number, {each: adapters[each] for each in numbers[first : first + size]}
        )
        for number, first in enumerate(numbers[::size])
    ]


@dataclass(frozen=True)
class _Block:
    """Adapters that share matmuls.

    Attributes:
        chosen: the adapter of each token.
        count: of all adapters.
        rank: columns of each.
        number: of the block.
        adapters: those of the block, by their places among all.
    """

    graph: ir.Graph
    chosen: ir.Value
    count: int
    rank: int
    number: int
    adapters: Mapping[int, Lora]

    @property
    def columns(self) -> int:
        """Of a layer's first matrix."""
        return len(self.adapters) * self.rank

    def mask(self, layers: int) -> ir.Value:
        """Which columns a token keeps, for so many layers of one input: bool [1, tokens, layers x columns]."""
        name = f"{PREFIX}mask_{self.number}_{layers}"
        if (found := self._masks.get(layers)) is None:
            kept = np.zeros((self.count + 1, len(self.adapters)), bool)
            kept[[place + 1 for place in self.adapters], range(len(self.adapters))] = True
            table = constant(self.graph, f"{name}/table", np.tile(np.repeat(kept, self.rank, axis=1), layers))
            node = make("Gather", [table, self.chosen], name)
            self.graph.insert_before(self.graph[0], [node])
            found = self._masks[layers] = node.outputs[0]
        return found

    @cached_property
    def _masks(self) -> dict[int, ir.Value]:
        return {}

    def add_beside(self, node: ir.Node, parts: Sequence[tuple[str, int]]) -> None:
        """Add to a matmul's output what the adapters add to its layers, which stand in it side by side.

        Args:
            parts: each layer with the number of its outputs.
        """
        groups = _groups(parts, {layer for adapter in self.adapters.values() for layer in adapter.layers})
        if not groups:
            return
        # A layer that runs twice has a second node, MatMul_1.
        path = f"{PREFIX}{node.name.strip('/').removesuffix('/MatMul')}/block_{self.number}"
        inputs = node.inputs[1].shape[0]
        downs = [self._down(layer, inputs) for layer, *_ in groups]
        first = make(
            "MatMul",
            [node.inputs[0], constant(self.graph, f"{path}/A", np.concatenate(downs, axis=1))],
            f"{path}/A_output",
            name=f"{path}/A/MatMul",
        )
        zero = constant(self.graph, f"{PREFIX}zero", np.zeros(1, np.float32))
        kept = make("Where", [self.mask(len(groups)), first.outputs[0], zero], f"{path}/kept")
        made, halves = [first, kept], list(kept.outputs)
        if len(groups) > 1:
            halves = [ir.Value(name=f"{path}/kept_{index}") for index in range(len(groups))]
            sizes = constant(
                self.graph, f"{PREFIX}columns_{self.number}_{len(groups)}", np.full(len(groups), self.columns, np.int64)
            )
            made.append(ir.node("Split", [kept.outputs[0], sizes], {"axis": -1}, outputs=halves, name=f"{path}/Split"))
        seconds = [
            make(
                "MatMul",
                [half, constant(self.graph, f"{path}/B_{index}", self._up(*group))],
                f"{path}/B_{index}_output",
                name=f"{path}/B_{index}/MatMul",
            )
            for index, (half, group) in enumerate(zip(halves, groups, strict=True))
        ]
        made += seconds
        if len(seconds) > 1:
            made.append(make("Concat", [second.outputs[0] for second in seconds], f"{path}/B_output", axis=-1))
        # What is added by earlier blocks stands between the matmul and what read its output.
        output = _last_sum(node)
        added = make("Add", [output, made[-1].outputs[0]], f"{path}/sum", name=f"{path}/Add")
        output.replace_all_uses_with(added.outputs[0])
        added.replace_input_with(0, output)
        self.graph.insert_after(output.producer(), [*made, added])

    def _down(self, layer: str, inputs: int) -> NDArray[np.float32]:
        """The first matrices of the adapters side by side, [inputs, columns]; zeros where one has none."""
        matrix = np.zeros((inputs, len(self.adapters), self.rank), np.float32)
        for number, adapter in enumerate(self.adapters.values()):
            if (low := adapter.layers.get(layer)) is not None:
                matrix[:, number, : low.down.shape[1]] = low.down
        return matrix.reshape(inputs, -1)

    def _up(self, layer: str, outputs: int, before: int, columns: int) -> NDArray[np.float32]:
        """The second matrices one below the other, with zeros around them, [self.columns, columns]; see `_groups`."""
        matrix = np.zeros((len(self.adapters), self.rank, columns), np.float32)
        for number, adapter in enumerate(self.adapters.values()):
            if (low := adapter.layers.get(layer)) is not None:
                matrix[number, : low.up.shape[0], before : before + outputs] = low.up
        return matrix.reshape(-1, columns)


def _last_sum(node: ir.Node) -> ir.Value:
    """A matmul's output, with what was added to it already."""
    (value,) = node.outputs
    while added := [use.node for use in value.uses() if use.node.op_type == "Add" and _is_sum(use.node)]:
        value = added[0].outputs[0]
    return value


def _is_sum(node: ir.Node) -> bool:
    return (node.name or "").startswith(PREFIX) and (node.name or "").endswith("/Add")


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


def skip_idle_blocks(model: ir.Model) -> None:
    """Run a block's matmuls only in steps with a token of one of its adapters; after all passes, which see no branches.

    A sum that something else has been fused with stays as it is.
    """
    graph = model.graph
    blocks: dict[str, list[ir.Node]] = defaultdict(list)
    for node in graph:
        if (node.name or "").startswith(PREFIX) and "/block_" in node.name:
            head, _, rest = node.name.rpartition("/block_")
            blocks[f"{head}/block_{rest.partition('/')[0]}"].append(node)
    needed: dict[str, ir.Value] = {}
    for path, nodes in blocks.items():
        last = nodes[-1]
        if not _is_sum(last):
            continue
        number = path.rpartition("_")[2]
        if number not in needed:
            needed[number] = _needed(graph, number)
        output = last.outputs[0]
        branch = ir.Value(name=f"{path}/with", type=output.type, shape=output.shape)
        plain = make("Identity", [last.inputs[0]], f"{path}/without")
        either = ir.node("If", [needed[number]], outputs=[ir.Value(name=f"{path}/either")], name=f"{path}/If")
        last.append(either)
        output.replace_all_uses_with(either.outputs[0])
        graph.remove(nodes)
        output.name = branch.name
        either.attributes["then_branch"] = ir.AttrGraph("then_branch", ir.Graph([], [output], nodes=nodes, name=path))
        either.attributes["else_branch"] = ir.AttrGraph(
            "else_branch", ir.Graph([], plain.outputs, nodes=[plain], name=f"{path}/else")
        )
    graph.sort()


def _needed(graph: ir.Graph, number: str) -> ir.Value:
    """Whether any token has an adapter of a block, bool []."""
    mask = next(node for node in graph if (node.name or "").startswith(f"{PREFIX}mask_{number}_"))
    name = f"{PREFIX}needed_{number}"
    numbers = make("Cast", mask.outputs, f"{name}/numbers", to=ir.DataType.INT32)
    largest = make("ReduceMax", numbers.outputs, f"{name}/largest", keepdims=0)
    needed = make("Cast", largest.outputs, name, to=ir.DataType.BOOL)
    graph.insert_after(mask, [numbers, largest, needed])
    return needed.outputs[0]
