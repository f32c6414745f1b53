"""What matmuls read becomes as even as the output of a rotated norm, where no rotation reaches it.

Two things that a graph computes when it runs: blocks of channels are rotated, and each token is divided by its largest
number, which multiplies the matmul's output again. So one scale that is set before serving is enough for all tokens, as
`gptq_per_channel` wants it. The inverse of the rotation is folded into the weight.
Source: QuaRot (Ashkboos et al. 2024), for the rotation at the down projection.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from trident_export.errors import UsageError
from trident_export.graphs.editing import add_domain, array, constant, drop_unused, make, reduced, replace, store
from trident_export.passes.base import Calibrated, CalibrationRuns, matmul_nodes, ranks
from trident_export.passes.calibration import watch
from trident_export.passes.rotate import has_rotated_heads, is_normed, rotation

_LEAST = 1e-12  # a token of zeros stays one
_TOKENS = "/tokens"  # the end of the name of what matmuls read


@dataclass(frozen=True)
class Spread(Calibrated):
    """Spreads what matmuls read over their channels, and makes 1 the largest number of every token.

    Outputs of norms and heads that `rotate` has rotated are not rotated again.

    Attributes:
        block: channels that are rotated together, a power of two: the largest that the channels allow, up to this.
        seed: of the rotation's signs, and of the calibration texts.
        norms: whether tokens behind a rotated norm are divided, too. They are about as large as each other, but one
            scale for all must do for the largest number of any.
        loudest: matmuls are left to later passes where the largest number of any token of calibration text is more
            times that of the median token, as where a layer writes a token's massive activation, or takes it away:
            eight bits of so large a number are coarse beside what the layers behind read of it. Infinity: none is
            left, and no text is needed.
    """

    block: int = 64
    norms: bool = False
    loudest: float = math.inf
    for_matmuls: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1 or self.block & (self.block - 1):
            raise UsageError(f"block must be a power of two, found {self.block}")
        if not self.loudest > 1:
            raise UsageError(f"loudest must be more than 1, found {self.loudest:g}")

    def apply(self, model: ir.Model, chosen: Sequence[str], runs: CalibrationRuns | None) -> tuple[ir.Model, set[str]]:
        """See `Pass`; it takes no matmuls."""
        add_domain(model)  # of norms with a sum, which inference refuses to pass without it
        known = ranks(model)
        readers: dict[ir.Value, list[ir.Node]] = defaultdict(list)
        for matmul in matmul_nodes(model, chosen):
            source = matmul.inputs[0]
            own = len(matmul.inputs[1].uses()) == 1
            if own and known.get(source.name, 0) >= 2 and (self.norms or not is_normed(source)):
                readers[source].append(matmul)
        loud = self._loud(model, [source.name for source in readers], runs) if math.isfinite(self.loudest) else set()
        for source, matmuls in readers.items():
            if source.name in loud:
                continue
            self._spread(model, source, matmuls, known[source.name])
        drop_unused(model)
        return model, set()

    def _loud(self, model: ir.Model, names: Sequence[str], runs: CalibrationRuns | None) -> set[str]:
        """Those of some values that have a token which is too large."""
        largest: dict[str, list[NDArray[np.float32]]] = defaultdict(list)
        for values in watch(model, names, self.feeds(runs)):
            for name, value in values.items():
                largest[name].append(np.abs(value).max(axis=-1, initial=0.0).ravel())
        tokens = {name: np.concatenate(found) for name, found in largest.items()}
        return {name for name, found in tokens.items() if found.size and found.max() > self.loudest * np.median(found)}

    def _spread(self, model: ir.Model, source: ir.Value, matmuls: Sequence[ir.Node], rank: int) -> None:
        graph, path = matmuls[0].graph, f"spread/{source.name}"
        channels = matmuls[0].inputs[1].shape[0]
        block = math.gcd(channels, self.block)
        nodes: list[ir.Node] = []
        value = source
        rotated = is_normed(source) or all(has_rotated_heads(matmul) for matmul in matmuls)
        if block > 1 and not rotated:
            rotate = rotation(block, self.seed)
            sizes = [[0] * (rank - 1) + rest for rest in ([channels // block, block], [channels])]
            shapes = [constant(graph, f"spread/{rank}/{size}", np.array(size, np.int64)) for size in sizes]
            matrix = constant(graph, f"spread/rotation/{block}/{self.seed}", rotate)
            nodes.append(make("Reshape", [value, shapes[0]], f"{path}/blocks"))
            nodes.append(make("MatMul", [*nodes[-1].outputs, matrix], f"{path}/rotated"))
            nodes.append(make("Reshape", [*nodes[-1].outputs, shapes[1]], f"{path}/joined"))
            value = nodes[-1].outputs[0]
            for matmul in matmuls:
                weight = array(matmul.inputs[1])
                turned = rotate.T @ weight.reshape(-1, block, weight.shape[-1])
                store(matmul.inputs[1], turned.reshape(weight.shape))
        absolute = make("Abs", [value], f"{path}/absolute")
        last = constant(graph, "spread/last", np.array([-1], np.int64))
        inputs, attributes = reduced(model, absolute.outputs[0], last)
        largest = make("ReduceMax", inputs, f"{path}/largest", keepdims=1, **attributes)
        least = constant(graph, "spread/least", np.array(_LEAST, np.float32))
        scale = make("Max", [*largest.outputs, least], f"{path}/scale")
        tokens = make("Div", [value, *scale.outputs], f"{path}{_TOKENS}")
        matmuls[0].prepend([*nodes, absolute, largest, scale, tokens])
        for matmul in matmuls:
            output = matmul.outputs[0].name
            columns = make("MatMul", [*tokens.outputs, matmul.inputs[1]], f"spread/{output}/columns", name=matmul.name)
            columns.meta.update(matmul.meta)
            replace(matmul, [columns, make("Mul", [*columns.outputs, *scale.outputs], output, f"spread/{output}")])


def is_spread(value: ir.Value) -> bool:
    """Whether a value is what `Spread` makes for matmuls."""
    name: str = value.name
    return name.startswith("spread/") and name.endswith(_TOKENS)
