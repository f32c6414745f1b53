"""Whisper in CTranslate2's format becomes a Hugging Face folder with the same weights and settings."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

from tests import tiny_models
from trident_export.errors import UnreadableSource, UnsupportedModel
from trident_export.huggingface.ctranslate2_file import FILE, WhisperFile, file_of

_LAYER = {
    "self_attn_layer_norm": "self_attention/layer_norm",
    "self_attn.out_proj": "self_attention/linear_1",
    "encoder_attn_layer_norm": "attention/layer_norm",
    "encoder_attn.q_proj": "attention/linear_0",
    "encoder_attn.out_proj": "attention/linear_2",
    "final_layer_norm": "ffn/layer_norm",
    "fc1": "ffn/linear_0",
    "fc2": "ffn/linear_1",
}
_NORM = {"weight": "gamma", "bias": "beta"}
_KINDS = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}


def variables(model: WhisperForConditionalGeneration) -> dict[str, NDArray[Any]]:
    """A model's weights as CTranslate2's converter names and packs them."""
    state = {name.removeprefix("model."): value.numpy() for name, value in model.state_dict().items()}
    found: dict[str, NDArray[Any]] = {}
    for side, heads in (("encoder", 2), ("decoder", 2)):
        found[f"{side}/num_heads"] = np.array(heads, np.int16)
        found[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        for part, theirs in _NORM.items():
            found[f"{side}/layer_norm/{theirs}"] = state[f"{side}.layer_norm.{part}"]
        for layer in range(2):
            before, after = f"{side}.layers.{layer}.", f"{side}/layer_{layer}/"
            for ours, theirs in _LAYER.items():
                for part in ("weight", "bias"):
                    if before + f"{ours}.{part}" in state:
                        name = _NORM[part] if theirs.endswith("norm") else part
                        found[f"{after}{theirs}/{name}"] = state[before + f"{ours}.{part}"]
            attentions = {"self_attention/linear_0": ("self_attn", "qkv")}
            if side == "decoder":
                attentions["attention/linear_1"] = ("encoder_attn", "kv")
            for theirs, (module, letters) in attentions.items():
                names = [f"{before}{module}.{letter}_proj" for letter in letters]
                zeros = np.zeros(len(state[f"{names[0]}.weight"]), np.float32)
                found[f"{after}{theirs}/weight"] = np.concatenate([state[f"{name}.weight"] for name in names])
                found[f"{after}{theirs}/bias"] = np.concatenate([state.get(f"{name}.bias", zeros) for name in names])
    for name in ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"):
        found[f"encoder/{name.replace('.', '/')}"] = state[f"encoder.{name}"]
    found["decoder/embeddings/weight"] = state["decoder.embed_tokens.weight"]
    return found


def packed(values: dict[str, NDArray[Any]], version: int = 6, specification: str = "WhisperSpec") -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    content = struct.pack("<I", version) + text(specification) + struct.pack("<II", 3, len(values))
    for name, value in values.items():
        content += text(name) + struct.pack("<B", value.ndim) + struct.pack(f"<{value.ndim}I", *value.shape)
        content += struct.pack("<BI", _KINDS[value.dtype.name], value.nbytes) + value.tobytes()
    return content + struct.pack("<I", 1) + text("decoder/projection/weight") + text("decoder/embeddings/weight")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_whisper(tmp_path_factory.mktemp("ctranslate2") / "original", 5, seconds=30)


def converted(original: Path, folder: Path, content: bytes) -> Path:
    """The folder that a CTranslate2 folder becomes."""
    theirs = folder / "theirs"
    theirs.mkdir()
    (theirs / FILE).write_bytes(content)
    (theirs / "tokenizer.json").write_bytes((original / "tokenizer.json").read_bytes())
    (theirs / "config.json").write_text(json.dumps({"suppress_ids": [5, 6], "suppress_ids_begin": [7]}))
    assert file_of(theirs) == theirs / FILE
    plain = folder / "plain"
    plain.mkdir()
    WhisperFile(theirs).write(plain)
    return plain


def test_the_folder_has_the_same_weights_and_says_what_the_model_is(original: Path, tmp_path: Path) -> None:
    before = WhisperForConditionalGeneration.from_pretrained(original).eval()
    halves = {name: value.astype(np.float16) if "conv" in name else value for name, value in variables(before).items()}
    plain = converted(original, tmp_path, packed(halves))
    after = WhisperForConditionalGeneration.from_pretrained(plain).eval()
    for name, value in before.state_dict().items():
        expected = value.half().float() if "conv" in name else value
        assert torch.equal(after.state_dict()[name], expected), name
    assert WhisperFeatureExtractor.from_pretrained(plain).to_dict()["chunk_length"] == 30
    config = after.generation_config
    assert (config.suppress_tokens, config.begin_suppress_tokens, config.max_length) == ([5, 6], [7], 64)
    for role in ("decoder_start_token_id", "eos_token_id", "no_timestamps_token_id"):
        assert getattr(config, role) == getattr(before.generation_config, role)
    assert config.is_multilingual is False  # by the size of the vocabulary, which in a real one tells it
    text = "Hello there, 1 2 3."
    ids = AutoTokenizer.from_pretrained(original)(text).input_ids
    assert AutoTokenizer.from_pretrained(plain).decode(ids, skip_special_tokens=True) == text


def test_damaged_and_other_files_are_refused_with_a_sentence(original: Path, tmp_path: Path) -> None:
    values = variables(WhisperForConditionalGeneration.from_pretrained(original))
    whole = packed(values)
    integers = {**values, "encoder/layer_0/ffn/linear_0/weight": np.zeros((48, 32), np.int8)}
    cases = [
        (whole[:-2000], UnreadableSource, "model.bin ends in the middle"),
        (whole[:40], UnreadableSource, "model.bin ends in the middle"),
        (packed(values, version=5), UnsupportedModel, "holds a 'WhisperSpec' in version 5 of CTranslate2's format"),
        (packed(values, specification="TransformerSpec"), UnsupportedModel, "holds a 'TransformerSpec' in version 6"),
        (packed(integers), UnsupportedModel, "holds weights of 8 bits"),
    ]
    for number, (content, error, said) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(error, match=said):
            converted(original, folder, content)
