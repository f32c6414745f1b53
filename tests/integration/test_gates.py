"""Gates on real weights: a quantized variant that is damaged is refused, whole it passes.

The damage is done to the graphs that are served, to their quantized weights and scales; what is damaged before it is
quantized is in test_export.py and test_encoder_tasks.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from benchmarks import generation
from tests.conftest import ROOT
from trident_export import configs, corpora, models_file, tasks
from trident_export.errors import FidelityError
from trident_export.huggingface import sources
from trident_export.measure import fidelity
from trident_export.models_file import ModelSpec
from trident_export.tasks import text_generation
from trident_serving.artefacts import VERSION
from trident_serving.runtime.tokenizer import TextTokenizer

SPECS = {spec.name: spec.with_variants(spec.more) for spec in models_file.load(ROOT / "models.toml")}
Damage = Callable[[onnx.ModelProto], None]
Floats = NDArray[np.float32]


def change(model: onnx.ModelProto, names: set[str], how: Callable[[NDArray[np.generic]], NDArray[np.generic]]) -> None:
    found = [tensor for tensor in model.graph.initializer if tensor.name in names]
    assert found
    for tensor in found:
        value = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(how(value).astype(value.dtype), tensor.name))


def weights_of(model: onnx.ModelProto, part: str, *indices: int) -> set[str]:
    nodes = [node for node in model.graph.node if part in node.name and len(node.input) > max(indices)]
    return {node.input[index] for node in nodes for index in indices}


def nothing(model: onnx.ModelProto) -> None:
    pass


# Weights and scales are the inputs 1 and 2 of MatMulNBits, with a row for each output.


def scales_off(model: onnx.ModelProto) -> None:
    nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    change(model, {node.input[2] for node in nodes}, lambda scales: scales * np.float32(1.03))


def cache_clipped(model: onnx.ModelProto) -> None:
    """Scales of keys and values, inputs 12 and 13 of the attention, as they are for numbers half as large."""
    nodes = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    change(model, {node.input[index] for node in nodes for index in (12, 13)}, lambda scales: scales / 2)


def layer_zeroed(model: onnx.ModelProto) -> None:
    change(model, weights_of(model, "layers.20/mlp/down_proj", 2), lambda scales: scales * 0)


def heads_swapped(model: onnx.ModelProto) -> None:
    rows = 15 * 64  # nine heads of queries, three of keys and of values

    def swap(value: NDArray[np.generic]) -> NDArray[np.generic]:
        heads = value.reshape(rows, -1).copy()
        heads[:128] = np.concatenate([heads[64:128], heads[:64]])
        return heads.reshape(value.shape)

    change(model, weights_of(model, "layers.10/self_attn/qkv_proj", 1, 2), swap)


@pytest.fixture(scope="module")
def generator_check(default_repository: Path) -> Callable[[str, Path], None]:
    """Puts the graph in a folder through the gate of a variant."""
    spec = SPECS["smollm2"]
    model = text_generation.load_model(sources.fetch(spec, ROOT, ROOT / ".cache", lambda message: None))
    tokenizer = TextTokenizer.load(default_repository / "smollm2" / VERSION)
    samples = text_generation.sample_ids(tokenizer, 2048, model.config.vocab_size, corpora.held_out())
    reference = text_generation.reference_logits(model, samples)

    def check(variant: str, folder: Path) -> None:
        measured = text_generation.measure(folder, samples, reference)
        fidelity.check("text-generation", variant, measured, precision=spec.recipes[variant].precision)

    return check


@pytest.mark.parametrize(
    ("variant", "damage", "reason"),
    [
        ("int8", nothing, ""),
        ("int8", scales_off, "kl is .*top1 is"),
        pytest.param("int8", layer_zeroed, "kl is .*top1 is", marks=pytest.mark.slow),
        pytest.param("int8", heads_swapped, "kl is .*top1 is", marks=pytest.mark.slow),
        pytest.param("int8_cache", scales_off, "kl is .*top1 is", marks=pytest.mark.slow),
        pytest.param("int8_cache", cache_clipped, "kl is .*top1 is", marks=pytest.mark.slow),
        pytest.param("int4", layer_zeroed, "kl is .*top1 is", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_generator(
    default_repository: Path,
    generator_check: Callable[[str, Path], None],
    tmp_path: Path,
    variant: str,
    damage: Damage,
    reason: str,
) -> None:
    folder = default_repository / SPECS["smollm2"].public_name(variant) / VERSION
    model = onnx.load(str(folder / "model.onnx"))
    damage(model)
    onnx.save(model, str(tmp_path / "model.onnx"), save_as_external_data=True, location="data")
    if not reason:
        generator_check(variant, tmp_path)
        return
    with pytest.raises(FidelityError, match=f"{variant} does not compute .*{reason}"):
        generator_check(variant, tmp_path)


@pytest.mark.slow
def test_every_product_of_int4_but_the_head_has_four_bits(default_repository: Path) -> None:
    model = onnx.load(str(default_repository / "smollm2_int4" / VERSION / "model.onnx"), load_external_data=False)
    matmuls = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    bits = {node.name: next(a.i for a in node.attribute if a.name == "bits") for node in matmuls}
    assert [name for name, number in bits.items() if number == 8] == ["/model/lm_head/MatMul_Q8"]
    assert list(bits.values()).count(4) == 4 * 30


@pytest.mark.parametrize(
    ("variant", "table"),
    [("fp32", 4 * 49152 * 576), pytest.param("int4", 49152 * 576 * 9 // 8, marks=pytest.mark.slow)],
)
def test_what_a_token_reads_is_all_but_the_embedding_table(default_repository: Path, variant: str, table: int) -> None:
    """`make bench` gives a share of the memory's bandwidth by it: bytes in float32, or in blocks of 32 with a scale."""
    folder = default_repository / SPECS["smollm2"].public_name(variant) / VERSION
    assert generation.bytes_of(folder) - generation.bytes_read(folder) == table


