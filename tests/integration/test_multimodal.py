"""Multimodal folders are served by their text part: the numbers are those of the whole model given text alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests import tiny_models
from trident_export import add
from trident_export.errors import UnreadableSource, UnsupportedArchitecture
from trident_export.huggingface.folder import HuggingFaceFolder

pytestmark = pytest.mark.usefixtures("one_thread")
ROLES = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
TEXT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    **ROLES,
}
IMAGE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGE |= {"image_size": 28, "patch_size": 14}
QWEN_IMAGE = {"depth": 1, "num_heads": 2, "patch_size": 14, "out_hidden_size": 64}
QWEN_IDS = {"image_token_id": 510, "video_token_id": 509, "vision_start_token_id": 508, "vision_end_token_id": 507}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def gemma3() -> PreTrainedModel:
    config = transformers.Gemma3Config(
        text_config=TEXT | {"sliding_window": 8},
        vision_config=IMAGE,
        mm_tokens_per_image=4,
        image_token_index=510,
        boi_token_index=508,
        eoi_token_index=509,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def gemma4() -> PreTrainedModel:
    text = TEXT | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    text |= {"global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512}
    image = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma4Config(
        text_config=text | {"num_kv_shared_layers": 0},
        vision_config=image | {"num_key_value_heads": 2, "head_dim": 16},
        audio_config=None,
        image_token_id=510,
    )
    return transformers.Gemma4ForConditionalGeneration(config)


def mistral3() -> PreTrainedModel:
    config = transformers.Mistral3Config(
        text_config=TEXT | {"model_type": "mistral"},
        vision_config=IMAGE | {"model_type": "pixtral", "head_dim": 16},
        image_token_index=510,
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def llama4() -> PreTrainedModel:
    text = TEXT | {"intermediate_size_mlp": 96, "num_local_experts": 2, "num_experts_per_tok": 1}
    text |= {"interleave_moe_layer_step": 1, "attention_chunk_size": 16, "no_rope_layer_interval": 2}
    image = IMAGE | {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64}
    config = transformers.Llama4Config(text_config=text, vision_config=image, image_token_index=510)
    return transformers.Llama4ForConditionalGeneration(config)


def qwen2_vl() -> PreTrainedModel:
    image = {"depth": 1, "num_heads": 2, "patch_size": 14, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(text_config=TEXT | {"rope_parameters": MROPE}, vision_config=image, **QWEN_IDS)
    return transformers.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl() -> PreTrainedModel:
    image = QWEN_IMAGE | {"hidden_size": 32, "intermediate_size": 48, "fullatt_block_indexes": [0]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": MROPE, "use_sliding_window": False}, vision_config=image, **QWEN_IDS
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> PreTrainedModel:
    image = QWEN_IMAGE | {"hidden_size": 32, "intermediate_size": 48, "deepstack_visual_indexes": [0]}
    rope = MROPE | {"mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(text_config=TEXT | {"rope_parameters": rope}, vision_config=image, **QWEN_IDS)
    return transformers.Qwen3VLForConditionalGeneration(config)


MODELS: dict[str, Any] = {
    make.__name__: make for make in (gemma3, gemma4, mistral3, llama4, qwen2_vl, qwen2_5_vl, qwen3_vl)
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("multimodal")


def folder(root: Path, name: str) -> Path:
    path = root / name
    if not path.exists():
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(8)
        model.save_pretrained(path)
        tiny_models.byte_level_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("name", MODELS)
def test_the_text_part_computes_what_the_whole_model_does(root: Path, name: str) -> None:
    source = HuggingFaceFolder(folder(root, name))
    ids = torch.tensor([source.tokenizer("The quick brown fox jumps over the lazy dog. " * 3).input_ids[:60]])
    with torch.inference_mode():
        whole = source.load_whole(AutoModelForCausalLM)(input_ids=ids).logits.log_softmax(-1)
        part = source.load(AutoModelForCausalLM)
        found = part(input_ids=ids).logits.log_softmax(-1)
    assert whole.std() > 0.1
    assert torch.equal(whole.argmax(-1), found.argmax(-1))
    assert torch.allclose(whole, found, atol=1e-5)
    assert part.config.vocab_size == 512
    assert not any("vision" in parameter or "visual" in parameter for parameter, _ in part.named_parameters())
    assert all(not parameter.is_meta for parameter in [*part.parameters(), *part.buffers()])


@pytest.mark.parametrize("name", MODELS)
def test_add_says_what_is_left_out(root: Path, name: str) -> None:
    proposal = add.propose(folder(root, name), {"path": "m"})
    assert proposal.table["task"] == "text-generation"
    assert proposal.table["limits"]["context"] == 128
    left = [reason for reason in proposal.reasons if reason.startswith("left out: ")]
    assert left == [f"left out: vision; a {name} model is served by its text part"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral3", "qwen2_5_vl"])
def test_the_exported_text_part_passes_the_gate_against_the_whole_model(root: Path, tmp_path: Path, name: str) -> None:
    entry = tiny_models.causal_entry(folder(root, name))
    (tmp_path / "models.toml").write_text(tiny_models.models_toml({"m": entry}))
    command = [sys.executable, "-m", "trident_export", "export", "--models-file", tmp_path / "models.toml"]
    command += ["--repository", tmp_path / "repository", "--cache", tmp_path / "cache"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fp32: passed (kl " in done.stderr


def test_whisper_is_no_translation_and_no_decoder(tmp_path: Path) -> None:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 20}
    config = transformers.WhisperConfig(
        vocab_size=512, d_model=32, max_target_positions=32, decoder_start_token_id=1, **sizes, **ROLES
    )
    path = tmp_path / "speech"
    transformers.WhisperForConditionalGeneration(config).save_pretrained(path)
    tiny_models.byte_level_tokenizer().save_pretrained(path)
    with pytest.raises(UnreadableSource, match=r"preprocessor_config\.json can't be read"):  # it is a task of its own
        add.propose(path, {"path": "m"})
    with pytest.raises(UnsupportedArchitecture, match="'whisper', which has an encoder and a decoder"):
        HuggingFaceFolder(path).load(AutoModelForCausalLM)
    with pytest.raises(UnsupportedArchitecture, match="for which transformers has no ModelForSeq2SeqLM"):
        HuggingFaceFolder(path).load(transformers.AutoModelForSeq2SeqLM)
