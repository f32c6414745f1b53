"""Keys and values in 8 bits: a quarter of the memory, and less to read for every token.

ONNX Runtime's `GroupQueryAttention` rounds what it appends to the cache by a scale for each channel and multiplies by
it when it reads. A channel keeps its scale for all tokens, so it is set before serving, from calibration text; what is
larger in other text is clipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
from onnx import helper, numpy_helper

from trident_export.errors import UsageError
from trident_export.passes.base import Calibrated, CalibrationRuns
from trident_export.passes.calibration import peaks

_LARGEST = 127
# Places among the operator's inputs: past keys, past values and the number of each row's tokens, which the decoders of
# text generation alone have; then the scales.
_PAST, _QUERY_SEQLENS, _SCALES = (3, 4), 16, (12, 13)


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

    def apply(
        self, model: onnx.ModelProto, chosen: Sequence[str], runs: CalibrationRuns | None
    ) -> tuple[onnx.ModelProto, set[str]]:
        """See `Pass`; it takes no matmuls.

        Raises:
            ModelsFileError: there is nothing to calibrate with.
        """
        nodes = [node for node in model.graph.node if node.op_type == "GroupQueryAttention" and _of_rows(node)]
        if not nodes:
            return model, set()
        # A past tensor and its present one, which is the same memory.
        pairs = {node.input[past]: node.output[out] for node in nodes for past, out in zip(_PAST, (1, 2), strict=True)}
        largest = peaks(model, list(pairs.values()), self.feeds(runs), kept=(1, 3))
        for node in nodes:
            for past, place in zip(_PAST, _SCALES, strict=True):
                name = f"{node.input[past]}/scale"
                scale = np.maximum(largest[pairs[node.input[past]]], 1e-5) * np.float32(self.margin / _LARGEST)
                model.graph.initializer.append(numpy_helper.from_array(scale.reshape(-1), name))
                node.input[place] = name
            for key in ("k_quant_type", "v_quant_type"):
                node.attribute.append(helper.make_attribute(key, "PER_CHANNEL"))
            node.attribute.append(helper.make_attribute("kv_cache_bit_width", 8))
        for value in (*model.graph.input, *model.graph.output):
            if value.name in pairs or value.name in pairs.values():
                value.type.tensor_type.elem_type = onnx.TensorProto.INT8
        return model, set()


def _of_rows(node: onnx.NodeProto) -> bool:
    return len(node.input) > _QUERY_SEQLENS and bool(node.input[_QUERY_SEQLENS])
