"""A float32 graph to its variants. Recipes are data: a recipe is a row of RECIPES.

The products are ONNX Runtime's MatMulNBits: weights in blocks along the input, with a scale for each block;
accuracy level 4 quantizes the input in blocks too, at run time, and multiplies in int8. A block belongs to one
row of a batch, so an answer does not depend on who shares the batch; `quantize_dynamic`, which has one scale
for a whole batch and saturates on AVX2, is no recipe here (docs/decisions/0003-int8-by-blocks.md).
Operator reference: onnxruntime docs/ContribOperators.md, com.microsoft.MatMulNBits.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from trident_export.row_quantization import quantize_rows

ACCURACY_LEVEL = 4


@dataclass(frozen=True)
class Blocks:
    """How the weights of some matrix products are stored.

    Attributes:
        nodes: regular expression of the products' names; the first entry that matches a product counts.
        bits: of a weight.
        size: weights in a block, which share a scale.
        symmetric: no zero point, so that 0 is in the middle of the range.
    """

    nodes: str
    bits: int
    size: int
    symmetric: bool


@dataclass(frozen=True)
class Recipe:
    """How a variant is made.

    Attributes:
        products: the matrix products that are quantized; those that nothing matches stay float32.
        size: the variant's bytes as a share of the float32 graph's, at most, for the check of the disk.
        rows: whether products are in eight bits with a scale for each row (see `row_quantization`).
        half: whether everything is float16 but for the inputs and outputs that are no cache.
    """

    products: tuple[Blocks, ...]
    size: float
    rows: bool = False
    half: bool = False


_HEAD = Blocks("lm_head|embed_out", bits=8, size=32, symmetric=True)

RECIPES = {
    "fp32": Recipe((), 1.0),
    "fp16": Recipe((), 0.5, half=True),
    "int8": Recipe((_HEAD, Blocks("attn|attention", 8, 16, symmetric=False), Blocks("", 8, 32, symmetric=False)), 0.6),
    "int4": Recipe((_HEAD, Blocks("", 4, 32, symmetric=True)), 0.5),
}


# Encoders work on many tokens at once, where blocks gain nothing over float32 (docs/decisions/0014).
ENCODER_RECIPES = RECIPES | {"int8": Recipe((), 0.5, rows=True)}


def apply(variant: str, graph: Path, target: Path, recipes: Mapping[str, Recipe] = RECIPES) -> None:
    """Write `target` (weights beside it as `<target>.data`) from the float32 graph at `graph`."""
    model = onnx.load(str(graph))
    recipe = recipes[variant]
    if recipe.products:
        model = quantize(model, recipe.products)
    if recipe.rows:
        quantize_rows(model, lambda name: True)
    if recipe.half:
        model = to_half(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    data = target.with_name(target.name + ".data")
    onnx.save(model, str(target), save_as_external_data=True, location=data.name, size_threshold=1024)
    if data.exists():
        data.chmod(0o644)  # onnx makes it private to this user, and the server may be another


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in float16; logits and last hidden states stay float32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    kept = [output.name for output in model.graph.output if output.name in ("logits", "last_hidden_state")]
    half: onnx.ModelProto = convert_float_to_float16(model, keep_io_types=kept, disable_shape_infer=True)
    return half


def quantize(model: onnx.ModelProto, products: tuple[Blocks, ...]) -> onnx.ModelProto:
    """The model with its products of an activation and a weight quantized as `products` say."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.onnx_model import ONNXModel

    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
    wrapped = ONNXModel(model)
    wrapped.replace_gemm_with_matmul()  # gpt2's layers are Gemm, which the quantizer passes over
    names = [node.name for node in model.graph.node if node.op_type == "MatMul"]
    chosen = {name: next((b for b in products if re.search(b.nodes, name)), None) for name in names}
    for blocks in products:
        quantizer = MatMulNBitsQuantizer(
            model,
            bits=blocks.bits,
            block_size=blocks.size,
            is_symmetric=blocks.symmetric,
            accuracy_level=ACCURACY_LEVEL,
            nodes_to_exclude=[name for name in names if chosen[name] is not blocks],
            op_types_to_quantize=("MatMul",),
        )
        quantizer.process()
        model = quantizer.model.model
    return model
