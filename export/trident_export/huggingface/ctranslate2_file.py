"""Whisper in CTranslate2's format, as faster-whisper reads it: its weights by transformers' names, and the settings.

A folder has model.bin, tokenizer.json and a config.json of CTranslate2's own. model.bin is, little end first: a version
(uint32), the name of the specification, its revision and the number of variables (uint32); for each variable its name,
its rank (uint8), its dimensions (uint32), its type (uint8), its bytes (uint32) and these; then aliases, pairs of names
behind their number. A text is its length with the closing zero (uint16) and its characters (the format is
`ctranslate2/specs/model_spec.py`'s). What transformers reads beside the weights is told by their shapes and by the
tokens of tokenizer.json.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trident_export.errors import UnreadableSource, UnsupportedModel
from trident_export.huggingface.folder import HuggingFaceFolder, reading

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FILE = "model.bin"
_SPECIFICATION = "WhisperSpec"
_VERSION = 6
_TYPES = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}
_MULTILINGUAL = 51865  # tokens, and more
_RATE, _WINDOW = 16000, 30  # samples a second, seconds
# Modules of a layer: theirs, and transformers'.
_LAYER = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "attention/linear_0": "encoder_attn.q_proj",
    "attention/linear_2": "encoder_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
_PACKED = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
}
_WHOLE = {
    "position_encodings/encodings": "embed_positions.weight",
    "embeddings/weight": "embed_tokens.weight",
    **{f"conv{n}/{part}": f"conv{n}.{part}" for n in (1, 2) for part in ("weight", "bias")},
}
_PARTS = {"gamma": "weight", "beta": "bias"}


def file_of(path: Path) -> Path | None:
    """The file of a folder that has CTranslate2's weights and no others; None: it has none."""
    file = path / FILE
    return file if file.is_file() and next(path.glob("*.safetensors"), None) is None else None


