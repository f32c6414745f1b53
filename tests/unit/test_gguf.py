"""GGUF files give the model and the tokenizer that they were written from."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests import gguf_writer, tiny_models
from trident_export import cli, corpora, models_file
from trident_export.errors import ExportError
from trident_export.huggingface import gguf_file, sources

SHARED: dict[str, Any] = {
    "vocab_size": tiny_models.VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.0 + index / 8 for index in range(32)],
    "short_factor": [1.0 + index / 64 for index in range(32)],
}
GEMMA: dict[str, Any] = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16}
SCALED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHARED, head_dim=128),
    "llama3": LlamaConfig(**SHARED, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "yarn": LlamaConfig(
        **SHARED,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": MistralConfig(**SHARED, head_dim=128, sliding_window=None),
    "qwen2": Qwen2Config(**SHARED),
    "qwen3": Qwen3Config(**SHARED, head_dim=128, tie_word_embeddings=True),
    "qwen3_moe": Qwen3MoeConfig(
        **SHARED, head_dim=64, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256, norm_topk_prob=True
    ),
    "gemma2": Gemma2Config(**SHARED, **GEMMA),
    "gemma3": Gemma3TextConfig(**{**SHARED, "num_hidden_layers": 7}, **GEMMA, rope_parameters=SCALED),
    "phi3": Phi3Config(**SHARED, sliding_window=16),
    "phi3-long": Phi3Config(
        **SHARED, sliding_window=None, original_max_position_embeddings=64, rope_parameters=dict(LONG)
    ),
    "lfm2": Lfm2Config(**SHARED, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "gpt2": GPT2Config(vocab_size=512, n_embd=256, n_layer=2, n_head=4, n_positions=256, bos_token_id=None),
}
TEXTS = (
    "Hello world",
    " leading space",
    "  two   spaces  12 345  6",
    "it's\n\n new\tlines ",
    "Caf\u00e9 ni\u00f1o \u4f60\u597d \u043f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 \U0001f642",
    "\u2581literal",
    "",
)


def make(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def byte_level(tokenizer: PreTrainedTokenizerFast | None = None, rule: str = "gpt-2") -> dict[str, Any]:
    """A byte-level tokenizer as entries of a file."""
    written = json.loads((tokenizer or tiny_models.byte_level_tokenizer()).backend_tokenizer.to_str())
    special = {entry["id"]: entry["content"] for entry in written["added_tokens"]}
    tokens = {number: token for token, number in written["model"]["vocab"].items()} | special
    return {
        "ggml.model": "gpt2",
        "ggml.pre": rule,
        "ggml.tokens": [tokens[number] for number in range(len(tokens))],
        "ggml.token_type": [3 if number in special else 1 for number in range(len(tokens))],
        "ggml.merges": [" ".join(pair) for pair in written["model"]["merges"]],
        "ggml.eos_token_id": 0,
        "ggml.add_bos_token": False,
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }


def converted(path: Path) -> Path:
    folder = path.parent / "converted"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    gguf_file.GgufFile(path).write(folder)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_is_read_as_it_was_written(tmp_path: Path, name: str) -> None:
    model = make(CONFIGS[name])
    more: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    if name == "llama3":
        extra["rope_freqs.weight"] = llama3_divisors(LLAMA3)
    if name == "yarn":
        more = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
    if name == "gemma3":
        more = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    if name == "phi3-long":
        more = {"rope.scaling.original_context_length": 64}
        extra = {f"rope_factors_{length}.weight": np.float32(LONG[f"{length}_factor"]) for length in ("long", "short")}
    rule = "qwen2" if name == "qwen2" else "gpt-2"
    stored = gguf_writer.write(
        tmp_path / "m.gguf",
        model,
        kinds={"token_embd": "Q8_0", "shortconv.conv": "F32", "": "Q4_1" if name == "lfm2" else "Q5_1"},
        more=more,
        extra=extra,
        vocabulary=byte_level(rule=rule),
    )
    folder = converted(tmp_path / "m.gguf")
    found = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    expected = gguf_writer.as_stored(model, stored)
    ids = torch.arange(1, 161)[None]  # beyond every window and original context
    with torch.no_grad():
        for length in (40, 160):
            ours, theirs = found(ids[:, :length]).logits, expected(ids[:, :length]).logits
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


def llama3_divisors(settings: dict[str, Any]) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter writes: transformers' own frequencies, plain over scaled."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(**SHARED, rope_parameters=dict(settings))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, None)
    plain = 1 / settings["rope_theta"] ** (torch.arange(0, 64, 2) / 64)
    found: np.ndarray[Any, Any] = (plain / scaled).numpy().astype(np.float32)
    return found


KINDS = (
    *("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
)


def test_blocks_are_dequantized_to_the_bit(tmp_path: Path) -> None:
    model = make(CONFIGS["qwen3"])
    matrices = [name for name in gguf_writer.tensors(model) if name.startswith("blk.") and "norm" not in name]
    kinds = dict(zip(matrices, KINDS, strict=True))
    stored = gguf_writer.write(tmp_path / "m.gguf", model, kinds=kinds, vocabulary=byte_level())
    found = AutoModelForCausalLM.from_pretrained(converted(tmp_path / "m.gguf"))
    expected = gguf_writer.as_stored(model, stored)
    for key, value in expected.state_dict().items():
        assert torch.isfinite(value).all(), key
        assert torch.equal(found.state_dict()[key], value), key


def test_several_files_are_one_model(tmp_path: Path) -> None:
    model = make(CONFIGS["qwen3"])
    stored = gguf_writer.write(tmp_path / "m.gguf", model, kinds={"": "Q4_0"}, vocabulary=byte_level(), parts=3)
    found = AutoModelForCausalLM.from_pretrained(converted(tmp_path / "m-00002-of-00003.gguf"))
    expected = gguf_writer.as_stored(model, stored)
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(ExportError, match=r"is one of 3 files, and m-00003-of-00003\.gguf is not beside it"):
        converted(tmp_path / "m-00001-of-00003.gguf")


@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "qwen2"])
def test_byte_level_tokenizers(tmp_path: Path, rule: str) -> None:
    from tokenizers import pre_tokenizers

    true = tiny_models.byte_level_tokenizer()
    if rule == "smollm":
        true.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if rule == "qwen2":
        from transformers import Qwen2Tokenizer

        written = json.loads(true.backend_tokenizer.to_str())["model"]
        merges = [tuple(pair) for pair in written["merges"]]
        true = Qwen2Tokenizer(vocab=written["vocab"], merges=merges, eos_token=tiny_models.EOS)
    kind = "qwen2" if rule == "qwen2" else "llama"
    model = make(CONFIGS[kind])
    gguf_writer.write(tmp_path / "m.gguf", model, vocabulary=byte_level(rule=rule))
    found = AutoTokenizer.from_pretrained(converted(tmp_path / "m.gguf"))
    for text in (*TEXTS, f"a{tiny_models.EOS} b"):
        ids = true(text).input_ids
        assert found(text).input_ids == ids, text
        for skip in (True, False):
            assert found.decode(ids, skip_special_tokens=skip) == true.decode(ids, skip_special_tokens=skip)
    assert found.chat_template == byte_level()["chat_template"]
    assert found.eos_token_id == 0


def sentencepiece_model(prefix: bool) -> Any:
    import sentencepiece

    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpora.held_out()),
        model_writer=stream,
        model_type="bpe",
        vocab_size=SHARED["vocab_size"],
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        add_dummy_prefix=prefix,
        user_defined_symbols=["<|user|>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue())


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
def test_sentencepiece_tokenizers(tmp_path: Path, name: str) -> None:
    prefix = name != "gemma2"
    true = sentencepiece_model(prefix)
    count = true.get_piece_size()
    kinds = [
        2 if true.is_unknown(n) else 3 if true.is_control(n) else 6 if true.is_byte(n) else 4 if n == 3 else 1
        for n in range(count)
    ]
    vocabulary: dict[str, Any] = {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": [true.id_to_piece(n) for n in range(count)],
        "ggml.scores": [true.get_score(n) for n in range(count)],
        "ggml.token_type": kinds,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.eot_token_id": 3,
        "ggml.unknown_token_id": 0,
        "ggml.add_bos_token": True,
        "ggml.add_space_prefix": prefix,
    }
    assert vocabulary["ggml.tokens"][3] == "<|user|>"
    gguf_writer.write(tmp_path / "m.gguf", make(CONFIGS[name]), vocabulary=vocabulary)
    folder = converted(tmp_path / "m.gguf")
    found = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = true.encode(text)
        assert found(text).input_ids == [1, *ids], text
        assert found.decode(ids) == true.decode(ids), text
    assert found("a<|user|>b").input_ids.count(3) == 1
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 3]


def refusal(path: Path) -> str:
    with pytest.raises(ExportError) as refused:
        converted(path)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    model, path = make(CONFIGS["llama"]), tmp_path / "m.gguf"
    good = byte_level()
    gguf_writer.write(path, model, vocabulary=good, more={"attention.clamp_kqv": 8.0})
    assert "has the setting llama.attention.clamp_kqv, which is not read" in refusal(path)
    gguf_writer.write(path, model, vocabulary=good, extra={"blk.0.attn_q_norm.weight": np.ones(64, np.float32)})
    assert "has the tensor blk.0.attn_q_norm.weight, which transformers' LlamaForCausalLM does not have" in refusal(
        path
    )
    gguf_writer.write(path, model, vocabulary=good, without=("blk.1.ffn_up.weight",))
    assert "has no tensor for model.layers.1.mlp.up_proj.weight" in refusal(path)
    gguf_writer.write(path, model, vocabulary=good, more={"feed_forward_length": 128})
    assert "has the shape (256, 256), and its settings ask for (128, 256)" in refusal(path)
    gguf_writer.write(
        path, model, vocabulary=good, extra={"rope_freqs.weight": np.linspace(1, 9, 64, dtype=np.float32)}
    )
    assert "divides rotary frequencies by numbers that no scaling of Llama 3's gives" in refusal(path)
    gguf_writer.write(path, model, vocabulary=good | {"ggml.pre": "of-tomorrow"})
    assert "parts texts by the rule 'of-tomorrow'" in refusal(path)
    gguf_writer.write(path, model, vocabulary=good | {"ggml.model": "rwkv"})
    assert "has a 'rwkv' tokenizer" in refusal(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "the GGUF file can't be read" in refusal(path)
    path.write_bytes(b"no GGUF")
    assert "the GGUF file can't be read" in refusal(path)
    writer = gguf.GGUFWriter(path, "rwkv7")
    writer.add_uint32("rwkv7.block_count", 1)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "is of the architecture 'rwkv7', which transformers does not read from GGUF" in refusal(path)


def test_a_folder_of_files_names_them(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    gguf_writer.write(folder / "m.gguf", make(CONFIGS["llama"]), vocabulary=byte_level())
    (tmp_path / "models.toml").write_text(tiny_models.models_toml({"tiny": tiny_models.causal_entry(folder)}))
    (spec,) = models_file.load(tmp_path / "models.toml")
    with pytest.raises(ExportError, match=r"it has no config\.json: name one of its GGUF files, m\.gguf"):
        sources.fetch(spec, tmp_path, tmp_path, lambda message: None)
    (tmp_path / "models.toml").write_text(
        tiny_models.models_toml({"tiny": tiny_models.causal_entry(folder / "m.gguf")})
    )
    (spec,) = models_file.load(tmp_path / "models.toml")
    found = sources.fetch(spec, tmp_path, tmp_path, lambda message: None)
    assert found.config.model_type == "llama"
    assert sources.fetch(spec, tmp_path, tmp_path, lambda message: None).path == found.path  # made once


def test_add_reads_a_file(tmp_path: Path) -> None:
    gguf_writer.write(tmp_path / "My.Model_Q8.gguf", make(CONFIGS["llama"]), vocabulary=byte_level())
    arguments = ["add", str(tmp_path / "My.Model_Q8.gguf"), "--models-file", str(tmp_path / "models.toml")]
    assert cli.main(arguments) == 0
    (spec,) = models_file.load(tmp_path / "models.toml")
    assert (spec.name, spec.task) == ("my.model-q8", "text-generation")
    assert spec.source.path == str(tmp_path / "My.Model_Q8.gguf")
