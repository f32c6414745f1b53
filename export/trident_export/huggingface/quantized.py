"""Checkpoints whose weights are stored in few bits, as plain Hugging Face folders.

config.json says how in `quantization_config`. Each weight is computed as its format defines it, in float32, which
holds a scale times an integer of 8 bits without rounding. Weights go from file to file one at a time, so memory holds
a shard of the result at most. Formats, by `quant_method`:

- gptq (AutoGPTQ, GPTQModel): codes packed along the input and zeros along the output, as little-endian bits;
  scale (q - zero), and zero + 1 in version 1 of the format
- awq (AutoAWQ, gemm): codes and zeros packed along the output, eight an int32 in the order 0 2 4 6 1 3 5 7
- compressed-tensors: pack-quantized, codes along the input, moved up by half their range; or int8, or float8
- fp8 (DeepSeek-V3, Qwen3): float8 with a scale for each block of the matrix
- bitsandbytes: 4-bit codes of a table, a scale for 64 of them, which may be quantized itself; or int8 by rows
- mxfp4 (gpt-oss; OCP Microscaling Formats 1.0): 4-bit floats, a power of two for 32 of them; by transformers
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trident_export.errors import UnreadableSource, UnsupportedModel
from trident_export.huggingface.converted import copy_settings
from trident_export.huggingface.folder import HuggingFaceFolder, reading

if TYPE_CHECKING:
    from torch import Tensor

KEY = "quantization_config"
# Bytes of a file that is written; torch holds them until they are.
SHARD = 2**30
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FLOAT32 = 4
# How a server that computes in few bits would round activations; nothing of it is in the weights.
_OF_ACTIVATIONS = (".input_scale", ".activation_scale", ".output_scale", ".k_scale", ".v_scale", ".weight_format")


def settings(folder: Path) -> Mapping[str, Any] | None:
    """The `quantization_config` of a folder; None where its weights are plain numbers."""
    config = HuggingFaceFolder(folder).json("config.json")
    if not isinstance(config, dict):
        return None
    # Of a model of several parts, the text part may carry it.
    text = config.get("text_config")
    found = config.get(KEY) or (text.get(KEY) if isinstance(text, dict) else None) or config.get("compression_config")
    return found if isinstance(found, dict) else None


Parts = Mapping[str, "Tensor"]


class _Format(NamedTuple):
    """How a method stores weights.

    Attributes:
        parts: the ends of the names of the tensors that one weight is stored in.
        marks: those of them that no plain weight has.
        check: what of the settings is not understood; "" where all is.
        decode: the parts and the settings to the weight, float32 as the model's linear layers have it.
    """

    parts: tuple[str, ...]
    marks: tuple[str, ...]
    check: Callable[[Mapping[str, Any]], str]
    decode: Callable[[Parts, Mapping[str, Any]], Tensor]


class Reader:
    """A quantized folder, and how its weights become numbers.

    Args:
        folder: with config.json and safetensors files.
        settings: its `quantization_config`.

    Raises:
        UnsupportedModel: the format, or a setting of it, is not understood.
        UnreadableSource: there are no safetensors files, or one is damaged.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        from safetensors import safe_open

        self._folder, self._settings = folder, settings
        method = str(settings.get("quant_method", "bitsandbytes" if "load_in_4bit" in settings else None))
        if method not in _METHODS:
            raise UnsupportedModel(
                f"{folder} is quantized by quant_method {method!r}, which is not read; read are "
                f"{', '.join(_METHODS)}: export the original model, or one of these"
            )
        self._format = _METHODS[method]
        with reading(folder, KEY):
            problem = self._format.check(settings)
        if problem:
            raise UnsupportedModel(
                f"{folder} is quantized by quant_method {method!r} with {problem}, which is not read: export the "
                "original model"
            )
        self._where: dict[str, Path] = {}
        groups: dict[str, dict[str, str]] = defaultdict(dict)
        # Weights that one stored number can hold.
        with reading(folder, f"bits of {KEY}"):
            most = {"I32": 32 // int(settings.get("bits") or settings.get("w_bit") or 4), "U8": 2}
        self.room = 0
        for file in sorted(folder.glob("*.safetensors")):
            with reading(folder, file.name), safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - it is no mapping
                    self._where[key] = file
                    stored = opened.get_slice(key)
                    self.room += _FLOAT32 * math.prod(stored.get_shape()) * most.get(stored.get_dtype(), 1)
                    stem, part = self._split(key)
                    if part:
                        groups[stem][part] = key
        if not self._where:
            raise UnreadableSource(
                f"{folder} is quantized by quant_method {method!r} and has no safetensors file: copy the model again"
            )
        self._groups = {stem: parts for stem, parts in groups.items() if set(parts) & set(self._format.marks)}
        if not self._groups:
            raise UnreadableSource(
                f"{folder} has a quantization_config of quant_method {method!r} and no weights of that form: take it "
                "out of config.json, or copy the model again"
            )

    def _split(self, key: str) -> tuple[str, str]:
        """A tensor's name as that of a weight and of a part; without a part where it is no part of one."""
        for part in sorted(self._format.parts, key=len, reverse=True):
            stem, found, rest = key.rpartition(part)
            if found and (not rest or part.endswith("__")):
                return stem, part
        return key, ""

    def write(self, folder: Path) -> None:
        """Write the plain folder.

        Raises:
            UnreadableSource: a file is damaged, or a part of a weight is missing.
        """
        write_shards(self._tensors(), folder)
        config = HuggingFaceFolder(self._folder).json("config.json")
        for part in (config, config.get("text_config") or {}):
            part.pop(KEY, None)
            part.pop("compression_config", None)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_settings(self._folder, folder)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        grouped = {key for parts in self._groups.values() for key in parts.values()}
        for key in self._where:
            if key not in grouped and not key.endswith(_OF_ACTIVATIONS):
                yield key, self._read(key)
        for stem, keys in self._groups.items():
            with reading(self._folder, f"the weight {stem}"):
                weight = self._format.decode({part: self._read(key) for part, key in keys.items()}, self._settings)
            yield (stem if "_blocks" in keys else f"{stem}.weight"), weight.contiguous()

    def _read(self, key: str) -> Tensor:
        from safetensors import safe_open

        with reading(self._folder, self._where[key].name), safe_open(self._where[key], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(key)
        return tensor


def write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Write tensors as safetensors files of `SHARD` bytes, and their index."""
    from safetensors.torch import save_file

    where: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        nonlocal held, size
        name = f"model-{len(set(where.values())) + 1:05d}.safetensors"
        save_file(held, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(held, name))
        held, size = {}, 0

    for name, tensor in tensors:
        if held and size + tensor.nbytes > SHARD:
            flush()
        held[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def unpack(words: Tensor, bits: int, axis: int) -> Tensor:
    """Codes of `bits` bits out of 32-bit words, which hold them one behind the other from the lowest bit.

    Args:
        words: int32 of two axes.
        axis: along which they are packed; 32 codes take `bits` words, whatever `bits` is.

    Returns:
        uint8, longer along the axis by 32 / bits.
    """
    import numpy as np
    import torch

    packed = words.movedim(axis, -1).contiguous().numpy()
    single = np.unpackbits(packed.view(np.uint8), axis=-1, bitorder="little")
    codes = np.packbits(single.reshape(*packed.shape[:-1], -1, bits), axis=-1, bitorder="little")[..., 0]
    return torch.from_numpy(codes).movedim(-1, axis)


def _gptq(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    import torch

    bits = int(settings["bits"])
    codes = unpack(parts[".qweight"], bits, 0)
    scales = parts[".scales"].float()
    zeros = unpack(parts[".qzeros"], bits, 1)[:, : scales.shape[1]].short()
    if settings.get("checkpoint_format", "gptq") == "gptq":
        zeros = zeros + 1
    size = int(settings.get("group_size", -1))
    groups = torch.arange(len(codes)) // (size if size > 0 else len(codes))
    groups = parts.get(".g_idx", groups).long()
    return ((codes.short() - zeros[groups]).float() * scales[groups]).T


def _check_gptq(settings: Mapping[str, Any]) -> str:
    if settings.get("bits") not in (2, 3, 4, 8):
        return f"bits {settings.get('bits')!r}"
    form = settings.get("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        return f"checkpoint_format {form!r}"
    return "settings of single layers (dynamic)" if settings.get("dynamic") else ""


def _awq(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    scales = parts[".scales"].float()
    size = len(parts[".qweight"]) // len(scales)

    def ordered(words: Tensor) -> Tensor:
        codes = unpack(words, 4, 1).reshape(len(words), -1, 8)
        return codes[:, :, [_AWQ_ORDER.index(column) for column in range(8)]].reshape(len(words), -1).short()

    codes, zeros = ordered(parts[".qweight"]), ordered(parts[".qzeros"])
    spread = zeros.repeat_interleave(size, 0), scales.repeat_interleave(size, 0)
    return ((codes - spread[0]).float() * spread[1]).T


def _check_awq(settings: Mapping[str, Any]) -> str:
    if settings.get("bits", settings.get("w_bit")) != 4:
        return f"bits {settings.get('bits', settings.get('w_bit'))!r}"
    version = str(settings.get("version", "gemm")).lower()
    if version != "gemm":
        return f"version {version!r}"
    return "" if settings.get("zero_point", True) else "zero_point false"


def _compressed(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    import torch

    scales = parts[".weight_scale"].float()
    packed = parts.get(".weight_packed")
    if packed is None:
        values = parts[".weight"].float()
        zeros = parts[".weight_zero_point"].float() if ".weight_zero_point" in parts else torch.zeros_like(scales)
    else:
        bits = int(next(iter(settings["config_groups"].values()))["weights"]["num_bits"])
        rows, columns = (int(size) for size in parts[".weight_shape"])
        half = 2 ** (bits - 1)
        values = unpack(packed, bits, 1)[:rows, :columns].float() - half
        zeros = torch.zeros_like(scales)
        if ".weight_zero_point" in parts:
            zeros = unpack(parts[".weight_zero_point"], bits, 0)[:rows].float() - half
    if ".weight_g_idx" in parts and (groups := parts[".weight_g_idx"].long()).min() >= 0:
        return (values - zeros[:, groups]) * scales[:, groups]
    return (values - _spread(zeros, values)) * _spread(scales, values)


def _spread(scales: Tensor, values: Tensor) -> Tensor:
    """Scales of rows, columns or blocks as a matrix of the values' shape, or one number for all."""
    if scales.numel() == 1:
        return scales.reshape(())
    scales = scales.reshape(len(scales), -1)
    for axis, size in enumerate(values.shape):
        scales = scales.repeat_interleave(-(-size // scales.shape[axis]), axis)
    return scales[: values.shape[0], : values.shape[1]]


def _check_compressed(settings: Mapping[str, Any]) -> str:
    formats = {
        settings.get("format"),
        *(group.get("format") for group in (settings.get("config_groups") or {}).values()),
    }
    known = {"pack-quantized", "float-quantized", "int-quantized", "naive-quantized", "dense", None}
    if unknown := sorted(map(str, formats - known)):
        return f"format {', '.join(unknown)}"
    if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
        return "sparse weights"
    groups = list((settings.get("config_groups") or {}).values())
    weights = [group.get("weights") or {} for group in groups]
    if len({weight.get("num_bits") for weight in weights}) > 1 or any(
        weight.get("num_bits") == 3 for weight in weights
    ):
        return "several numbers of bits, or 3"
    return "" if weights else "no config_groups"


def _fp8(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    values, scales = parts[".weight"].float(), parts[".weight_scale_inv"].float()
    if scales.numel() == 1:
        return values * scales.reshape(())
    rows, columns = settings.get("weight_block_size") or (128, 128)
    spread = scales.repeat_interleave(int(rows), 0).repeat_interleave(int(columns), 1)
    return values * spread[: values.shape[0], : values.shape[1]]


def _bitsandbytes(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    import torch

    weight = parts[".weight"]
    if ".SCB" in parts:
        return weight.float() * (parts[".SCB"].float() / 127)[:, None]
    state = json.loads(bytes(parts[".weight.quant_state.bitsandbytes__"].tolist()))
    scales = parts[".weight.absmax"]
    if ".weight.nested_absmax" in parts:
        outer = parts[".weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(scales)]
        scales = parts[".weight.nested_quant_map"][scales.long()] * outer + state["nested_offset"]
    flat = weight.flatten().to(torch.int32)
    codes = torch.stack([flat >> 4, flat & 15], dim=1).flatten()[: math.prod(state["shape"])]
    spread = scales.float().repeat_interleave(state["blocksize"])[: len(codes)]
    return (parts[".weight.quant_map"].float()[codes] * spread).reshape(state["shape"])


def _mxfp4(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    found: Tensor = convert_moe_packed_tensors(parts["_blocks"], parts["_scales"], dtype=torch.float32)
    return found


def _no_check(settings: Mapping[str, Any]) -> str:
    return ""


_METHODS = {
    "gptq": _Format((".qweight", ".qzeros", ".scales", ".g_idx"), (".qweight",), _check_gptq, _gptq),
    "awq": _Format((".qweight", ".qzeros", ".scales"), (".qweight",), _check_awq, _awq),
    "compressed-tensors": _Format(
        (".weight", ".weight_scale", ".weight_packed", ".weight_zero_point", ".weight_shape", ".weight_g_idx"),
        (".weight_scale",),
        _check_compressed,
        _compressed,
    ),
    "fp8": _Format((".weight", ".weight_scale_inv"), (".weight_scale_inv",), _no_check, _fp8),
    "bitsandbytes": _Format(
        (
            ".weight",
            ".weight.absmax",
            ".weight.quant_map",
            ".weight.nested_absmax",
            ".weight.nested_quant_map",
            ".weight.quant_state.bitsandbytes__",
            ".SCB",
        ),
        (".weight.absmax", ".SCB"),
        _no_check,
        _bitsandbytes,
    ),
    "mxfp4": _Format(("_blocks", "_scales"), ("_blocks",), _no_check, _mxfp4),
}
