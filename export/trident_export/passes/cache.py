"""Keys and values in 8 bits: a quarter of the memory, and less to read for every token.

ONNX Runtime's `GroupQueryAttention` rounds what it appends to the cache by a scale for each channel and multiplies by
it when it reads. A channel keeps its scale for all tokens, so calibration text sets it before serving; larger numbers
in other text are clipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from trident_export.errors import ModelsFileError, UsageError
from trident_export.graphs.decoder_passes import QUERY_SEQLENS, attention_nodes
from trident_export.graphs.editing import constant
from trident_export.passes.base import Calibrated, CalibrationRuns
from trident_export.passes.calibration import peaks

_LARGEST = 127
# Positions among the operator's inputs: past keys and past values, and the scales of both.
_PAST, _SCALES = (3, 4), (12, 13)


@dataclass(frozen=True)
class Cache(Calibrated):
    """Rounds the cache of a text generator; other decoders are left as they are.

    Attributes:
        margin: the largest number that a scale reaches, as a multiple of the largest that was seen.
    """

    margin: float = 1.15
    refused: ClassVar[Mapping[str, str]] = {"cuda": "only the CPU's operator is known to round the cache as it is here"}
    for_matmuls: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.margin <= 0:
            raise UsageError(f"margin must be more than 0, found {self.margin:g}")

    def apply(self, model: ir.Model, chosen: Sequence[str], runs: CalibrationRuns | None) -> tuple[ir.Model, set[str]]:
        """See `Pass`; it takes no matmuls.

        Raises:
            ModelsFileError: there is nothing to calibrate with, or some layer attends without the operator.
        """
        nodes = [node for node in attention_nodes(model) if _of_text_generation(node)]
        if not nodes:
            return model, set()
        kept = [value for value in model.graph.inputs if value.name.startswith("past")]
        if len(kept) != len(nodes) * len(_PAST):
            raise ModelsFileError(
                "this model has layers whose attention ONNX Runtime's operator can't compute, so its cache stays in "
                "float32: leave out variants with the pass 'cache'"
            )
        # A past tensor and its present one, which is the same memory.
        pairs = {
            node.inputs[past]: present for node in nodes for past, present in zip(_PAST, node.outputs[1:], strict=True)
        }
        largest = peaks(model, [value.name for value in pairs.values()], self.feeds(runs), kept=(1, 3))
        for node in nodes:
            for past, position in zip(_PAST, _SCALES, strict=True):
                value = node.inputs[past]
                scale = np.maximum(largest[pairs[value].name], 1e-5) * np.float32(self.margin / _LARGEST)
                node.replace_input_with(position, constant(model.graph, f"{value.name}/scale", scale.reshape(-1)))
                value.dtype = pairs[value].dtype = ir.DataType.INT8
            for key in ("k_quant_type", "v_quant_type"):
                node.attributes.add(ir.AttrString(key, "PER_CHANNEL"))
            node.attributes.add(ir.AttrInt64("kv_cache_bit_width", 8))
        return model, set()


def _of_text_generation(node: ir.Node) -> bool:
    """Only there each slot has its own number of tokens in a run."""
    return len(node.inputs) > QUERY_SEQLENS and node.inputs[QUERY_SEQLENS] is not None