class WhisperFile:
    """The model of a folder.

    Args:
        folder: has model.bin, config.json and tokenizer.json.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def room(self) -> int:
        """Bytes that the plain folder takes at most."""
        return 4 * (self._folder / FILE).stat().st_size

    def write(self, folder: Path) -> None:
        """Write the Hugging Face folder: float32 weights and settings.

        Raises:
            UnreadableSource: a file is damaged.
            UnsupportedModel: it is no Whisper, or its weights are integers.
        """
        import torch

        from trident_export.huggingface.quantized import write_shards

        settings = HuggingFaceFolder(self._folder)
        tokens = settings.table("tokenizer.json")
        with reading(self._folder, "tokenizer.json"):
            ids = {token["content"]: int(token["id"]) for token in tokens["added_tokens"]}
            roles = {
                "bos_token_id": ids["<|endoftext|>"],
                "eos_token_id": ids["<|endoftext|>"],
                "pad_token_id": ids["<|endoftext|>"],
                "decoder_start_token_id": ids["<|startoftranscript|>"],
            }
        config = self._config(roles)
        no_timestamps = ids["<|notimestamps|>"]
        known = set(ids.values())
        step = 0.02
        for index in range(no_timestamps + 1, config["vocab_size"]):
            if index not in known:
                text = f"<|{step * (index - no_timestamps - 1):.2f}|>"
                flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
                tokens["added_tokens"].append({"id": index, "content": text, **flags})
        extractor = {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": config["num_mel_bins"],
            "sampling_rate": _RATE,
            "hop_length": 160,
            "n_fft": 400,
            "chunk_length": _WINDOW,
        }
        files: dict[str, Any] = {
            "config.json": config,
            "generation_config.json": self._generation(settings.table("config.json"), ids, roles, config),
            "preprocessor_config.json": extractor,
            "tokenizer.json": tokens,
            "tokenizer_config.json": {"tokenizer_class": "WhisperTokenizer", "model_max_length": 1024},
        }
        for name, content in files.items():
            text = json.dumps(content, ensure_ascii=False, indent=2)
            (folder / name).write_text(text + "\n", encoding="utf-8")
        write_shards(((name, torch.from_numpy(value.copy())) for name, value in self._weights()), folder)

    def _config(self, roles: Mapping[str, int]) -> dict[str, Any]:
        found = self._variables
        layers = {
            side: len(
                {name.split("/")[1] for name in found if name.startswith(f"{side}/layer_") and "norm/" not in name}
            )
            for side in ("encoder", "decoder")
        }
        vocabulary, width = found["decoder/embeddings/weight"].shape
        sizes = {}
        for side in ("encoder", "decoder"):
            sizes[f"{side}_layers"] = layers[side]
            sizes[f"{side}_attention_heads"] = int(found[f"{side}/num_heads"].reshape(-1)[0])
            sizes[f"{side}_ffn_dim"] = found[f"{side}/layer_0/ffn/linear_0/weight"].shape[0]
        return {
            "architectures": ["WhisperForConditionalGeneration"],
            "model_type": "whisper",
            "d_model": width,
            "vocab_size": vocabulary,
            "num_mel_bins": found["encoder/conv1/weight"].shape[1],
            "max_source_positions": found["encoder/position_encodings/encodings"].shape[0],
            "max_target_positions": found["decoder/position_encodings/encodings"].shape[0],
            **sizes,
            **roles,
        }

    def _generation(
        self, theirs: Mapping[str, Any], ids: Mapping[str, int], roles: Mapping[str, int], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        multilingual = config["vocab_size"] >= _MULTILINGUAL
        found: dict[str, Any] = {
            **roles,
            "is_multilingual": multilingual,
            "max_length": config["max_target_positions"],
            "no_timestamps_token_id": ids["<|notimestamps|>"],
            "max_initial_timestamp_index": 50,
            "suppress_tokens": theirs.get("suppress_ids"),
            "begin_suppress_tokens": theirs.get("suppress_ids_begin"),
        }
        if multilingual:
            first, last = ids["<|startoftranscript|>"], ids["<|translate|>"]
            found["lang_to_id"] = {token: index for token, index in ids.items() if first < index < last}
            found["task_to_id"] = {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")}
        return found

    def _weights(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """The parameters by transformers' names."""
        import numpy as np

        for name, value in self._variables.items():
            if not value.ndim or value.dtype.kind != "f":
                if value.dtype.kind == "i" and name.endswith("/weight"):
                    raise UnsupportedModel(
                        f"{self._folder} holds weights of {8 * value.dtype.itemsize} bits in CTranslate2's format: "
                        "take the model in float16 or float32"
                    )
                continue
            side, _, rest = name.partition("/")
            array = value.astype(np.float32)
            if (whole := _WHOLE.get(rest)) is not None:
                yield f"model.{side}.{whole}", array
                continue
            module, _, part = rest.rpartition("/")
            part = _PARTS.get(part, part)
            if module == "layer_norm":
                yield f"model.{side}.layer_norm.{part}", array
                continue
            layer, _, module = module.partition("/")
            before = f"model.{side}.layers.{layer.removeprefix('layer_')}."
            if module in _PACKED:
                names = _PACKED[module]
                for target, piece in zip(names, np.split(array, len(names)), strict=True):
                    if not (target.endswith("k_proj") and part == "bias"):  # zeros
                        yield f"{before}{target}.{part}", piece
            elif module in _LAYER:
                yield f"{before}{_LAYER[module]}.{part}", array
            else:
                raise UnsupportedModel(f"{self._folder}: {FILE} has {name!r}, which no Whisper has")

    @cached_property
    def _variables(self) -> dict[str, NDArray[Any]]:
        """The variables of model.bin by their names.

        Raises:
            UnreadableSource: the file is damaged.
            UnsupportedModel: it is another version, or no Whisper.
        """
        import numpy as np

        content = np.memmap(self._folder / FILE, np.uint8, "r")
        at = 0

        def take(size: int) -> bytes:
            nonlocal at
            if at + size > len(content):
                raise UnreadableSource(f"{self._folder}: {FILE} ends in the middle: copy the model again")
            at += size
            return content[at - size : at].tobytes()

        def number(kind: str) -> int:
            return int(struct.unpack(f"<{kind}", take(struct.calcsize(kind)))[0])

        def text() -> str:
            return take(number("H"))[:-1].decode("utf-8", "replace")

        version, specification = number("I"), text()
        if version != _VERSION or specification != _SPECIFICATION:
            raise UnsupportedModel(
                f"{self._folder}: {FILE} holds a {specification[:80]!r} in version {version} of CTranslate2's format; "
                f"Trident reads a {_SPECIFICATION} in version {_VERSION}"
            )
        number("I")
        found: dict[str, NDArray[Any]] = {}
        for _ in range(number("I")):
            name = text()
            shape = [number("I") for _ in range(number("B"))]
            kind, size = _TYPES.get(number("B")), number("I")
            start = at
            take(size)
            if kind is None or size != np.dtype(kind).itemsize * int(np.prod(shape, dtype=np.int64)):
                raise UnreadableSource(f"{self._folder}: {FILE} has a damaged {name[:80]!r}: copy the model again")
            found[name] = content[start : start + size].view(kind).reshape(shape)
        return found
