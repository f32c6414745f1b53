"""Activations without large channels: the residual stream is rotated, and the weights around it with it.

What a root-mean-square norm computes rotates with its input, once its scale is in the weights behind it. So a rotation
of the sum that all layers read and add to changes no answer and costs nothing: what adds to it is rotated, what reads
it is rotated back. A number that was large in one channel is spread over all of them, and a row of a norm's output,
whose mean square is 1, has no large numbers at all.
Sources: QuaRot (Ashkboos et al. 2024), SpinQuant (Liu et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from trident_export.errors import UsageError
from trident_export.graphs.editing import array, constant, drop_unused, make, numbers, rank_of_weight, store
from trident_export.graphs.lora import PREFIX
from trident_export.graphs.unpadding import moves_tokens
from trident_export.passes.base import CalibrationRuns, Pass, adapter_matmuls
from trident_export.passes.heads import find_heads
from trident_export.passes.layer_norms import Centred, centre
from trident_serving.generation.decoder import IMAGE_EMBEDS

# Root-mean-square norms by operator: where their scale stands among the inputs.
_NORMS = {"SimplifiedLayerNormalization": 1, "SkipSimplifiedLayerNormalization": 2}
_ROWS = ("Gather", "GatherND", "Reshape")  # operators that choose or arrange tokens
_ONES = "rotate/ones"  # the scale of norms whose output is rotated
_TURNED = "turned"  # of a matmul whose input has rotated heads
_TOKENS = "input_ids"  # the input that the sum begins with


@dataclass(frozen=True)
class Rotate(Pass):
    """Rotates the residual stream of a decoder or an encoder; before all passes that take matmuls.

    A graph that has something else between its layers than sums and root-mean-square norms is left as it is.

    Attributes:
        seed: of the rotation's signs.
        heads: rotates every head of the values, too, where nothing but the attention is between the matmuls that give
            and read them.
        layer_norms: makes root-mean-square norms of LayerNorms first, where one stands before each layer.
    """

    seed: int = 0
    heads: bool = False
    layer_norms: bool = False
    for_matmuls: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nodes:
            raise UsageError("rotate is for all matmuls, not for some nodes")

    def apply(self, model: ir.Model, chosen: Sequence[str], runs: CalibrationRuns | None) -> tuple[ir.Model, set[str]]:
        """See `Pass`; it takes no matmuls."""
        if self.heads:
            rotate_heads(model, set(chosen), self.seed)
        centred = centre(model, set(chosen)) if self.layer_norms else None
        found = find_rotated(model, {*chosen, *adapter_matmuls(model)}, centred)
        if found is None:
            return model, set()
        (channels,) = {weight.shape[-1] for weight in found.adding}
        rotate = rotation(channels, self.seed)
        for weight, scale in found.reading.items():
            store(weight, rotate.T @ (array(scale)[:, None] * array(weight)))
        for weight in found.adding:
            store(weight, array(weight) @ rotate)
        if found.vectors is not None:
            _rotate_vectors(model, found.vectors, rotate)
        # All norms have one scale then, which passes that would change it for one of them see.
        ones = constant(model.graph, _ONES, np.ones(channels, np.float32))
        for scale in set(found.reading.values()):
            scale.replace_all_uses_with(ones)
        drop_unused(model)
        return model, set()


def rotation(channels: int, seed: int) -> NDArray[np.float32]:
    """An orthogonal matrix [channels, channels] of numbers that are all about as large, so that it spreads a channel.

    The Kronecker product of a Hadamard matrix, as large as fits, and a cosine transform; rows have random signs.
    """
    size = channels & -channels  # the largest power of two in it
    hadamard = reduce(np.kron, [np.array([[1.0, 1.0], [1.0, -1.0]])] * int(math.log2(size)), np.ones((1, 1)))
    rest = channels // size
    cosines = np.cos(np.pi * (np.arange(rest)[None] + 0.5) * np.arange(rest)[:, None] / rest)
    cosines /= np.linalg.norm(cosines, axis=1, keepdims=True)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], channels)
    rotated: NDArray[np.float32] = (signs[:, None] * np.kron(hadamard / math.sqrt(size), cosines)).astype(np.float32)
    return rotated


@dataclass
class Rotated:
    """Weights that a rotation changes.

    Attributes:
        adding: those whose output is rotated.
        reading: weights of a norm's output, each with the norm's scale.
        vectors: the node that puts vectors of images in the places of tokens; None: there is none.
    """

    vectors: ir.Node | None = None
    adding: list[ir.Value] = field(default_factory=list)
    reading: dict[ir.Value, ir.Value] = field(default_factory=dict)

    @property
    def all(self) -> set[ir.Value]:
        """Every weight, norms' scales included."""
        return {*self.adding, *self.reading, *self.reading.values()}


