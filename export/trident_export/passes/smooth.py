"""Activations that are easier to round: what makes some channels of them large moves into the weights behind.

A matmul of a norm's output is the same when a channel of the norm's scale is divided by a number and the matmul's
weights for it are multiplied by the same. Source: SmoothQuant (Xiao et al. 2022).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from trident_export.errors import UsageError
from trident_export.passes.base import Calibrated, CalibrationRuns
from trident_export.passes.calibration import peaks

# Norms by operator: the places of their scale and, where they have one, their bias among the inputs.
_NORMS: Mapping[str, tuple[int, ...]] = {
    "SimplifiedLayerNormalization": (1,),
    "LayerNormalization": (1, 2),
    "SkipSimplifiedLayerNormalization": (2,),
    "SkipLayerNormalization": (2, 3),
}


@dataclass(frozen=True)
class Smooth(Calibrated):
    """Moves a share of the channels' differences from norms to matmuls that nothing else shares the norm with.

    Attributes:
        alpha: that share; 0: none, 1: all.
    """

    alpha: float = 0.5
    for_matmuls: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha must be from 0 to 1, found {self.alpha:g}")

    def apply(
        self, model: onnx.ModelProto, chosen: Sequence[str], runs: CalibrationRuns | None
    ) -> tuple[onnx.ModelProto, set[str]]:
        """See `Pass`; it takes no matmuls.

        Raises:
            ModelsFileError: there is nothing to calibrate with.
        """
        groups = behind_norms(model, set(chosen))
        if not groups:
            return model, set()
        weights = {tensor.name: tensor for tensor in model.graph.initializer}
        largest = peaks(model, list(groups), self.feeds(runs))
        for name, (norm, matmuls) in groups.items():
            matrices = {node.input[1]: numpy_helper.to_array(weights[node.input[1]]) for node in matmuls}
            factors = self.factors(largest[name], np.max([np.abs(m).max(axis=1) for m in matrices.values()], axis=0))
            for place in _NORMS[norm.op_type]:
                if len(norm.input) > place and norm.input[place]:
                    _store(weights[norm.input[place]], numpy_helper.to_array(weights[norm.input[place]]) / factors)
            for key, matrix in matrices.items():
                _store(weights[key], matrix * factors[:, None])
        return model, set()

    def factors(self, activations: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """For each channel, by its largest activation and weight; their geometric mean is 1."""
        raw = np.maximum(activations, 1e-5) ** self.alpha / np.maximum(weights, 1e-5) ** (1 - self.alpha)
        result: NDArray[np.float32] = (raw / np.exp(np.log(raw).mean())).astype(np.float32)
        return result


def behind_norms(model: onnx.ModelProto, chosen: set[str]) -> dict[str, tuple[onnx.NodeProto, list[onnx.NodeProto]]]:
    """Outputs of norms that nothing reads but chosen matmuls, with the norm and the matmuls."""
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)
    given = {output.name for output in model.graph.output}
    groups = {}
    for node in model.graph.node:
        if node.op_type not in _NORMS or node.output[0] in given:
            continue
        matmuls = readers[node.output[0]]
        own = all(len(readers[node.input[place]]) == 1 for place in _NORMS[node.op_type] if len(node.input) > place)
        if matmuls and own and all(reader.name in chosen for reader in matmuls):
            groups[node.output[0]] = (node, matmuls)
    return groups


def _store(tensor: onnx.TensorProto, value: NDArray[Any]) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value, np.float32), tensor.name))