@pytest.mark.slow
def test_quantize_dynamic_is_refused(
    default_repository: Path, generator_check: Callable[[str, Path], None], tmp_path: Path
) -> None:
    """The usual recipe: its matmuls saturate on AVX2, and unrelated requests share a scale for their inputs."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        str(default_repository / "smollm2_fp32" / VERSION / "model.onnx"),
        str(tmp_path / "model.onnx"),
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
        op_types_to_quantize=["MatMul"],
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )
    with pytest.raises(FidelityError, match="batch_effect is .*, must be at most 0"):
        generator_check("int8", tmp_path)


def saturated(activation: Floats, weight: NDArray[np.int8]) -> NDArray[np.int64]:
    """u8s8 matmuls as AVX2's vpmaddubsw makes them: pairs are added in sixteen bits."""
    pairs = activation.astype(np.int64)[:, :, None] * weight.astype(np.int64)[None]
    sums = pairs.reshape(len(activation), -1, 2, weight.shape[1]).sum(axis=2)
    return np.clip(sums, -(2**15), 2**15 - 1).sum(axis=1)


def test_seven_bits_do_not_saturate_where_eight_do() -> None:
    """What the recipe `rows` is made for, on the kernel that this machine may not have."""
    random = np.random.default_rng(0)
    activation = random.integers(200, 256, (4, 64)).astype(np.float32)
    for largest, same in ((63, True), (127, False)):
        weight = np.full((64, 8), largest, np.int8)
        exact = activation.astype(np.int64) @ weight.astype(np.int64)
        assert np.array_equal(saturated(activation, weight), exact) == same


def encoder_scales_off(model: onnx.ModelProto) -> None:
    """The scales of all matmuls three percent too large; those of per-channel weights are `steps`."""
    names = {tensor.name for tensor in model.graph.initializer if tensor.name.endswith("/steps")}
    change(model, names, lambda scales: scales * np.float32(1.03))


def encoder_zeroed(model: onnx.ModelProto) -> None:
    names = {tensor.name for tensor in model.graph.initializer if "layer.5/output/dense" in tensor.name}
    change(model, {name for name in names if name.endswith(("/steps", "weight_scale"))}, lambda scales: scales * 0)


def encoder_heads_swapped(model: onnx.ModelProto) -> None:
    """Columns of two heads of the values, of 32 each, in the third layer; queries, keys and values have 384 each."""

    def swap(weight: NDArray[np.generic]) -> NDArray[np.generic]:
        swapped = weight.copy()
        swapped[:, 768:832] = np.concatenate([weight[:, 800:832], weight[:, 768:800]], axis=1)
        return swapped

    joined = "layer.2/attention/self/qkv_proj"
    names = {
        t.name for t in model.graph.initializer if joined in t.name and t.dims[-1:] == [3 * 384] and t.data_type == 3
    }
    change(model, names, swap)


def encoder_heads_halved(model: onnx.ModelProto) -> None:
    """The attention of one layer takes two heads for one."""
    loops = [node for node in model.graph.node if node.op_type == "Loop"]
    (body,) = (attribute.g for attribute in loops[2].attribute if attribute.name == "body")
    (attention,) = (node for node in body.node if node.op_type == "MultiHeadAttention")
    (heads,) = (attribute for attribute in attention.attribute if attribute.name == "num_heads")
    heads.i //= 2


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (nothing, ""),
        (encoder_scales_off, "worst_cosine"),
        (encoder_zeroed, "worst_cosine"),
        (encoder_heads_swapped, "worst"),
        (encoder_heads_halved, "worst"),
    ],
)
def test_a_damaged_encoder(default_repository: Path, tmp_path: Path, damage: Damage, reason: str) -> None:
    spec: ModelSpec = dataclasses.replace(SPECS["minilm"], variants=("int8",), default_variant="int8")
    for part in ("minilm_tokenizer", "minilm_postprocess"):
        (tmp_path / part).symlink_to(default_repository / part)
    model = onnx.load(str(default_repository / "minilm_model_int8" / VERSION / "model.onnx"))
    damage(model)
    folder = tmp_path / configs.model_part(spec, "int8") / VERSION
    folder.mkdir(parents=True)
    onnx.save(model, str(folder / "model.onnx"))
    source = sources.fetch(spec, ROOT, ROOT / ".cache", lambda message: None)
    measured = tasks.evaluator(spec, source, tmp_path, corpora.held_out())("int8")
    if not reason:
        fidelity.check(spec.task, "int8", measured)
        return
    with pytest.raises(FidelityError, match=reason):
        fidelity.check(spec.task, "int8", measured)
