"""GGUF files of tiny models, written as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

Floats = NDArray[np.float32]
# By transformers' type: the architecture in the file.
ARCHITECTURES = {"gemma3_text": "gemma3", "mistral": "llama", "qwen3_moe": "qwen3moe"}


def tensors(model: PreTrainedModel) -> dict[str, Floats]:
    """A model's weights by the file's names and in its order of rows."""
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    (arch,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found: dict[str, Floats] = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().float().numpy().copy()
        if name.endswith("mlp.experts.gate_up_proj"):
            layer = name.split(".")[2]
            half = value.shape[1] // 2
            found[f"blk.{layer}.ffn_gate_exps.weight"] = value[:, :half].copy()
            found[f"blk.{layer}.ffn_up_exps.weight"] = value[:, half:].copy()
            continue
        stem, _, suffix = name.rpartition(".")
        if suffix not in ("weight", "bias"):
            stem, suffix = name, "weight"
        key = table.get_name(stem)
        assert key is not None, name
        if architecture == "llama" and (".attn_q" in f".{key}" or ".attn_k" in f".{key}"):
            heads = config.num_attention_heads if "attn_q" in key else config.num_key_value_heads
            # Halves of a head become neighbours.
            value = value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        if architecture in ("gemma2", "gemma3") and "norm" in key:
            value = value + 1
        if architecture == "gpt2" and value.ndim == 2 and "_embd" not in key and key != "output":
            value = value.T.copy()
        if key.endswith("shortconv.conv"):
            value = value.squeeze(1)
        found[f"{key}.{suffix}"] = value
    return found


def settings(model: PreTrainedModel) -> dict[str, Any]:
    """A model's settings by the file's names."""
    config = model.config
    found = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "vocab_size": config.vocab_size,
    }
    if config.model_type == "gpt2":
        return found | {
            "feed_forward_length": 4 * config.n_embd,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    found |= {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.norm_eps if config.model_type == "lfm2" else config.rms_norm_eps,
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": int(size * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
    }
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None):
            found[name] = getattr(config, name)
    if getattr(config, "sliding_window", None):
        found["attention.sliding_window"] = config.sliding_window
    if config.model_type == "lfm2":
        heads = [config.num_key_value_heads if kind == "full_attention" else 0 for kind in config.layer_types]
        found |= {"attention.head_count_kv": heads, "shortconv.l_cache": config.conv_L_cache}
    if config.model_type == "qwen3_moe":
        found |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    return found


def write(
    path: Path,
    model: PreTrainedModel,
    *,
    kinds: Mapping[str, str] | None = None,
    more: Mapping[str, Any] | None = None,
    vocabulary: Mapping[str, Any] | None = None,
    extra: Mapping[str, Floats] | None = None,
    without: tuple[str, ...] = (),
    parts: int = 1,
) -> dict[str, Floats]:
    """Write a file; returns the values that its blocks have, by the file's names.

    Args:
        kinds: the blocks by parts of a tensor's name, "" for every matrix; the first that fits.
        more: more settings, without the architecture's name.
        vocabulary: entries of `tokenizer.`.
        extra: more tensors.
        without: names that are left out.
        parts: files.
    """
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    found = {key: value for key, value in {**tensors(model), **(extra or {})}.items() if key not in without}
    stored: dict[str, Floats] = {}
    names = list(found)
    for part in range(parts):
        file = path if parts == 1 else path.with_name(f"{path.stem}-{part + 1:05d}-of-{parts:05d}.gguf")
        writer = gguf.GGUFWriter(file, architecture)
        if part == 0:
            for key, value in {**settings(model), **(more or {})}.items():
                _add(writer, f"{architecture}.{key}", value)
            for key, value in (vocabulary or {}).items():
                _add(writer, key if key.startswith("general.") else f"tokenizer.{key}", value)
        for name in names[part::parts]:
            kind = next((kind for key, kind in (kinds or {}).items() if key in name), "F32")
            if found[name].ndim < 2:
                kind = "F32"
            qtype = gguf.GGMLQuantizationType[kind]
            blocks = quantize(found[name], qtype)
            stored[name] = gguf.quants.dequantize(blocks, qtype)
            writer.add_tensor(name, blocks, raw_dtype=None if kind in ("F32", "F16") else qtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return stored


def quantize(values: Floats, qtype: gguf.GGMLQuantizationType) -> NDArray[Any]:
    """Blocks of a matrix; of the kinds that gguf can't write, blocks of any codes with scales of a sensible size."""
    try:
        return gguf.quants.quantize(values, qtype)
    except NotImplementedError:
        pass
    size, width = gguf.GGML_QUANT_SIZES[qtype]
    count = values.size // size
    random = np.random.default_rng(count)
    blocks = random.integers(0, 256, (count, width), dtype=np.uint8)
    scale = np.float16(0.001).tobytes()
    # Where a block's scales of 16 bits are: all other bytes may be anything.
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    for start in places.get(qtype.name, (0,)):
        blocks[:, start : start + 2] = np.frombuffer(scale, np.uint8)
    return blocks.reshape(*values.shape[:-1], -1)


def as_stored(model: PreTrainedModel, stored: Mapping[str, Floats]) -> PreTrainedModel:
    """The model with the values that a file has: what it should be read as."""
    gemma = model.config.model_type.startswith("gemma")
    moved = {key: int(gemma and "norm" in key) for key in stored}
    parameters = list(model.parameters())
    # Whose values a tensor of the file has, and where they were: seen from a model of numbers in place of weights.
    for number, parameter in enumerate(parameters):
        parameter.fill_(number)
    owners = {key: int(value.reshape(-1)[0]) - moved.get(key, 0) for key, value in tensors(model).items()}
    for parameter in parameters:
        parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape))
    for key, places in tensors(model).items():  # copies, so that writing changes none that is still to be read
        order = torch.from_numpy((places - moved[key]).astype(np.int64)).reshape(-1)
        values = torch.from_numpy(np.float32(stored[key])).reshape(-1) - moved[key]
        parameters[owners[key]].reshape(-1)[order] = values
    return model


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
