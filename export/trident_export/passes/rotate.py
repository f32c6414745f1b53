"""Activations without large channels: what blocks add up is rotated, and the weights with it.

What a root-mean-square norm computes turns with its input, once its scale is in the weights behind it. So a rotation of
the sum that all blocks read and add to changes no answer and costs nothing: what adds to it is turned, what reads it is
turned back. A number that was large in one channel is spread over all of them, and a row of a norm's output, whose mean
square is 1, has no large numbers at all. Sources: QuaRot (Ashkboos et al. 2024), SpinQuant (Liu et al. 2024).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from trident_export.errors import UsageError
from trident_export.passes.base import CalibrationRuns, Pass, drop_unused

_ONES = "rotate/ones"
# Root-mean-square norms by operator: where their scale stands among the inputs.
_NORMS = {"SimplifiedLayerNormalization": 1, "SkipSimplifiedLayerNormalization": 2}


@dataclass(frozen=True)
class Rotate(Pass):
    """Rotates what the blocks of a decoder add up; before all passes that take matmuls.

    A graph that has something else between its blocks than sums and root-mean-square norms is left as it is.

    Attributes:
        seed: of the rotation's signs.
    """

    seed: int = 0
    for_matmuls: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nodes:
            raise UsageError("rotate is for all matmuls, not for some nodes")

    def apply(
        self, model: onnx.ModelProto, chosen: Sequence[str], runs: CalibrationRuns | None
    ) -> tuple[onnx.ModelProto, set[str]]:
        """See `Pass`; it takes no matmuls."""
        places = find_places(model, set(chosen))
        if places is None:
            return model, set()
        weights = {tensor.name: tensor for tensor in model.graph.initializer}
        values = {name: numpy_helper.to_array(weights[name]) for name in places.all}
        (channels,) = {values[name].shape[-1] for name in places.adding}
        turn = rotation(channels, self.seed)
        for name in places.adding:
            _store(weights[name], values[name] @ turn)
        for name, scale in places.reading.items():
            _store(weights[name], turn.T @ (values[scale][:, None] * values[name]))
        # All norms have one scale then, which passes that would change it for one of them see.
        model.graph.initializer.append(numpy_helper.from_array(np.ones(channels, np.float32), _ONES))
        for node in model.graph.node:
            place = _NORMS.get(node.op_type)
            if place is not None and node.input[place] in places.reading.values():
                node.input[place] = _ONES
        drop_unused(model.graph)
        return model, set()


def _store(tensor: onnx.TensorProto, value: NDArray[np.float32]) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), tensor.name))


def rotation(channels: int, seed: int) -> NDArray[np.float32]:
    """An orthogonal matrix [channels, channels] whose numbers are all about as large, so that it spreads what it turns.

    The Kronecker product of a Hadamard matrix, as large as fits, and a cosine transform; rows have random signs.
    """
    size = channels & -channels  # the largest power of two in it
    hadamard = reduce(np.kron, [np.array([[1.0, 1.0], [1.0, -1.0]])] * int(math.log2(size)), np.ones((1, 1)))
    rest = channels // size
    cosines = np.cos(np.pi * (np.arange(rest)[None] + 0.5) * np.arange(rest)[:, None] / rest)
    cosines /= np.linalg.norm(cosines, axis=1, keepdims=True)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], channels)
    turn: NDArray[np.float32] = (signs[:, None] * np.kron(hadamard / math.sqrt(size), cosines)).astype(np.float32)
    return turn


@dataclass
class Places:
    """Weights that a rotation changes.

    Attributes:
        adding: what they give is turned.
        reading: matmuls of a norm's output, each with the norm's scale.
    """

    adding: list[str] = field(default_factory=list)
    reading: dict[str, str] = field(default_factory=dict)

    @property
    def all(self) -> set[str]:
        """Every weight, norms' scales included."""
        return {*self.adding, *self.reading, *self.reading.values()}


def find_places(model: onnx.ModelProto, matmuls: set[str]) -> Places | None:
    """The weights around the sum that begins at the table of the tokens' embeddings.

    None where something reads that sum, or adds to it, that does not turn with it.
    """
    places = Places()
    weights = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output if name}
    sums: set[str] = set()
    normed: dict[str, str] = {}  # outputs of norms, with the norm's scale
    for node in model.graph.node:
        if node.op_type == "Gather" and weights.get(node.input[0]) == 2 and not sums:
            places.adding.append(node.input[0])
            sums.add(node.output[0])
        elif sums.intersection(node.input):
            scale = _NORMS.get(node.op_type)
            if scale is None and node.op_type != "Add":
                return None
            for part in node.input[:scale]:
                if part not in sums and not _add_givers(part, places, makers, weights, matmuls):
                    return None
            if scale is None:
                sums.add(node.output[0])
            else:
                normed[node.output[0]] = node.input[scale]
                sums.update(node.output[3:])
        elif node.input and node.input[0] in normed:
            if node.op_type == "Gather":  # of the tokens whose logits are wanted
                normed[node.output[0]] = normed[node.input[0]]
            elif node.name in matmuls:
                places.reading[node.input[1]] = normed[node.input[0]]
            else:
                return None
    readers = Counter(name for node in model.graph.node for name in node.input)
    given = {output.name for output in model.graph.output}
    alone = all(readers[name] == 1 for name in places.all)
    return places if places.reading and alone and not given & (sums | set(normed)) else None


def _add_givers(
    name: str, places: Places, makers: Mapping[str, onnx.NodeProto], weights: Mapping[str, int], matmuls: set[str]
) -> bool:
    """Note the weights that turn a value which is added to the sum; False where none do."""
    node = makers.get(name)
    if weights.get(name) == 1:
        places.adding.append(name)
    elif node is not None and node.name in matmuls:
        places.adding.append(node.input[1])
    elif node is not None and node.op_type == "Add":
        return all(_add_givers(part, places, makers, weights, matmuls) for part in node.input)
    else:
        return False
    return True