def find_rotated(model: ir.Model, matmuls: set[str], centred: Centred | None = None) -> Rotated | None:
    """The weights around the sum that begins at the table of the tokens' embeddings.

    None where something reads that sum, or adds to it, that does not rotate with it.

    Args:
        centred: where that sum begins otherwise.
    """
    found = Rotated()
    sums: set[ir.Value] = set()
    if centred is not None:
        found.adding += centred.first
        sums.add(centred.start)
    normed: dict[ir.Value, ir.Value] = {}  # outputs of norms, with the norm's scale
    ids = _from_ids(model)
    for node in model.graph:
        if node.name.startswith(f"{PREFIX}mask") or node.op_type == "Shape":
            continue
        if node.op_type == "Gather" and rank_of_weight(node.inputs[0]) == 2 and not sums and node.inputs[1] in ids:
            found.adding.append(node.inputs[0])
            sums.add(node.outputs[0])
        elif node.op_type == "ScatterND" and node.inputs[0] in sums and node.inputs[2].name == IMAGE_EMBEDS:
            found.vectors = node
            sums.add(node.outputs[0])
        elif node.inputs and node.inputs[0] in sums and moves_tokens(node):
            sums.add(node.outputs[0])
        elif sums.intersection(node.inputs):
            scale = _NORMS.get(node.op_type)
            if scale is None and node.op_type != "Add":
                return None
            for term in node.inputs[:scale]:
                if term not in sums and not _add_terms(term, found, matmuls):
                    return None
            if scale is None:
                sums.add(node.outputs[0])
            else:
                normed[node.outputs[0]] = node.inputs[scale]
                sums.update(node.outputs[3:])
        elif node.inputs and node.inputs[0] in normed:
            # Of the tokens whose logits are wanted, or of all but padding; T5's before a head that is its table, too.
            rows = node.op_type == "Gather" or moves_tokens(node)
            if rows or (node.op_type == "Mul" and _is_scalar(node.inputs[1])):
                normed[node.outputs[0]] = normed[node.inputs[0]]
            elif node.name in matmuls:
                found.reading[node.inputs[1]] = normed[node.inputs[0]]
            else:
                return None
    unshared = all(len(weight.uses()) == 1 for weight in found.all)
    inner = not any(value.is_graph_output() for value in [*sums, *normed])
    return found if found.reading and unshared and inner else None


def _from_ids(model: ir.Model) -> set[ir.Value]:
    """The tokens' ids, and what is computed from them, but for their number."""
    found = {value for value in model.graph.inputs if value.name == _TOKENS}
    for node in model.graph:
        if node.op_type != "Shape" and found.intersection(node.inputs):
            found.update(node.outputs)
    return found


def _is_scalar(value: ir.Value) -> bool:
    found = numbers(value)
    return found is not None and found.size == 1


def _rotate_vectors(model: ir.Model, scatter: ir.Node, rotate: NDArray[np.float32]) -> None:
    """Rotate vectors of images, of which a run has none or two at least, before they are in the places of tokens."""
    matrix = constant(model.graph, f"{IMAGE_EMBEDS}/rotation", rotate)
    rotated = make("MatMul", [scatter.inputs[2], matrix], f"{IMAGE_EMBEDS}/rotated")
    scatter.prepend(rotated)
    scatter.replace_input_with(2, rotated.outputs[0])


def _add_terms(value: ir.Value, found: Rotated, matmuls: set[str]) -> bool:
    """Note the weights that rotate a value which is added to the sum; False where none do."""
    node = value.producer()
    if rank_of_weight(value) == 1:
        found.adding.append(value)
    elif node is not None and node.name in matmuls:
        found.adding.append(node.inputs[1])
    elif node is not None and node.op_type == "Add":
        return all(_add_terms(term, found, matmuls) for term in node.inputs)
    elif node is not None and moves_tokens(node):
        return _add_terms(node.inputs[0], found, matmuls)
    else:
        return False
    return True


def rotate_heads(model: ir.Model, matmuls: set[str], seed: int) -> None:
    """Rotate every head of the values, in the weights before and behind the attention."""
    for found in find_heads(model, matmuls):
        rotate = rotation(found.size, seed)
        width = found.heads * found.size
        for value in found.giving:
            numbers = array(value).copy()
            values = numbers[..., -width:]
            turned = values.reshape(*values.shape[:-1], found.heads, found.size) @ rotate
            numbers[..., -width:] = turned.reshape(values.shape)
            store(value, numbers)
        weight = found.matmul.inputs[1]
        rows = array(weight)
        store(weight, (rotate.T @ rows.reshape(-1, found.size, rows.shape[-1])).reshape(rows.shape))
        found.matmul.meta[_TURNED] = True


def is_normed(value: ir.Value) -> bool:
    """Whether a value is the output of a rotated norm, or tokens of it."""
    node = value.producer()
    while node is not None and (node.op_type in _ROWS or (node.op_type == "Mul" and _is_scalar(node.inputs[1]))):
        node = node.inputs[0].producer()
    position = _NORMS.get(node.op_type) if node is not None else None
    return node is not None and position is not None and node.inputs[position].name == _ONES


def has_rotated_heads(matmul: ir.Node) -> bool:
    """Whether a matmul reads heads that `rotate_heads` rotated."""
    return _TURNED in matmul.meta
