"""Matmuls in eight bits with scales that are set before serving, from representative text: ONNX Runtime's QDQ form.

One scale for each matmul's input and each column of its weight, so an answer does not depend on who shares the batch.
Weights are of seven bits, because the AVX2 kernels of machines without VNNI saturate with eight (see `per_token`).
Operator references: ONNX, QuantizeLinear; onnxruntime.quantization.quantize_static.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnxruntime.quantization.calibrate import CalibrationDataReader

from trident_export.errors import UsageError
from trident_export.graphs.editing import make, rank_of_weight, replace, save
from trident_export.passes.base import Calibrated, CalibrationRuns, Feeds, matmul_nodes, ranks

METHODS = ("minmax", "entropy", "percentile")


@dataclass(frozen=True)
class Static(Calibrated):
    """Matmuls with calibrated scales.

    Attributes:
        method: how the range of an input is found from what it was on the calibration text: all of it ("minmax"), what
            keeps most information ("entropy"), or all but the largest values ("percentile").
        percentile: of an input's values that are within its range.
    """

    method: str = "minmax"
    percentile: float = 99.99

    refused: ClassVar[Mapping[str, str]] = {
        "cuda": "ONNX Runtime's CUDA provider has no kernel for its matmuls and would compute them in float32"
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS or not 50 < self.percentile <= 100:
            raise UsageError(
                f"method must be one of {', '.join(METHODS)} and percentile from 50 to 100, "
                f"found {self.method!r} and {self.percentile}"
            )

    def apply(self, model: ir.Model, chosen: Sequence[str], runs: CalibrationRuns | None) -> tuple[ir.Model, set[str]]:
        """See `Pass`.

        Raises:
            ModelsFileError: there is nothing to calibrate with.
        """
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

        feeds = self.feeds(runs)
        if not chosen:
            return model, set()
        methods = {
            "minmax": CalibrationMethod.MinMax,
            "entropy": CalibrationMethod.Entropy,
            "percentile": CalibrationMethod.Percentile,
        }
        with tempfile.TemporaryDirectory() as folder, _silence():
            before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
            add_biases(model, chosen)
            for matmul in matmul_nodes(
                model, chosen
            ):  # the quantizer leaves a tensor alone whose type it does not know
                source = matmul.inputs[0]
                source.type = source.type or ir.TensorType(ir.DataType.FLOAT)
            save(model, before)
            quantize_static(
                str(before),
                str(after),
                _Reader(feeds),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["MatMul", "Gemm"],
                nodes_to_quantize=list(chosen),
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=methods[self.method],
                use_external_data_format=True,
                extra_options={
                    "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
                    "CalibPercentile": self.percentile,
                    "CalibStridedMinMax": 1,
                },
            )
            return ir.from_proto(onnx.load(str(after))), set(chosen)


@contextmanager
def _silence() -> Iterator[None]:
    """The calibrators print what they do for each run, and warn of a preparation that the graph has had."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.setLevel(level)


def add_biases(model: ir.Model, chosen: Sequence[str]) -> None:
    """Make each matmul and the constant vector that is added to it one Gemm of the matmul's name, in place.

    ONNX Runtime does so itself when it loads the graph, and then finds no integer kernel, because the vector is
    float32. Only for matmuls of [rows, features], which is what Gemm takes.
    """
    known = ranks(model)
    for matmul in matmul_nodes(model, chosen):
        readers = matmul.outputs[0].uses()
        if len(readers) != 1 or known.get(matmul.inputs[0].name) != 2:
            continue
        ((after, _),) = readers
        bias = [value for value in after.inputs if rank_of_weight(value) == 1]
        if bias and after.op_type == "Add":
            replace(after, [make("Gemm", [*matmul.inputs, bias[0]], after.outputs[0].name, name=matmul.name)])
            matmul.graph.remove(matmul, safe=True)


class _Reader(CalibrationDataReader):
    """Runs in ranges of one: texts have different numbers of tokens, so their tensors can't be put together."""

    def __init__(self, feeds: Feeds) -> None:
        self._feeds = list(feeds)
        self.set_range(0, len(self._feeds))

    def __len__(self) -> int:
        return len(self._feeds)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._range = iter(self._feeds[start_index:end_index])

    def get_next(self) -> Mapping[str, NDArray[Any]] | None:
        return next(self._range, None)
