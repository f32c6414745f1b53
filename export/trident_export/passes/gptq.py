"""Weights that are rounded one channel after the other, so that later channels make good what earlier ones get wrong.

They can as far as the channels go together in calibration text. Source: GPTQ (Frantar et al. 2022), here from the
channel that is largest to the one that is smallest, by the activations of the float32 graph.
Operator references: ONNX, QuantizeLinear; onnxruntime docs/ContribOperators.md, MatMulIntegerToFloat, MatMulNBits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from trident_export.errors import UsageError
from trident_export.graphs.editing import add_domain, array, constant, drop_unused, make, replace
from trident_export.passes import pairs
from trident_export.passes.base import Calibrated, CalibrationRuns, matmul_nodes
from trident_export.passes.calibration import Moments, moments
from trident_export.passes.groups import check_group, make_matmul
from trident_export.passes.per_token import ACTIVATION_LARGEST, PerToken
from trident_export.passes.spread import is_spread
from trident_export.progress import Counted, track

Floats = NDArray[np.float32]

_LEAST_ROWS = 32  # that a scale for all activations is set by
_OUTPUTS = 2**14  # outputs rounded at once: a head has ten times more
_TOGETHER = 64  # channels that are rounded before the weights of all later ones are corrected


@dataclass(frozen=True)
class _Gptq(Calibrated):
    """A pass that rounds so.

    Attributes:
        damp: added to each channel's second moment, as a share of their mean: more of it trusts the text less.
    """

    damp: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damp <= 0:
            raise UsageError(f"damp must be more than 0, found {self.damp:g}")

    def apply(self, model: ir.Model, chosen: Sequence[str], runs: CalibrationRuns | None) -> tuple[ir.Model, set[str]]:
        """See `Pass`.

        Raises:
            ModelsFileError: there is nothing to calibrate with.
        """
        readers: dict[str, list[ir.Node]] = defaultdict(list)
        for matmul in matmul_nodes(model, chosen):
            readers[matmul.inputs[0].name].append(matmul)
        channels = {source: nodes[0].inputs[1].shape[0] for source, nodes in readers.items()}
        taken: set[str] = set()
        moments_of_each = moments(model, channels, lambda: self.feeds(runs))
        for source, seen in track(Counted(moments_of_each, len(channels)), "GPTQ"):
            if self.fits(seen):
                self.quantize(readers[source], seen)
                taken.update(matmul.name for matmul in readers[source])
        if taken:
            drop_unused(model)
            add_domain(model)
        return model, taken

    def fits(self, seen: Moments) -> bool:
        """Whether the matmuls of an activation are for this pass; if not, they are left to later ones."""
        return True

    def quantize(self, matmuls: Sequence[ir.Node], seen: Moments) -> None:
        """Replace each of the matmuls of one activation."""
        raise NotImplementedError


@dataclass(frozen=True)
class GptqPerChannel(_Gptq):
    """Matmuls in eight bits with a scale for each column of the weight and one fixed scale for all activations.

    That is fine enough where rows are about as wide as each other: behind norms, after `rotate`. It costs one operator,
    and integers add up to the same whatever else is in the batch. The AVX2 kernels of machines without VNNI add the
    products of two neighbouring channels in sixteen bits, so two weights of one sign are together 128 at most.

    Attributes:
        peak_to_rms: matmuls are left where the largest number of their input is more times its root mean square.
        margin: the largest activation that is not clipped, as a multiple of the largest in the text; behind `spread`
            nothing is clipped.
    """

    peak_to_rms: float = 6.0  # of a normal distribution, two numbers in a billion are larger
    margin: float = 0.85  # of a normal distribution, the error is smallest if a little is clipped
    refused: ClassVar[Mapping[str, str]] = PerToken.refused

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.margin <= 0 or self.peak_to_rms <= 0:
            found = f"{self.margin:g} and {self.peak_to_rms:g}"
            raise UsageError(f"margin and peak_to_rms must be more than 0, found {found}")

    def fits(self, seen: Moments) -> bool:
        """See `_Gptq`; what too few rows were seen of, such as a rare expert's input, has no scale."""
        return seen.rows >= _LEAST_ROWS and seen.peak <= self.peak_to_rms * seen.root_mean_square

    def quantize(self, matmuls: Sequence[ir.Node], seen: Moments) -> None:
        """See `_Gptq`."""
        graph, source = matmuls[0].graph, matmuls[0].inputs[0]
        middle = constant(graph, "gptq/middle", np.array(128, np.uint8))
        # A token with a scale of its own has its largest number at the end of the range.
        margin = 1.0 if is_spread(source) else self.margin
        step = max(seen.peak * margin, 1e-6) / ACTIVATION_LARGEST
        step = constant(graph, f"gptq/{source.name}/step", np.array(step, np.float32))
        integers = make("QuantizeLinear", [source, step, middle], f"gptq/{source.name}/integers")
        matmuls[0].prepend(integers)
        for matmul in matmuls:
            path, weight = f"gptq/{matmul.name}", array(matmul.inputs[1])
            steps = pairs.steps(weight)
            limits = (-pairs.WEIGHT_LARGEST, pairs.WEIGHT_LARGEST)
            rounded = round_weights(weight, steps[None], seen.gram, self.damp, limits, pairs.PAIR_LARGEST)
            inputs = [
                *integers.outputs,
                constant(graph, f"{path}/weight", rounded.astype(np.int8)),
                step,
                constant(graph, f"{path}/steps", steps),
                middle,
            ]
            output = matmul.outputs[0].name
            replace(matmul, [make("MatMulIntegerToFloat", inputs, output, matmul.name, "com.microsoft")])


