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
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    inner = text.get(KEY) if isinstance(text, dict) else None
    found = config.get(KEY) or inner or config.get("compression_config")
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
        with reading(folder, KEY):
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
    zeros = unpack(parts[".qzeros"], bits, 1).short()
    rows, columns = codes.shape
    size = int(settings.get("group_size", -1))
    size = size if size > 0 else rows
    count = -(-rows // size)
    _require("scales", scales, count, columns)
    _require("zeros", parts[".qzeros"], count, -(-columns * bits // 32))
    groups = parts.get(".g_idx", torch.arange(rows) // size).long()
    _require_groups(groups, rows, count)
    zeros = zeros[:, :columns]
    if settings.get("checkpoint_format", "gptq") == "gptq":
        zeros = zeros + 1
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

    def ordered(words: Tensor) -> Tensor:
        codes = unpack(words, 4, 1).reshape(len(words), -1, 8)
        return codes[:, :, [_AWQ_ORDER.index(column) for column in range(8)]].reshape(len(words), -1).short()

    codes, zeros = ordered(parts[".qweight"]), ordered(parts[".qzeros"])
    rows, columns = codes.shape
    size = int(settings.get("group_size", settings.get("q_group_size", 128)))
    size = size if size > 0 else rows
    _require("scales", scales, -(-rows // size), columns)
    _require("zeros", zeros, -(-rows // size), columns)
    zeros, scales = (part.repeat_interleave(size, 0)[:rows] for part in (zeros, scales))
    return ((codes - zeros).float() * scales).T


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
    scales = scales.reshape(len(scales), -1) if scales.ndim else scales.reshape(1, 1)
    groups = [group["weights"] for group in settings["config_groups"].values()]
    packed, zeros = parts.get(".weight_packed"), torch.zeros_like(scales)
    if packed is None:
        values = parts[".weight"].float()
        if ".weight_zero_point" in parts:
            zeros = parts[".weight_zero_point"].float().reshape(scales.shape)
    else:
        bits = int(groups[0]["num_bits"])
        rows, columns = (int(size) for size in parts[".weight_shape"])
        half = 2 ** (bits - 1)
        _require("codes", packed, rows, -(-columns * bits // 32))
        values = unpack(packed, bits, 1)[:, :columns].float() - half
        if ".weight_zero_point" in parts:
            _require("zeros", parts[".weight_zero_point"], -(-rows * bits // 32), scales.shape[1])
            zeros = unpack(parts[".weight_zero_point"], bits, 0)[:rows].float() - half
    blocks = [_compressed_block(group, scales, values) for group in groups]
    block = next((b for b in blocks if _counts(values, b) == list(scales.shape)), blocks[0])
    _require("scales", scales, *_counts(values, block))
    if ".weight_g_idx" in parts and (order := parts[".weight_g_idx"].long()).max() >= 0:
        _require_groups(order, values.shape[1], scales.shape[1])
        return (values - zeros[:, order]) * scales[:, order]
    return (values - _spread(zeros, values, block)) * _spread(scales, values, block)


def _compressed_block(group: Mapping[str, Any], scales: Tensor, values: Tensor) -> Sequence[int]:
    """Rows and columns that share a scale, by a group of the settings; by the scales where it does not say."""
    size, strategy = group.get("group_size") or 0, group.get("strategy")
    if strategy == "block" or group.get("block_structure"):
        return tuple(int(part) for part in group["block_structure"])
    if int(size) > 0:
        return 1, int(size)
    whole = {"tensor": tuple(values.shape), "channel": (1, values.shape[1])}
    return whole.get(str(strategy)) or tuple(of // count for of, count in zip(values.shape, scales.shape, strict=True))


def _counts(values: Tensor, block: Sequence[int]) -> list[int]:
    """Scales of a matrix in blocks, along both axes."""
    return [-(-of // size) for of, size in zip(values.shape, block, strict=True)]


def _spread(scales: Tensor, values: Tensor, block: Sequence[int]) -> Tensor:
    """Scales of blocks as a matrix of the values' shape."""
    for axis, size in enumerate(block):
        scales = scales.repeat_interleave(size, axis)
    return scales[: values.shape[0], : values.shape[1]]


def _require(what: str, found: Tensor, *shape: int) -> None:
    """A part of a weight must have the shape that the settings give it.

    Raises:
        ArithmeticError: it has another, which `reading` puts into a sentence.
    """
    if list(found.shape) != list(shape):
        raise ArithmeticError(f"its {what} are {list(found.shape)}, and by {KEY} they are {list(shape)}")


def _require_groups(groups: Tensor, rows: int, count: int) -> None:
    """Every input must be in one of the groups.

    Raises:
        ArithmeticError: one is in none.
    """
    _require("g_idx", groups, rows)
    if int(groups.min()) < 0 or int(groups.max()) >= count:
        raise ArithmeticError(f"its g_idx goes from {int(groups.min())} to {int(groups.max())}, of {count} groups")


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
    block = settings.get("weight_block_size")
    if block is None and scales.numel() == 1:
        return values * scales.reshape(())
    block = [int(size) for size in block or (128, 128)]
    _require("scales", scales, *_counts(values, block))
    return values * _spread(scales, values, block)


def _bitsandbytes(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    import torch

    weight = parts[".weight"]
    if ".SCB" in parts:
        _require("scales", parts[".SCB"], len(weight))
        return weight.float() * (parts[".SCB"].float() / 127)[:, None]
    state = json.loads(bytes(parts[".weight.quant_state.bitsandbytes__"].tolist()))
    scales, table, size = parts[".weight.absmax"], parts[".weight.quant_map"].float(), int(state["blocksize"])
    total = math.prod(state["shape"])
    _require("codes", weight.flatten(), -(-total // 2))
    _require("scales", scales, -(-total // size))
    _require("values", table, 16)
    if ".weight.nested_absmax" in parts:
        outer, nested = parts[".weight.nested_absmax"], int(state["nested_blocksize"])
        _require("scales' scales", outer, -(-len(scales) // nested))
        spread = outer.repeat_interleave(nested)[: len(scales)]
        scales = parts[".weight.nested_quant_map"][scales.long()] * spread + state["nested_offset"]
    flat = weight.flatten().to(torch.int32)
    codes = torch.stack([flat >> 4, flat & 15], dim=1).flatten()[:total]
    return (table[codes] * scales.float().repeat_interleave(size)[:total]).reshape(state["shape"])


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
