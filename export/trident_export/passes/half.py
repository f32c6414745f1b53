"""Everything in float16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from trident_export.graphs.editing import array, light, restored, store
from trident_export.passes.base import CalibrationRuns, Pass


@dataclass(frozen=True)
class Half(Pass):
    """The model in float16; logits and last hidden states stay float32."""

    refused: ClassVar[Mapping[str, str]] = {
        "cpu": "a CPU would compute it in float32 and convert at every step; it is for a GPU "
        '(text generation with limits.device = "cuda")'
    }
    for_matmuls: ClassVar[bool] = False

    def apply(self, model: ir.Model, chosen: Sequence[str], runs: CalibrationRuns | None) -> tuple[ir.Model, set[str]]:
        """See `Pass`."""
        from onnxruntime.transformers.float16 import convert_float_to_float16, convert_np_to_float16

        kept = [output.name for output in model.graph.outputs if output.name in ("logits", "last_hidden_state")]
        graph, weights = light(model)
        half = restored(convert_float_to_float16(graph, keep_io_types=kept, disable_shape_infer=True), weights)
        for weight in weights:
            value = half.graph.initializers[weight.name]
            if weight.dtype == ir.DataType.FLOAT:
                value.dtype = ir.DataType.FLOAT16
                store(value, convert_np_to_float16(array(weight)))
        return half, set(chosen)
