"""Quantized checkpoints become the numbers that their formats define: packed here by the formats' own rules."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests import tiny_models
from trident_export import models_file
from trident_export.errors import UnreadableSource, UnsupportedModel
from trident_export.huggingface import quantized, sources

Packed = tuple[dict[str, Tensor], Tensor]
SIZE = 32


def gptq(weight: Tensor, bits: int, v2: bool, act_order: bool) -> Packed:
    """Packed value by value, as the first implementation did: `bits` words for 32 codes along the input."""
    columns, rows = weight.shape
    groups = torch.arange(rows) // SIZE
    if act_order:
        groups = groups[torch.randperm(rows)]
    scales = (torch.rand(rows // SIZE, columns) * 0.01 + 0.001).half()
    zeros = torch.randint(1, 2**bits, scales.shape)
    codes = torch.randint(0, 2**bits, (rows, columns))
    values = scales.float()[groups] * (codes - zeros[groups])
    parts = {
        "qweight": _stream(codes.T, bits).T.contiguous(),
        "qzeros": _stream(zeros - (0 if v2 else 1), bits),
        "scales": scales,
        "g_idx": groups.int(),
    }
    return parts, values.T


def _stream(codes: Tensor, bits: int) -> Tensor:
    """Codes one behind the other from the lowest bit of 32-bit words, along the last axis; by Python's integers."""
    rows = []
    for row in codes.tolist():
        number = sum(code << (bits * place) for place, code in enumerate(row))
        rows.append([(number >> (32 * word)) & 0xFFFFFFFF for word in range(len(row) * bits // 32)])
    return torch.from_numpy(np.array(rows, dtype=np.uint32).view(np.int32))


def awq(weight: Tensor) -> Packed:
    columns, rows = weight.shape
    scales = (torch.rand(rows // SIZE, columns) * 0.01 + 0.001).half()
    zeros = torch.randint(0, 16, scales.shape)
    codes = torch.randint(0, 16, (rows, columns))
    values = scales.float().repeat_interleave(SIZE, 0) * (codes - zeros.repeat_interleave(SIZE, 0))

    def pack(matrix: Tensor) -> Tensor:
        words = np.zeros((len(matrix), columns // 8), dtype=np.uint32)
        for column in range(columns // 8):
            for place, source in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                words[:, column] |= matrix[:, 8 * column + source].numpy().astype(np.uint32) << np.uint32(4 * place)
        return torch.from_numpy(words.view(np.int32))

    return {"qweight": pack(codes), "qzeros": pack(zeros), "scales": scales}, values.T


def compressed(weight: Tensor, bits: int, symmetric: bool) -> Packed:
    rows, columns = weight.shape
    half = 2 ** (bits - 1)
    scales = (torch.rand(rows, columns // SIZE) * 0.01 + 0.001).bfloat16()
    codes = torch.randint(-half, half, (rows, columns))
    zeros = torch.zeros(scales.shape, dtype=torch.long) if symmetric else torch.randint(-half, half, scales.shape)
    values = scales.float().repeat_interleave(SIZE, 1) * (codes - zeros.repeat_interleave(SIZE, 1))
    parts = {
        "weight_packed": _stream(codes + half, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        parts["weight_zero_point"] = _stream((zeros + half).T, bits).T.contiguous()
    return parts, values


def float8(weight: Tensor, name: str, block: tuple[int, int] | None) -> Packed:
    codes = weight.to(torch.float8_e4m3fn)
    rows, columns = weight.shape
    shape = (rows, 1) if block is None else (-(-rows // block[0]), -(-columns // block[1]))
    scales = torch.rand(shape) + 0.5
    values = codes.float().clone()
    for row in range(rows):
        for column in range(columns):
            values[row, column] *= scales[row, 0] if block is None else scales[row // block[0], column // block[1]]
    return {"weight": codes, name: scales}, values


def nf4(weight: Tensor, nested: bool) -> Packed:
    table = torch.linspace(-1, 1, 16)
    codes = torch.randint(0, 16, (weight.numel(),))
    count = weight.numel() // 64
    scales = torch.rand(count) + 0.5
    parts = {
        "weight": (codes[0::2] * 16 + codes[1::2]).to(torch.uint8)[:, None],
        "weight.quant_map": table,
    }
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "shape": list(weight.shape), "dtype": "float16"}
    if nested:
        state |= {"nested_blocksize": 256, "nested_offset": 0.75, "nested_dtype": "float32"}
        parts["weight.absmax"] = torch.randint(0, 256, (count,)).to(torch.uint8)
        parts["weight.nested_quant_map"] = torch.linspace(-1, 1, 256)
        parts["weight.nested_absmax"] = torch.rand(-(-count // 256)) * 0.1
        outer = parts["weight.nested_absmax"].repeat_interleave(256)[:count]
        scales = parts["weight.nested_quant_map"][parts["weight.absmax"].long()] * outer + 0.75
    else:
        parts["weight.absmax"] = scales
    parts["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return parts, (table[codes].reshape(-1, 64) * scales[:, None]).reshape(weight.shape)


def int8(weight: Tensor) -> Packed:
    codes, scales = torch.randint(-127, 128, weight.shape).to(torch.int8), torch.rand(len(weight)) + 0.1
    return {"weight": codes, "SCB": scales}, codes.float() * (scales / 127)[:, None]


def quantize(folder: Path, settings: dict[str, Any], pack: Callable[[Tensor], Packed]) -> dict[str, Tensor]:
    """Quantize the linear layers of a tiny model's folder; returns what its weights now are."""
    torch.manual_seed(0)
    (file,) = folder.glob("*.safetensors")
    stored: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for name, value in load_file(file).items():
        if "_proj.weight" in name:
            parts, values = pack(value)
            stem = name.removesuffix("weight")
            stored |= {stem + part: tensor.contiguous() for part, tensor in parts.items()}
            expected[name] = values
        else:
            stored[name] = expected[name] = value
    half = len(stored) // 2  # a weight's parts may lie in two files
    for number, names in enumerate((list(stored)[:half], list(stored)[half:])):
        save_file({name: stored[name] for name in names}, folder / f"model-{number + 1:05d}-of-00002.safetensors")
    file.unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return expected


def fetched(folder: Path, cache: Path) -> Path:
    entry = tiny_models.models_toml({"tiny": tiny_models.causal_entry(folder)})
    (cache / "models.toml").write_text(entry)
    (spec,) = models_file.load(cache / "models.toml")
    return sources.fetch(spec, cache, cache, lambda message: None).path


GROUPS = {"group_0": {"weights": {"num_bits": 4, "group_size": SIZE}}}
CASES: dict[str, tuple[dict[str, Any], Callable[[Tensor], Packed]]] = {
    "gptq-4": ({"quant_method": "gptq", "bits": 4, "group_size": SIZE}, lambda w: gptq(w, 4, False, False)),
    "gptq-3": ({"quant_method": "gptq", "bits": 3, "group_size": SIZE}, lambda w: gptq(w, 3, False, False)),
    "gptq-8-order": ({"quant_method": "gptq", "bits": 8, "group_size": SIZE}, lambda w: gptq(w, 8, False, True)),
    "gptq-2-v2": (
        {"quant_method": "gptq", "bits": 2, "group_size": SIZE, "checkpoint_format": "gptq_v2"},
        lambda w: gptq(w, 2, True, False),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": SIZE, "version": "gemm", "zero_point": True}, awq),
    "packed": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": GROUPS},
        lambda w: compressed(w, 4, True),
    ),
    "packed-zeros": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": GROUPS},
        lambda w: compressed(w, 4, False),
    ),
    "float-quantized": (
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 8}}},
        },
        lambda w: float8(w, "weight_scale", None),
    ),
    "fp8": (
        {"quant_method": "fp8", "weight_block_size": [24, 40]},
        lambda w: float8(w, "weight_scale_inv", (24, 40)),
    ),
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, lambda w: nf4(w, False)),
    "nf4-nested": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, lambda w: nf4(w, True)),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, int8),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_are_what_the_format_says(tmp_path: Path, name: str) -> None:
    settings, pack = CASES[name]
    folder = tiny_models.make_causal(tmp_path / "model", "llama")
    expected = quantize(folder, settings, pack)
    plain = fetched(folder, tmp_path)
    assert quantized.settings(plain) is None
    found = {key: value for file in plain.glob("*.safetensors") for key, value in load_file(file).items()}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert fetched(folder, tmp_path) == plain  # made once
    model, report = AutoModelForCausalLM.from_pretrained(plain, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, expected["model.layers.1.mlp.down_proj.weight"])


def test_mxfp4_is_what_the_format_says() -> None:
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (2, 8, 3, 16), dtype=torch.uint8)
    scales = torch.randint(120, 134, (2, 8, 3), dtype=torch.uint8)
    values = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    expected = torch.empty(2, 8, 96)
    for expert in range(2):
        for row in range(8):
            for column in range(96):
                byte = int(blocks[expert, row, column // 32, column % 32 // 2])
                code = byte >> 4 if column % 2 else byte & 15
                value = values[code & 7] * (-1 if code & 8 else 1)
                expected[expert, row, column] = value * 2.0 ** (int(scales[expert, row, column // 32]) - 127)
    found = quantized._METHODS["mxfp4"].decode({"_blocks": blocks, "_scales": scales}, {})
    assert torch.equal(found, expected.transpose(1, 2))


def test_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_models.make_causal(tmp_path / "model", "llama")
    expected = quantize(folder, *CASES["awq"])
    monkeypatch.setattr(quantized, "SHARD", 50_000)
    plain = fetched(folder, tmp_path)
    files = sorted(plain.glob("*.safetensors"))
    assert len(files) > 2
    model = AutoModelForCausalLM.from_pretrained(plain)
    for name, value in expected.items():
        assert torch.equal(model.get_parameter(name), value), name


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "aqlm"}, "quant_method 'aqlm', which is not read; read are gptq, awq"),
        ({"quant_method": "gptq", "bits": 5}, "quant_method 'gptq' with bits 5"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "with checkpoint_format 'marlin'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "with version 'gemv'"),
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": GROUPS},
            "with format nvfp4-pack-quantized",
        ),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    folder = tiny_models.make_causal(tmp_path / "model", "llama")
    quantize(folder, settings, awq)
    with pytest.raises(UnsupportedModel) as refused:
        fetched(folder, tmp_path)
    assert said in str(refused.value)


def altered(pack: Callable[[Tensor], Packed], change: Callable[[dict[str, Tensor]], None]) -> Callable[..., Packed]:
    def packed(weight: Tensor) -> Packed:
        parts, values = pack(weight)
        change(parts)
        return parts, values

    return packed


def without_order(parts: dict[str, Tensor]) -> None:
    del parts["g_idx"]


def negative_order(parts: dict[str, Tensor]) -> None:
    parts["g_idx"] = -parts["g_idx"] - 1


def larger_blocks(parts: dict[str, Tensor]) -> None:
    name = "weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(parts[name].tolist())) | {"blocksize": 128}
    parts[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def group(**weights: object) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"weights": {"num_bits": 4, **weights}}}}


@pytest.mark.parametrize(
    ("name", "lie", "change", "said"),
    [
        (
            "gptq-4",
            {"group_size": 64},
            without_order,
            "scales are [3, 64], and by quantization_config they are [2, 64]",
        ),
        (
            "gptq-4",
            {"group_size": -1},
            without_order,
            "scales are [3, 64], and by quantization_config they are [1, 64]",
        ),
        (
            "gptq-4",
            {"group_size": 16},
            without_order,
            "scales are [3, 64], and by quantization_config they are [6, 64]",
        ),
        ("gptq-4", {"bits": 8}, None, "scales are [3, 64], and by quantization_config they are [2, 64]"),
        ("gptq-4", {}, negative_order, "g_idx goes from -3 to -1, of 3 groups"),
        ("awq", {"group_size": 64}, None, "scales are [3, 64], and by quantization_config they are [2, 64]"),
        ("packed", group(num_bits=2), None, "codes are [64, 12], and by quantization_config they are [64, 6]"),
        ("packed", group(group_size=64), None, "scales are [64, 3], and by quantization_config they are [64, 2]"),
        ("packed", group(strategy="channel"), None, "scales are [64, 3], and by quantization_config they are [64, 1]"),
        ("fp8", {"weight_block_size": [32, 32]}, None, "are [3, 3], and by quantization_config they are [2, 3]"),
        ("fp8", {"weight_block_size": None}, None, "are [3, 3], and by quantization_config they are [1, 1]"),
        ("nf4", {}, larger_blocks, "scales are [96], and by quantization_config they are [48]"),
    ],
)
def test_settings_that_lie_are_refused(
    tmp_path: Path, name: str, lie: dict[str, Any], change: Callable[[dict[str, Tensor]], None] | None, said: str
) -> None:
    settings, pack = CASES[name]
    folder = tiny_models.make_causal(tmp_path / "model", "llama")
    quantize(folder, settings | lie, altered(pack, change) if change else pack)
    with pytest.raises(UnreadableSource) as refused:
        fetched(folder, tmp_path)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("part", ["x", [1], None])
def test_a_text_part_that_is_none(tmp_path: Path, part: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": part}))
    assert quantized.settings(tmp_path) is None


def test_a_last_group_that_is_shorter() -> None:
    settings = {"config_groups": {"group_0": {"weights": {"num_bits": 8, "group_size": 64}}}}
    codes = torch.randint(-128, 128, (4, 100)).to(torch.int8)
    scales = torch.rand(4, 2)
    found = quantized._METHODS["compressed-tensors"].decode({".weight": codes, ".weight_scale": scales}, settings)
    expected = torch.cat([codes[:, :64] * scales[:, :1], codes[:, 64:] * scales[:, 1:]], 1)
    assert torch.equal(found, expected)


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = tiny_models.make_causal(tmp_path / "model", "llama")
    quantize(folder, *CASES["awq"])
    lost = shutil.copytree(folder, tmp_path / "lost")
    for file in lost.glob("*.safetensors"):
        save_file({key: value for key, value in load_file(file).items() if "0.mlp.up_proj.scales" not in key}, file)
    with pytest.raises(UnreadableSource, match=r"model\.layers\.0\.mlp\.up_proj can't be read"):
        fetched(lost, tmp_path)
    assert not list((tmp_path / "sources").glob("lost*"))  # nothing half written is left
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UnreadableSource, match="has no safetensors file"):
        fetched(folder, tmp_path)
