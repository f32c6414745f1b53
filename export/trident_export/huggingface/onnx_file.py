"""Weights in ONNX files as plain Hugging Face folders: dequantized, and by the names that transformers has for them.

Some packages carry a model as the graphs of an export alone. Their weights are numbers or, by onnxruntime's tools:

- integers with a scale and a zero point of the same name (`X_quantized`, `X_scale`, `X_zero_point`), of the whole
  tensor or one for each column of a matmul; read by MatMulInteger and DequantizeLinear (onnxruntime.quantization)
- blocks of 4 or 8 bits along the input, read by MatMulNBits (onnxruntime, docs/ContribOperators.md)

Each becomes float32, scale (q - zero), as the operators define it. How activations are rounded is in no weight, so the
plain model computes what the graph computes but for that. A tensor has its parameter's name, or none where the exporter
has folded a transposition; then the node that reads it has the module's: /encoder/layer.0/output/dense/MatMul. Every
tensor must find its parameter, and every parameter its tensor.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trident_export.errors import UnreadableSource, UnsupportedArchitecture, UnsupportedModel
from trident_export.huggingface.converted import copy_settings
from trident_export.huggingface.folder import HuggingFaceFolder, reading
from trident_export.huggingface.quantized import write_shards

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray
    from torch import Tensor

_FLOAT32 = 4
_QUANTIZED = "_quantized"
# What an exporter's wrapper calls the parts of the model, and what transformers does.
_RENAMED = (
    (re.compile(r"^(m|model)\."), ""),
    (re.compile(r"^enc\.embed_tokens\."), "shared."),
    (re.compile(r"^enc\."), "encoder."),
    (re.compile(r"^dec\."), "decoder."),
)
# A model without a head may come without the pooler that its architecture has (see HuggingFaceFolder.check_weights).
_OPTIONAL = ("pooler.",)
# Operators that read a matrix as [inputs, outputs]; transformers' linear layers have it the other way.
_MATMULS = ("MatMul", "MatMulInteger")


class _Weight(NamedTuple):
    """A tensor of a graph that is a weight.

    Attributes:
        names: what it may be called, the likeliest first.
        values: float32, as transformers has it.
    """

    names: tuple[str, ...]
    values: NDArray[np.float32]


def files_of(path: Path) -> list[Path]:
    """The ONNX files that are a source's weights; [] where it has other weights, or none.

    Args:
        path: a file, or a folder with files in it or in its folder `onnx`.
    """
    if path.is_file():
        return [path] if path.suffix == ".onnx" else []
    others = ("*.safetensors", "pytorch_model*.bin")
    if any(next(path.glob(kind), None) is not None for kind in others):
        return []
    return sorted(path.glob("*.onnx")) or sorted(path.glob("onnx/*.onnx"))


class OnnxWeights:
    """The ONNX files of one model: an encoder's one, or those of an encoder and a decoder.

    Args:
        path: see `files_of`.
        settings: what the folder's JSON files leave out, by the files' names. An object's keys go over the file's own.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._files = files_of(path)
        folder = path if path.is_dir() else path.parent
        self._folder = folder.parent if folder.name == "onnx" and not (folder / "config.json").is_file() else folder
        self._settings = settings

    @cached_property
    def room(self) -> int:
        """Bytes that the folder takes at most: a weight has 4 bits or more."""
        return sum(file.stat().st_size for file in self._files) * _FLOAT32 * 2

    def write(self, folder: Path) -> None:
        """Write the Hugging Face folder: float32 weights, and the settings beside them.

        Raises:
            UnreadableSource: a file is damaged, or a tensor is missing or has another shape.
            UnsupportedArchitecture: transformers has no such model, or a tensor is none of its parameters.
            UnsupportedModel: the files hold the same tensor with other numbers.
        """
        copy_settings(self._folder, folder)
        for name, content in self._settings.items():
            file = folder / name
            before = HuggingFaceFolder(folder).json(name) if file.is_file() and isinstance(content, dict) else {}
            file.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(before | content if isinstance(content, dict) else content, indent=2)
            file.write_text(text + "\n", encoding="utf-8")
        if not (folder / "config.json").is_file():
            raise UnreadableSource(
                f"{self._folder} has weights in ONNX files and no config.json: copy the file of the original model, or "
                'write its keys under files."config.json" of the source'
            )
        _without_truncation(folder)
        write_shards(self._tensors(HuggingFaceFolder(folder)), folder)

    def _tensors(self, settings: HuggingFaceFolder) -> Iterator[tuple[str, Tensor]]:
        """The parameters by transformers' names."""
        import numpy as np
        import torch

        model = _model(settings, self._folder)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        written: dict[str, bytes] = {}  # digests: of two files, both may have the embedding
        for file in self._files:
            for weight in _weights(file):
                name = next((name for name in weight.names if name in shapes), None)
                if name is None and weight.values.size == 1:
                    continue  # a constant of the graph
                if name is None:
                    raise UnsupportedArchitecture(
                        f"{file} has the tensor {weight.names[0]}, which transformers' {type(model).__name__} does not "
                        "have: correct config.json, or export the original model"
                    )
                if weight.values.shape != shapes[name]:
                    raise UnreadableSource(
                        f"{file}: {name} has the shape {weight.values.shape}, and config.json asks for {shapes[name]}: "
                        "correct config.json"
                    )
                values = np.ascontiguousarray(weight.values)
                digest = hashlib.sha256(values.tobytes()).digest()
                if name not in written:
                    written[name] = digest
                    yield name, torch.from_numpy(values)
                elif written[name] != digest:
                    raise UnsupportedModel(
                        f"{file} has {name} with other numbers than {', '.join(each.name for each in self._files)} "
                        "before it: name one of these files as the source"
                    )
        found = {id(value) for name, value in model.named_parameters(remove_duplicate=False) if name in written}
        for name, value in model.named_parameters():
            if id(value) not in found and not name.startswith(_OPTIONAL):
                raise UnreadableSource(f"{self._folder}: its ONNX files have no {name}, which config.json asks for")


