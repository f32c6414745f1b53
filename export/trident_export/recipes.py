"""A float32 graph to its variants.

    fp32   as exported
    int8   weights of matrix products in blocks of 32 at 8 bits, symmetric; activations per block at run time
    int4   the same at 4 bits, the output head at 8

The products are ONNX Runtime's MatMulNBits with accuracy level 4 (int8 arithmetic). Its scales belong to one
row of a batch, so an answer does not depend on who shares the batch; `quantize_dynamic`, which has one scale
for a whole batch and saturates on AVX2, is no recipe here (docs/decisions/0003-int8-by-blocks.md).
Operator reference: onnxruntime docs/ContribOperators.md, com.microsoft.MatMulNBits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx

BLOCK_SIZE = 32
ACCURACY_LEVEL = 4


@dataclass(frozen=True)
class Recipe:
    """How a variant is made.

    Attributes:
        bits: of the weights of matrix products; None leaves them float32.
        head_bits: of the output head, the last product of a causal model.
        size: the variant's bytes as a share of the float32 graph's, roughly, for the check of the disk.
    """

    bits: int | None
    head_bits: int | None
    size: float


RECIPES = {
    "fp32": Recipe(None, None, 1.0),
    "int8": Recipe(8, 8, 0.5),
    "int4": Recipe(4, 8, 0.4),
}


def apply(variant: str, graph: Path, target: Path) -> None:
    """Write `target` (weights beside it as `<target>.data`) from the float32 graph at `graph`."""
    recipe = RECIPES[variant]
    model = onnx.load(str(graph))
    if recipe.bits is not None:
        head = [node.name for node in model.graph.node if "lm_head" in node.name or "embed_out" in node.name]
        if recipe.head_bits == recipe.bits or not head:
            model = _quantized(model, recipe.bits, lambda name: True)
        else:
            model = _quantized(model, recipe.bits, lambda name: name not in head)
            model = _quantized(model, recipe.head_bits or 8, lambda name: name in head)
    target.parent.mkdir(parents=True, exist_ok=True)
    data = target.with_name(target.name + ".data")
    onnx.save(model, str(target), save_as_external_data=True, location=data.name, size_threshold=1024)
    if data.exists():
        data.chmod(0o644)  # onnx makes it private to this user, and the server may be another


def _quantized(model: onnx.ModelProto, bits: int, wanted: Callable[[str], bool]) -> onnx.ModelProto:
    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    excluded = [node.name for node in model.graph.node if node.op_type == "MatMul" and not wanted(node.name)]
    quantizer = MatMulNBitsQuantizer(
        model,
        bits=bits,
        block_size=BLOCK_SIZE,
        is_symmetric=True,
        accuracy_level=ACCURACY_LEVEL,
        nodes_to_exclude=excluded,
        op_types_to_quantize=("MatMul",),
    )
    quantizer.process()
    quantized: onnx.ModelProto = quantizer.model.model
    return quantized
