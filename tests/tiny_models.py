"""Hugging Face folders of real architectures with random weights, small enough for a test."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from trident_export import fidelity

VOCABULARY = 512
EOS = "<|end|>"


def causal_config(architecture: str, context: int = 128) -> PretrainedConfig:
    shared = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if architecture == "llama":
        return LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=context,
            **shared,
        )
    if architecture == "gpt2":
        return GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=context, **shared)
    if architecture == "opt":
        return OPTConfig(
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=context,
            word_embed_proj_dim=32,
            **shared,
        )
    raise ValueError(architecture)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(fidelity.texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_causal(folder: Path, architecture: str, seed: int = 0, context: int = 128) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(causal_config(architecture, context)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)  # the default initialization is so flat that every token is as likely
    model.save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


def make_encoder(folder: Path, source_tokenizer: Path, seed: int = 0) -> Path:
    from transformers import AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(source_tokenizer)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    AutoModel.from_config(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def models_toml(entries: dict[str, str]) -> str:
    return "\n".join(f"[{name}]\n{body}\n" for name, body in entries.items())


def causal_entry(path: Path, **limits: int) -> str:
    chosen = {"context": 128, "slots": 4, "prefill_chunk": 16, "default_max_tokens": 16, "threads": 1} | limits
    shown = ", ".join(f"{name} = {value}" for name, value in chosen.items())
    return f'task = "text-generation"\nsource = {{ path = "{path}" }}\nvariants = ["fp32"]\nlimits = {{ {shown} }}\n'
