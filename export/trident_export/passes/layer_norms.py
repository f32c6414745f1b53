"""LayerNorms become root-mean-square norms, with which a rotation commutes: see `rotate`.

A LayerNorm subtracts a token's mean before it divides by the root of the mean square. The mean is gone beforehand where
everything that is added to the sum of the layers has none: it is taken out of the weights that give those numbers. The
norm's bias goes through the matmuls behind it, to what is added there. So the graph computes the same.
It takes a norm before each layer, as Whisper, mBART and Pegasus have; where a norm's output is itself the sum that goes
on, as in BART and Marian, a channel's scale can't move.
Source: SliceGPT (Ashkboos et al. 2024).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from trident_export.graphs.editing import array, constant, make, numbers, rank_of_weight, replace, store
from trident_export.graphs.unpadding import moves_tokens

Floats = NDArray[np.float32]

_PREFIX = "centred"
_FIRST = 2  # norms that the sum may begin before: the first one may stand behind the embeddings


@dataclass
class Sum:
    """The sum of the layers, and the weights around it.

    Attributes:
        start: its first value, which no layer added to.
        first: weights that give it, and biases.
        adding: those whose output is added to it.
        rest: what else the first value is made of: values that no weight gives, each with what reads it.
        norms: of the sum.
        reading: matmuls of a norm's output, with the norm.
    """

    start: ir.Value
    first: list[ir.Value] = field(default_factory=list)
    adding: list[ir.Value] = field(default_factory=list)
    rest: list[tuple[ir.Value, ir.Node | None]] = field(default_factory=list)
    norms: list[ir.Node] = field(default_factory=list)
    reading: dict[ir.Node, ir.Node] = field(default_factory=dict)


@dataclass(frozen=True)
class Centred:
    """What became of a graph.

    Attributes:
        start: the first value of the sum of the layers.
        first: weights that give it, those of matmuls that were put there among them.
    """

    start: ir.Value
    first: tuple[ir.Value, ...]


def centre(model: ir.Model, matmuls: set[str]) -> Centred | None:
    """Make root-mean-square norms of LayerNorms, in place; None where they are none, or stand elsewhere.

    Args:
        matmuls: those of an activation and a constant matrix.
    """
    norms = [node for node in model.graph if node.op_type == "LayerNormalization"]
    tried = (_find(model, norm.inputs[0], matmuls) for norm in norms[:_FIRST])
    found = next((each for each in tried if each is not None and len(norms) - len(each.norms) < _FIRST), None)
    if found is None:
        return None
    for weight in dict.fromkeys([*found.first, *found.adding]):
        values = array(weight)
        store(weight, values - values.mean(axis=-1, keepdims=True))
    start, first = found.start, list(found.first)
    channels = found.norms[0].inputs[1].shape[0]
    for value, reader in found.rest:
        matrix = np.eye(channels, dtype=np.float32) - np.float32(1 / channels)
        weight = constant(model.graph, f"{_PREFIX}/{value.name}/matrix", matrix)
        node = make("MatMul", [value, weight], f"{_PREFIX}/{value.name}")
        _put_behind(model, value, node, reader)
        if value is start:
            start = node.outputs[0]
        first.append(weight)
    for matmul, norm in found.reading.items():
        if len(norm.inputs) > 2:
            _add_bias(matmul, array(norm.inputs[2]) @ array(matmul.inputs[1]))
    for norm in found.norms:
        name, attributes = norm.outputs[0].name, {"axis": -1, "epsilon": norm.attributes.get_float("epsilon", 1e-5)}
        replace(norm, [make("SimplifiedLayerNormalization", norm.inputs[:2], name, norm.name, **attributes)])
    return Centred(start, tuple(first))


def _put_behind(model: ir.Model, value: ir.Value, node: ir.Node, reader: ir.Node | None) -> None:
    """Let what reads a value read a node's output; with a reader only that one."""
    users = [(user, position) for user, position in value.uses() if user is not node]
    if value.producer() is None:
        model.graph.insert_before(model.graph[0], [node])
    else:
        value.producer().append(node)
    for user, position in users:
        if reader is None or user is reader:
            user.replace_input_with(position, node.outputs[0])


