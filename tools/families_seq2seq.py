"""Which types of encoder-decoders are served: python tools/families_seq2seq.py [type ...]

For every type that transformers turns text into text with, a tiny model with random weights is exported and run by the
engine that serves, several texts at once, greedy and by beams. Every token must be that of `generate`, with Hugging
Face's eager attention, one text at a time.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from trident_export.errors import ExportError
from trident_export.graphs.seq2seq import export_decoder, export_encoder
from trident_export.measure import seq2seq_texts
from trident_serving.seq2seq.rules import Rules
from trident_serving.seq2seq.search import SearchParams

VOCABULARY, CONTEXT, TOKENS = 256, 128, 16
LENGTHS = (23, 5, 64)
PADDING, END = 1, 2
BEAMS = (1, 3)

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "hidden_size": 32,
    "d_kv": 16,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_encoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_encoder_attention_heads": 2,
    "num_decoder_attention_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": CONTEXT,
    "max_encoder_position_embeddings": CONTEXT,
    "max_decoder_position_embeddings": CONTEXT,
    "num_experts": 4,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
    "encoder_sparse_step": 1,
    "decoder_sparse_step": 1,
    "expert_capacity": 12,  # fewer tokens than choose an expert
    "src_vocab_size": VOCABULARY,
    "tgt_vocab_size": VOCABULARY,
    "block_size": 16,
    "sliding_window": 8,
    "attention_window": 8,
    "local_radius": 7,
    "pad_token_id": PADDING,
    "bos_token_id": 0,
    "eos_token_id": END,
    "decoder_start_token_id": END,  # some count positions from behind a padding token
    "forced_eos_token_id": None,
}


def types() -> list[str]:
    """Types that transformers turns text into text with; others of the mapping read speech or images beside text."""
    found = []
    for name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        kind = CONFIG_MAPPING[name]
        model: Any = AutoModelForSeq2SeqLM._model_mapping[kind]
        parts = {part.removesuffix("_config") for part in getattr(kind, "sub_configs", {})}
        if getattr(model, "main_input_name", "") == "input_ids" and not parts & {"vision", "audio", "speech", "text"}:
            found.append(name)
    return found


def tiny(name: str) -> PretrainedConfig:
    """A config of a type with small sizes, for each part of it that has a config of its own."""
    kind = CONFIG_MAPPING[name]
    default = kind()
    parts = {key: _sizes(getattr(default, key)) for key in ("encoder", "decoder") if hasattr(default, key)}
    values = _sizes(default)
    if name == "t5gemma":
        for part in parts.values():
            part["layer_types"] = ["sliding_attention", "full_attention"]
    if name == "fsmt":
        values["langs"] = ["en", "de"]
    config: PretrainedConfig = kind(**values, **parts)
    return config


def _sizes(default: Any) -> dict[str, Any]:
    known = default.to_dict()
    aliases = set(getattr(default, "attribute_map", {}))
    ids = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_eos_token_id")
    return {key: value for key, value in SIZES.items() if (key in known and key not in aliases) or key in ids}


def check(name: str) -> str:
    """Empty where a type is served and its tokens are Hugging Face's; else the sentence that says why not."""
    try:
        torch.manual_seed(0)
        model: Any = AutoModelForSeq2SeqLM.from_config(tiny(name), attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(1.5 if "t5" in name or "switch" in name else 6)
    except Exception as error:  # whatever a class of transformers makes of sizes that its authors never had
        return f"no tiny model can be built: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            export_encoder(model, Path(folder) / "encoder.onnx", CONTEXT)
            export_decoder(model, Path(folder) / "decoder.onnx", TOKENS)
        except ExportError as error:
            return str(error)
        return compare(model, Path(folder))


def compare(model: Any, folder: Path) -> str:
    """What differs of the answers of the graphs in a folder from `generate`; "" where nothing does."""
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, VOCABULARY, (1, length), generator=generator) for length in LENGTHS]
    for beams in BEAMS:
        rules = Rules(max_length=1 + TOKENS, eos_token_ids=(END,))
        params = SearchParams(rules, num_beams=beams)
        sources = [text[0].tolist() for text in texts]
        answers = seq2seq_texts.answers(folder, sources, (END,), params, capacity=TOKENS, threads=1)
        for text, answer in zip(texts, answers, strict=True):
            with torch.inference_mode():
                expected = model.generate(text, max_new_tokens=TOKENS, do_sample=False, num_beams=beams)
            if list(answer.tokens) != expected[0, 1:].tolist():
                return f"another answer with {beams} beams than Hugging Face's"
    return ""


def main() -> None:
    """Print a line for each type."""
    warnings.simplefilter("ignore")
    served = 0
    names = sys.argv[1:] or types()
    for name in names:
        try:
            said = check(name)
        except Exception as error:
            said = f"DEFECT {type(error).__name__}: {str(error).splitlines()[0][:160]}"
        served += not said
        print(f"{name:24} {said or 'served'}", flush=True)
    print(f"{served} of {len(names)} are served")


if __name__ == "__main__":
    main()
