"""Where heads of values are given and read, for a rotation of each: see `rotate`.

Between the matmul that gives the values and the one that reads what is attended there is either ONNX Runtime's
attention operator, whose cache holds them, or a matmul with the attention's weights, as in the encoders of
encoder-decoders. The values that a decoder reads of its text come from another graph, and are not looked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from trident_export.graphs.decoder_passes import attention_nodes
from trident_export.graphs.editing import numbers, rank_of_weight

_VALUES = (2, 4)  # positions of values and of past values among the attention operator's inputs
# Operators that only move numbers, with these in their first input.
_MOVES = frozenset(("Gather", "GatherND", "Reshape", "Squeeze", "Transpose", "Unsqueeze"))
_HEADS_FIRST = [0, 2, 1, 3]  # [texts, positions, heads, numbers] to [texts, heads, positions, numbers], and back


@dataclass
class RotatedHeads:
    """Weights that a rotation of the values changes.

    Attributes:
        giving: the weight whose last columns are the values, and its bias where it has one.
        matmul: reads the attention's output.
        heads: of the values.
        size: channels of a head.
    """

    giving: list[ir.Value]
    matmul: ir.Node
    heads: int
    size: int


def find_heads(model: ir.Model, matmuls: set[str]) -> list[RotatedHeads]:
    """All heads of values that one of the matmuls gives and another reads, with nothing but an attention between."""
    found = [_of_operator(node, matmuls) for node in attention_nodes(model)]
    found += [_of_weights(node, matmuls) for node in model.graph if node.name in matmuls]
    return [heads for heads in found if heads is not None]


def _of_operator(node: ir.Node, matmuls: set[str]) -> RotatedHeads | None:
    """The weights around an attention operator; None where the values go elsewhere, or something is between."""
    position, past = _VALUES
    packed = node.inputs[position] is None
    past_values, present = node.inputs[past], node.outputs[2]
    if past_values is None or not past_values.is_graph_input() or len(past_values.uses()) != 1 or present.uses():
        return None
    source = node.inputs[0 if packed else position]
    gather = _only_producer(source, "GatherND")
    if gather is not None:
        source = gather.inputs[0]
    giving: list[ir.Value] = []
    added = _only_producer(source, "Add")
    if added is not None:
        bias = [term for term in added.inputs if rank_of_weight(term) == 1]
        terms = [term for term in added.inputs if term not in bias]
        if len(bias) != 1:
            return None
        giving, source = bias, terms[0]
    first, last = _only_producer(source, "MatMul"), _only_reader(node.outputs[0])
    if last is not None and last.op_type == "GatherND":
        last = _only_reader(last.outputs[0])
    if first is None or last is None or not {first.name, last.name} <= matmuls:
        return None
    heads, queries = (node.attributes.get_int(name, 0) for name in ("kv_num_heads", "num_heads"))
    giving = [first.inputs[1], *giving]
    size, rest = divmod(last.inputs[1].shape[0], queries)
    columns = (queries + 2 * heads if packed else heads) * size
    unshared = all(len(weight.uses()) == 1 for weight in [*giving, last.inputs[1]])
    if rest or not unshared or any(value.shape[-1] != columns for value in giving):
        return None
    return RotatedHeads(giving, last, heads, size)


def _of_weights(last: ir.Node, matmuls: set[str]) -> RotatedHeads | None:
    """The weights around an attention of plain operators that one matmul reads; None where there is no such."""
    attended, moves = _moved(last.inputs[0])
    if attended is None or attended.op_type != "MatMul" or _perms(moves) != [_HEADS_FIRST]:
        return None
    given, moves = _moved(attended.inputs[1])
    giving: list[ir.Value] = []
    if given is not None and given.op_type == "Add":
        bias = [term for term in given.inputs if rank_of_weight(term) == 1]
        terms = [term for term in given.inputs if term not in bias]
        if len(bias) != 1:
            return None
        giving = bias
        given, further = _moved(terms[0])
        moves = [*moves, *further]
    if given is None or given.name not in matmuls or _perms(moves) != [_HEADS_FIRST]:
        return None
    giving = [given.inputs[1], *giving]
    # What is turned is the last of what moves the numbers that splits them into heads.
    turned = next(node for node in moves if node.op_type == "Transpose")
    split = turned.inputs[0].producer()
    shape = numbers(split.inputs[1]) if split is not None and split.op_type == "Reshape" else None
    if shape is None or len(shape) != len(_HEADS_FIRST):
        return None
    heads, size = int(shape[2]), int(shape[3])
    width = last.inputs[1].shape[0]
    heads = width // size if heads == -1 and size > 0 else heads
    size = width // heads if size == -1 and heads > 0 else size
    unshared = all(len(weight.uses()) == 1 for weight in [*giving, last.inputs[1]])
    if heads * size != width or not unshared or any(value.shape[-1] != width for value in giving):
        return None
    return RotatedHeads(giving, last, heads, size)


def _moved(value: ir.Value) -> tuple[ir.Node | None, list[ir.Node]]:
    """The node whose numbers a value has, and what moves them, the last first; none where something else reads them."""
    moves: list[ir.Node] = []
    while True:
        readers = [node for node, _ in value.uses() if node.op_type != "Shape"]
        node = value.producer()
        if node is None or len(readers) != 1 or value.is_graph_output():
            return None, moves
        if node.op_type not in _MOVES:
            return node, moves
        moves.append(node)
        value = node.inputs[0]


def _perms(moves: list[ir.Node]) -> list[list[int]]:
    return [list(node.attributes["perm"].as_ints()) for node in moves if node.op_type == "Transpose"]


def _only_producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node that gives a value, if it is of a kind and the value has one reader."""
    node = value.producer() if value is not None and len(value.uses()) == 1 else None
    return node if node is not None and node.op_type == kind else None


def _only_reader(value: ir.Value) -> ir.Node | None:
    """The node that reads a value, if there is one alone."""
    readers = list(value.uses())
    return readers[0].node if len(readers) == 1 and not value.is_graph_output() else None