def _model(settings: HuggingFaceFolder, folder: Path) -> Any:
    """The model that config.json names, without numbers."""
    import torch
    import transformers

    named = settings.config.architectures or ["none"]
    kind = getattr(transformers, str(named[0]), None)
    if kind is None:
        raise UnsupportedArchitecture(
            f"{folder}: config.json has architectures {named[0]!r}, which must be a class of transformers: "
            'write it under files."config.json" of the source'
        )
    with torch.device("meta"):
        return kind(settings.config)


def _without_truncation(folder: Path) -> None:
    """Take from tokenizer.json where the package's own caller cuts and fills texts: it is no setting of the model."""
    file = folder / "tokenizer.json"
    if file.is_file():
        found = HuggingFaceFolder(folder).table("tokenizer.json")
        if found.get("truncation") or found.get("padding"):
            text = json.dumps({**found, "truncation": None, "padding": None}, ensure_ascii=False)
            file.write_text(text, encoding="utf-8")


def _weights(file: Path) -> Iterator[_Weight]:
    """The weights of a graph, in its order."""
    import onnx

    with reading(file.parent, file.name):
        graph = onnx.load(str(file)).graph
        stored = {tensor.name: tensor for tensor in graph.initializer}
        readers = _readers(graph, stored)
        for name, node in readers.items():
            if node.op_type == "MatMulNBits":
                yield _Weight(_names(name, node), _from_blocks(node, stored))
        parts = {name for node in graph.node if node.op_type == "MatMulNBits" for name in node.input[1:]}
        for name, tensor in stored.items():
            base = name.removesuffix(_QUANTIZED)
            of = re.sub(r"_(scale|zero_point)$", _QUANTIZED, name)
            if name in parts or (of != name and of in stored):
                continue
            if base == name and tensor.data_type != onnx.TensorProto.FLOAT:
                continue  # a shape, or an index
            reader = readers.get(name)
            values = _number(name, reader, stored)
            if reader is not None and _is_transposed(reader, name):
                values = values.T
            yield _Weight(_names(base, reader), values)


