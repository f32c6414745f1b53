"""What a pass of a recipe is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx
from numpy.typing import NDArray

from trident_export.errors import ModelsFileError, UsageError
from trident_export.graphs.shape_folding import infer_types
from trident_export.graphs.unpadding import is_packed

# Inputs of a graph by name, a run each.
Feeds = Iterator[Mapping[str, NDArray[Any]]]
# Some, of so many texts that are drawn by a seed.
CalibrationRuns = Callable[[int, int], Feeds]


@dataclass(frozen=True)
class Pass:
    """A pass; its fields are the keys of recipes.toml.

    Attributes:
        nodes: regular expression of the matmuls that it is for, searched in their names.
        refused: devices for which it makes no sense, with the reason.
        for_matmuls: whether it does nothing for a model without matmuls.
    """

    nodes: str = ""
    refused: ClassVar[Mapping[str, str]] = {}
    for_matmuls: ClassVar[bool] = True

    def __post_init__(self) -> None:
        re.compile(self.nodes)

    def apply(
        self, model: onnx.ModelProto, chosen: Sequence[str], runs: CalibrationRuns | None
    ) -> tuple[onnx.ModelProto, set[str]]:
        """The model after the pass, and which of the chosen matmuls it took, so that later passes leave them alone.

        Args:
            model: float32 but for what earlier passes took; it may be changed.
            chosen: names of matmuls, MatMul nodes of an activation and a constant matrix.
            runs: gives inputs to run the graph with; None where there are none.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Calibrated(Pass):
    """A pass that looks at activations.

    Attributes:
        samples: calibration texts, drawn by `seed`.
    """

    samples: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise UsageError(f"samples must be 1 or more, found {self.samples}")

    def feeds(self, runs: CalibrationRuns | None) -> Feeds:
        """The inputs to calibrate with.

        Raises:
            ModelsFileError: there are none.
        """
        if runs is None:
            name = re.sub(r"\B(?=[A-Z])", "_", type(self).__name__).lower()
            raise ModelsFileError(f"a recipe with the pass {name} needs calibration text, which this task has none of")
        return runs(self.samples, self.seed)


@dataclass(frozen=True)
class Keep(Pass):
    """Matmuls that stay in float32."""

    for_matmuls: ClassVar[bool] = False

    def apply(
        self, model: onnx.ModelProto, chosen: Sequence[str], runs: CalibrationRuns | None
    ) -> tuple[onnx.ModelProto, set[str]]:
        """See `Pass`."""
        return model, set(chosen)


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove weights that no node uses any more."""
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def add_domain(model: onnx.ModelProto) -> None:
    """Say that the model has operators of ONNX Runtime's own."""
    if "com.microsoft" not in [entry.domain for entry in model.opset_import]:
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))


# Operators whose outputs have as many dimensions as the input that has most; onnx does not know ONNX Runtime's own.
_KEEPING_RANK = frozenset(
    """
    Add Cast Clip Div Erf FastGelu Gelu LayerNormalization MatMul MatMulNBits Mul Pow QuickGelu Relu Sigmoid
    SimplifiedLayerNormalization SkipLayerNormalization SkipSimplifiedLayerNormalization Split Sqrt Sub Tanh
    """.split()  # noqa: SIM905  (one name a line would hide the rest of the module)
)


def ranks(model: onnx.ModelProto) -> dict[str, int]:
    """Numbers of dimensions by value, as far as anything says."""
    found = {name: len(kind.shape.dim) for name, kind in infer_types(model).items() if kind.HasField("shape")}
    found |= {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    sizes = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if len(tensor.dims) == 1}
    for node in model.graph.node:
        known = [found[name] for name in node.input if name in found]
        for name in node.output:
            if is_packed(name):
                found[name] = 2
            elif node.op_type == "Reshape" and node.input[1] in sizes:
                found[name] = sizes[node.input[1]]
            elif node.op_type == "Gather" and name not in found and len(known) == len(node.input):
                found[name] = known[0] + known[1] - 1
            elif name and name not in found and known and node.op_type in _KEEPING_RANK:
                found[name] = max(known)
    return found
