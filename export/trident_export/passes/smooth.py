"""Activations that are easier to round: what makes some channels of them large moves into the weights behind.

A matmul of a norm's output is the same when a channel of the norm's scale is divided by a number and the matmul's
weights for it are multiplied by the same. Source: SmoothQuant (Xiao et al. 2022).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from trident_export.errors import UsageError
from trident_export.graphs.editing import array, store
from trident_export.passes.base import Calibrated, CalibrationRuns, adapter_matmuls
from trident_export.passes.calibration import peaks

# Norms by operator: the positions of their scale and, where they have one, their bias among the inputs.
_NORMS: Mapping[str, tuple[int, ...]] = {
    "SimplifiedLayerNormalization": (1,),
    "LayerNormalization": (1, 2),
    "SkipSimplifiedLayerNormalization": (2,),
    "SkipLayerNormalization": (2, 3),
}


@dataclass(frozen=True)
class Smooth(Calibrated):
    """Moves a share of the channels' differences from norms to matmuls, where nothing else reads the norm.

    Attributes:
        alpha: that share; 0: none, 1: all.
    """

    alpha: float = 0.5
    for_matmuls: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha must be from 0 to 1, found {self.alpha:g}")

    def apply(self, model: ir.Model, chosen: Sequence[str], runs: CalibrationRuns | None) -> tuple[ir.Model, set[str]]:
        """See `Pass`; it takes no matmuls.

        Raises:
            ModelsFileError: there is nothing to calibrate with.
        """
        adapters = set(adapter_matmuls(model))
        behind = behind_norms(model, {*chosen, *adapters})
        if not behind:
            return model, set()
        largest = peaks(model, list(behind), self.feeds(runs))
        for name, (norm, matmuls) in behind.items():
            weights = {matmul.inputs[1]: array(matmul.inputs[1]) for matmul in matmuls}
            own = [array(matmul.inputs[1]) for matmul in matmuls if matmul.name not in adapters]
            factors = self.factors(largest[name], np.max([np.abs(matrix).max(axis=1) for matrix in own], axis=0))
            for scale in _scales(norm):
                store(scale, array(scale) / factors)
            for weight, matrix in weights.items():
                store(weight, matrix * factors[:, None])
        return model, set()

    def factors(self, activations: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """For each channel, by its largest activation and weight; their geometric mean is 1."""
        raw = np.maximum(activations, 1e-5) ** self.alpha / np.maximum(weights, 1e-5) ** (1 - self.alpha)
        result: NDArray[np.float32] = (raw / np.exp(np.log(raw).mean())).astype(np.float32)
        return result


def _scales(norm: ir.Node) -> list[ir.Value]:
    inputs = [norm.inputs[position] for position in _NORMS[norm.op_type] if len(norm.inputs) > position]
    return [value for value in inputs if value is not None]


def behind_norms(model: ir.Model, chosen: set[str]) -> dict[str, tuple[ir.Node, list[ir.Node]]]:
    """Outputs of norms that nothing reads but chosen matmuls, with the norm and the matmuls."""
    behind = {}
    for node in model.graph:
        if node.op_type not in _NORMS or node.outputs[0].is_graph_output():
            continue
        matmuls = list(node.outputs[0].consumers())
        own = all(scale.is_initializer() and len(scale.uses()) == 1 for scale in _scales(node))
        if matmuls and own and all(matmul.name in chosen for matmul in matmuls):
            behind[node.outputs[0].name] = (node, matmuls)
    return behind