def _readers(graph: onnx.GraphProto, stored: Mapping[str, Any]) -> dict[str, onnx.NodeProto]:
    """The matmul that reads a stored tensor, by the tensor; through a DequantizeLinear where one lies between."""
    through = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    found: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        if node.op_type in (*_MATMULS, "MatMulNBits", "Gemm"):
            for name in node.input[:2]:
                name = through.get(name, name)
                if name in stored:
                    found[name] = node
    return found


def _is_transposed(node: onnx.NodeProto, name: str) -> bool:
    if node.op_type == "Gemm":
        return not any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return node.op_type in _MATMULS


def _names(stored: str, node: onnx.NodeProto | None) -> tuple[str, ...]:
    """What a weight may be called by the name that it is stored under, and by the node that reads it."""
    found = [stored]
    if node is not None:
        found.append(".".join([*node.name.strip("/").split("/")[:-1], "weight"]))
    renamed = [(pattern.sub(other, name)) for name in found for pattern, other in _RENAMED]
    every = dict.fromkeys([*found, *renamed])
    # The stored name of a folded matrix says nothing to a person.
    return tuple(sorted(every, key=lambda name: name.startswith("onnx::")))


def _number(name: str, reader: onnx.NodeProto | None, stored: Mapping[str, Any]) -> NDArray[np.float32]:
    """The values of a tensor, in its own layout."""
    import numpy as np
    from onnx import numpy_helper

    values: NDArray[Any] = numpy_helper.to_array(stored[name])
    base = name.removesuffix(_QUANTIZED)
    if base == name:
        return values.astype(np.float32)
    scale, zero = (
        numpy_helper.to_array(stored[f"{base}_{part}"]).astype(np.float32) for part in ("scale", "zero_point")
    )
    if scale.size > 1 and (reader is None or reader.op_type not in _MATMULS or scale.shape != values.shape[-1:]):
        raise UnsupportedModel(
            f"the ONNX file has {base} with {scale.size} scales, which are read for the columns of a matmul alone: "
            "export the original model"
        )
    found: NDArray[np.float32] = (values.astype(np.float32) - zero) * scale
    return found


def _from_blocks(node: onnx.NodeProto, stored: Mapping[str, Any]) -> NDArray[np.float32]:
    """The weight of a MatMulNBits, [outputs, inputs]."""
    import numpy as np
    from onnx import numpy_helper

    known = {attribute.name: attribute.i for attribute in node.attribute}
    bits, inputs, outputs, size = known.get("bits", 4), known["K"], known["N"], known["block_size"]
    if bits not in (4, 8) or any(node.input[4:]):
        raise UnsupportedModel(f"{node.name} has {bits} bits, or an order of its groups, which is not read")
    codes, scales = (numpy_helper.to_array(stored[name]) for name in node.input[1:3])
    blocks = -(-inputs // size)
    zeros = np.full((outputs, blocks), 2 ** (bits - 1), np.float32)
    if len(node.input) > 3 and node.input[3]:
        packed = numpy_helper.to_array(stored[node.input[3]])
        zeros = packed.astype(np.float32)
        if packed.dtype == np.uint8:
            zeros = _unpacked(packed.reshape(outputs, -1), bits)[:, :blocks].astype(np.float32)
        zeros = zeros.reshape(outputs, blocks)
    spread = _unpacked(codes.reshape(outputs * blocks, -1), bits).reshape(outputs, blocks, size).astype(np.float32)
    scaled: NDArray[np.float32] = (spread - zeros[..., None]) * scales.reshape(outputs, blocks, 1).astype(np.float32)
    return scaled.reshape(outputs, -1)[:, :inputs]


def _unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes out of bytes, the lower half of a byte first."""
    import numpy as np

    if bits == 8:
        return packed
    halves: NDArray[np.uint8] = np.stack([packed & 15, packed >> 4], axis=-1)
    return halves.reshape(len(packed), -1)