def _add_bias(matmul: ir.Node, bias: Floats) -> None:
    """Add to a matmul's output: to the bias that is added there, or in an addition of its own."""
    output = matmul.outputs[0]
    readers = list(output.uses())
    if len(readers) == 1 and not output.is_graph_output() and readers[0].node.op_type == "Add":
        terms = [term for term in readers[0].node.inputs if rank_of_weight(term) == 1]
        if len(terms) == 1 and len(terms[0].uses()) == 1 and terms[0].shape == ir.Shape(bias.shape):
            store(terms[0], array(terms[0]) + bias)
            return
    name = output.name
    weight = constant(matmul.graph, f"{_PREFIX}/{matmul.name}/bias", bias.astype(np.float32))
    columns = make("MatMul", list(matmul.inputs), f"{_PREFIX}/{matmul.name}/columns", name=matmul.name)
    columns.meta.update(matmul.meta)
    replace(matmul, [columns, make("Add", [columns.outputs[0], weight], name, f"{_PREFIX}/{matmul.name}/sum")])


def _find(model: ir.Model, start: ir.Value, matmuls: set[str]) -> Sum | None:
    """The sum that begins at a value; None where something reads it, or adds to it, that has no place in it."""
    found = Sum(start)
    sums, normed = {start}, dict[ir.Value, ir.Node]()
    for node in model.graph:
        if node.op_type == "Shape":
            continue
        if moves_tokens(node) and node.inputs[0] in sums:
            sums.add(node.outputs[0])
        elif moves_tokens(node) and node.inputs[0] in normed:
            normed[node.outputs[0]] = normed[node.inputs[0]]
        elif sums.intersection(node.inputs):
            if node.op_type == "LayerNormalization" and _is_plain(node):
                normed[node.outputs[0]] = node
                found.norms.append(node)
            elif node.op_type == "Add":
                if not all(term in sums or _adds(term, found.adding, matmuls) for term in node.inputs):
                    return None
                sums.add(node.outputs[0])
            else:
                return None
        elif normed.keys() & set(node.inputs):
            (norm, *others) = [normed[value] for value in node.inputs if value in normed]
            if others or node.inputs[0] not in normed or node.name not in matmuls:
                return None
            found.reading[node] = norm
    for value, reader in _parts(start, None):
        if not _adds(value, found.first, matmuls):
            found.rest.append((value, reader))
    weights = {*found.first, *found.adding, *(node.inputs[1] for node in found.reading)}
    scales = {value for norm in found.norms for value in norm.inputs[1:]}
    unshared = all(len(weight.uses()) == 1 for weight in weights | scales)
    inner = not any(value.is_graph_output() for value in [*sums, *normed])
    return found if found.reading and unshared and inner else None


def _is_plain(norm: ir.Node) -> bool:
    """Whether a norm is over the last axis, with a vector as its scale and one, if any, as its bias."""
    weights = norm.inputs[1:]
    used = [value for value in norm.outputs if value.uses()]
    return (
        norm.attributes.get_int("axis", -1) == -1
        and bool(weights)
        and all(rank_of_weight(weight) == 1 for weight in weights)
        and used == [norm.outputs[0]]
    )


def _adds(value: ir.Value, adding: list[ir.Value], matmuls: set[str]) -> bool:
    """Note the weights that give a value which is added to the sum; False where there are none."""
    node = value.producer()
    if rank_of_weight(value) and value.shape[-1] > 1:
        adding.append(value)  # a bias, or vectors of positions
    elif node is not None and node.name in matmuls:
        adding.append(node.inputs[1])
    elif node is not None and node.op_type == "Gather" and _is_table(node):
        adding.append(node.inputs[0])
    elif node is not None and (node.op_type == "Unsqueeze" or moves_tokens(node)):
        return _adds(node.inputs[0], adding, matmuls)
    elif node is not None and node.op_type == "Mul" and (factor := _scalar_of(node)) is not None:
        return _adds(next(term for term in node.inputs if term is not factor), adding, matmuls)
    elif node is not None and node.op_type == "Add":
        noted: list[ir.Value] = []
        if not all(_adds(term, noted, matmuls) for term in node.inputs):
            return False
        adding += noted
    else:
        return False
    return True


def _parts(value: ir.Value, reader: ir.Node | None) -> Iterator[tuple[ir.Value, ir.Node | None]]:
    """What a value is the sum of, each with what reads it."""
    node = value.producer()
    if node is None or node.op_type != "Add":
        yield value, reader
        return
    for term in node.inputs:
        yield from _parts(term, node)


def _is_table(gather: ir.Node) -> bool:
    return not gather.attributes.get_int("axis", 0) and rank_of_weight(gather.inputs[0]) == 2


def _scalar_of(node: ir.Node) -> ir.Value | None:
    """The number that a node of two inputs has beside a value."""
    return next((value for value in node.inputs if (n := numbers(value)) is not None and n.size == 1), None)