@dataclass(frozen=True)
class GptqGroups(_Gptq):
    """Weights of 4 or 8 bits in groups, without zero points, as `Groups` makes them but for how they are rounded.

    Attributes:
        bits: of a weight.
        group: weights in a group, which share a scale.
    """

    bits: int = 8
    group: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_group(self.bits, self.group)

    def quantize(self, matmuls: Sequence[ir.Node], seen: Moments) -> None:
        """See `_Gptq`."""
        for matmul in matmuls:
            path, weight = f"gptq/{matmul.name}", array(matmul.inputs[1])
            channels, outputs = weight.shape
            middle = 2 ** (self.bits - 1)
            padded = np.pad(weight, ((0, -channels % self.group), (0, 0)))
            groups = padded.reshape(-1, self.group, outputs)
            # There is one more level below the middle than above: for the largest weight, by a step of its sign.
            largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)[:, 0]
            steps = (np.where(np.abs(largest) < 1e-12, 1e-12, largest) / -middle).astype(np.float32)
            every = np.repeat(steps, self.group, axis=0)[:channels]
            levels = np.full(padded.shape, middle, np.uint8)
            rounded = round_weights(weight, every, seen.gram, self.damp, (-middle, middle - 1))
            levels[:channels] = (rounded + middle).astype(np.uint8)
            packed = np.ascontiguousarray(levels.T).reshape(outputs, -1, self.group)
            if self.bits == 4:
                packed = packed[..., 0::2] | (packed[..., 1::2] << np.uint8(4))
            inputs = [
                matmul.inputs[0],
                constant(matmul.graph, f"{path}/weight", packed),
                constant(matmul.graph, f"{path}/steps", np.ascontiguousarray(steps.T)),
            ]
            output = matmul.outputs[0].name
            replace(matmul, [make_matmul(matmul.name, inputs, output, weight.shape, self.bits, self.group)])


def round_weights(
    weight: Floats, steps: Floats, gram: Floats, damp: float, limits: tuple[int, int], pair: int | None = None
) -> Floats:
    """Whole numbers that times `steps` are weights with nearly the same matmuls.

    Args:
        weight: [channels, outputs].
        steps: [channels, outputs], or [1, outputs] if all channels have the same.
        gram: second moments of the channels [channels, channels].
        damp: see the passes.
        limits: the least and the largest number.
        pair: the largest sum, but for its sign, of two neighbouring channels' numbers; None: any.
    """
    moment = gram.astype(np.float64)
    moment[np.diag_indices_from(moment)] += damp * moment.trace() / len(moment) + 1e-12
    order = np.argsort(-moment.diagonal())  # what matters most is rounded first, when all others can make up for it
    # Row i of the upper factor of the inverse says how channels after i change for what i is off.
    upper = np.linalg.cholesky(np.linalg.inv(moment[np.ix_(order, order)])).T.astype(np.float32)
    neighbours = np.empty_like(order)
    neighbours[order] = np.arange(len(order))
    neighbours = neighbours[np.minimum(order ^ 1, len(order) - 1)]
    result = np.empty(weight.shape, np.float32)
    for first in range(0, weight.shape[1], _OUTPUTS):
        part = slice(first, first + _OUTPUTS)
        left, step = weight[order, part].astype(np.float32), np.broadcast_to(steps, weight.shape)[order, part]
        result[order, part] = _round(left, step, upper, limits, neighbours, pair)
    return result


def _round(
    left: Floats, step: Floats, upper: Floats, limits: tuple[int, int], neighbours: NDArray[np.intp], pair: int | None
) -> Floats:
    """Weights, which are used up, in the order of rounding; of each channel, where its neighbour stands in it."""
    rounded = np.zeros_like(left)
    low, high = (np.float32(limit) for limit in limits)
    for start in range(0, len(left), _TOGETHER):
        end = min(start + _TOGETHER, len(left))
        errors = np.empty_like(left[start:end])
        for channel in range(start, end):
            if pair is not None:  # of a neighbour that is not rounded yet, the number is 0
                other = rounded[neighbours[channel]]
                low, high = (
                    np.maximum(limits[0], -pair - np.minimum(other, 0)),
                    np.minimum(limits[1], pair - np.maximum(other, 0)),
                )
            rounded[channel] = np.clip(np.rint(left[channel] / step[channel]), low, high)
            error = (left[channel] - rounded[channel] * step[channel]) / upper[channel, channel]
            left[channel:end] -= np.outer(upper[channel, channel:end], error)
            errors[channel - start] = error
        left[end:] -= upper[start:end, end:].T @ errors
    return rounded
