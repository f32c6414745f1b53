"""What a pass of a recipe is."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from trident_export.errors import ModelsFileError, UsageError
from trident_export.graphs.editing import array, constant, infer, make, numbers, rank_of_weight, replace
from trident_export.graphs.lora import PREFIX
from trident_export.graphs.unpadding import is_packed

# Inputs of a graph by name, one mapping a run.
Feeds = Iterator[Mapping[str, NDArray[Any]]]
# Runs on some calibration texts: how many texts, and the seed that draws them.
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

    def apply(self, model: ir.Model, chosen: Sequence[str], runs: CalibrationRuns | None) -> tuple[ir.Model, set[str]]:
        """Return the model after the pass, and which of the chosen matmuls it took: later passes do not see them.

        Args:
            model: float32 but for what earlier passes took; it may be changed.
            chosen: names of matmuls, MatMul nodes of an activation and a constant matrix.
            runs: inputs to run the graph with; None where there are none.
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

    def apply(self, model: ir.Model, chosen: Sequence[str], runs: CalibrationRuns | None) -> tuple[ir.Model, set[str]]:
        """See `Pass`."""
        return model, set(chosen)


def matmuls(model: ir.Model) -> list[str]:
    """Names of the matmuls of an activation and a constant matrix, which passes choose from; adapters stay in float32.

    Layers that are Gemm (gpt2) become matmuls in the model.
    """
    split_gemms(model)
    return [name for name in _all_matmuls(model) if not name.startswith(PREFIX)]


def adapter_matmuls(model: ir.Model) -> list[str]:
    """Names of the matmuls of adapters."""
    return [name for name in _all_matmuls(model) if name.startswith(PREFIX)]


def _all_matmuls(model: ir.Model) -> list[str]:
    return [node.name for node in model.graph if node.op_type == "MatMul" and rank_of_weight(node.inputs[1]) == 2]


def split_gemms(model: ir.Model) -> None:
    """Replace each Gemm of a constant matrix by a MatMul, and an Add where it has a bias."""
    for gemm in [node for node in model.graph if node.op_type == "Gemm" and rank_of_weight(node.inputs[1]) == 2]:
        source, weight, *bias = gemm.inputs
        factors = [gemm.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
        if factors != [1.0, 1.0] or gemm.attributes.get_int("transA", 0):
            continue
        if gemm.attributes.get_int("transB", 0):
            transposed = np.ascontiguousarray(array(weight).T)
            weight = constant(model.graph, f"{weight.name}_Transposed", transposed)
        name, output = gemm.name, gemm.outputs[0].name
        made = [make("MatMul", [source, weight], f"{output}_MatMul" if bias else output, f"{name}_MatMul")]
        if bias:
            made.append(make("Add", [*made[0].outputs, *bias], output, f"{name}_Add"))
        replace(gemm, made)


def matmul_nodes(model: ir.Model, chosen: Collection[str]) -> list[ir.Node]:
    """The nodes of some matmuls, in the order of the graph."""
    names = set(chosen)
    return [node for node in model.graph if node.name in names]


# Operators whose outputs have as many dimensions as the input that has most; onnx does not know ONNX Runtime's own.
_KEEPING_RANK = frozenset(
    """
    Add Cast Clip Div Erf Exp FastGelu Gelu LayerNormalization MatMul MatMulNBits Mul Neg Pow QuickGelu Relu Sigmoid
    SimplifiedLayerNormalization SkipLayerNormalization SkipSimplifiedLayerNormalization Slice Softmax Split Sqrt Sub
    Tanh Transpose
    """.split()  # noqa: SIM905  (one name a line would hide the rest of the module)
)


def ranks(model: ir.Model) -> dict[str, int]:
    """Numbers of dimensions by value, as far as anything says."""
    shapes = {name: list(value.shape) for name, value in infer(model).items() if value.shape is not None}
    found = {name: len(shape) for name, shape in shapes.items()}
    for node in model.graph:
        names = [value.name for value in node.inputs if value is not None]
        known = [found[name] for name in names if name in found]
        for name in (value.name for value in node.outputs):
            if is_packed(name):
                found[name] = 2
            elif node.op_type == "Reshape" and isinstance(count := shapes.get(names[1], [None])[0], int):
                found[name] = count
            elif node.op_type == "GatherND" and len(known) == len(names) and isinstance(shapes[names[1]][-1], int):
                found[name] = known[0] + known[1] - 1 - shapes[names[1]][-1]
            elif node.op_type == "LinearAttention":
                found[name] = 3 if name == node.outputs[0].name else 4
            elif node.op_type == "Gather" and name not in found and len(known) == len(names):
                found[name] = known[0] + known[1] - 1
            elif node.op_type == "Unsqueeze" and name not in found and (axes := numbers(node.inputs[1])) is not None:
                found |= {name: known[0] + axes.size} if names[0] in found else {}
            elif name and name not in found and len(known) == len(names) and node.op_type in _KEEPING_RANK:
                found[name] = max(known)
    return found
