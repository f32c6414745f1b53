"""Tokenizers of GGUF files, as llama.cpp and the original model have them.

transformers builds a Llama tokenizer from any GGUF file of the Llama architecture. For byte-level BPE models
(`tokenizer.ggml.model = gpt2`) two parts of it are wrong: it prepends the beginning token although the file
says `add_bos_token = false`, and its decoder turns a literal U+2581 into a space. The special tokens' roles
come out wrong too. Here they are set from what the file says.
Keys: the GGUF specification, section "Tokenizer" (ggml-org/ggml, docs/gguf.md).
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, processors

from trident_export.errors import UnsupportedTokenizer


def read_fields(path: Path) -> dict[str, Any]:
    """The `tokenizer.*` entries of a GGUF file but for the long lists."""
    from gguf import GGUFReader

    reader = GGUFReader(str(path))
    long = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type")
    return {
        key: entry.contents()
        for key, entry in reader.fields.items()
        if key.startswith("tokenizer.") and key not in long
    }


def parameters(path: Path) -> int:
    """How many numbers the tensors of a GGUF file have."""
    from gguf import GGUFReader

    return sum(int(tensor.n_elements) for tensor in GGUFReader(str(path)).tensors)


def save(path: Path, folder: Path) -> None:
    """Write the tokenizer of a GGUF file to `folder` as Hugging Face files.

    Raises:
        UnsupportedTokenizer: it is no byte-level BPE.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    fields = read_fields(path)
    kind = fields.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UnsupportedTokenizer(
            f"{path.name} has a {kind!r} tokenizer; byte-level BPE ('gpt2') is handled: convert the original "
            "Hugging Face folder instead"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer: Tokenizer = loaded.backend_tokenizer
    special = _special_tokens(tokenizer, fields)
    repair(tokenizer, special.get("bos_token") if fields.get("tokenizer.ggml.add_bos_token", False) else None)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )
    fast.chat_template = fields.get("tokenizer.chat_template")
    fast.save_pretrained(str(folder))
    _write_generation_config(folder, fields)


def repair(tokenizer: Tokenizer, bos_token: str | None) -> None:
    """Byte-level decoding, and a beginning token only where the file asks for one."""
    tokenizer.decoder = decoders.ByteLevel()
    if bos_token is None:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        return
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos_token} $A",
        pair=f"{bos_token} $A {bos_token} $B:1",
        special_tokens=[(bos_token, tokenizer.token_to_id(bos_token))],
    )


def _special_tokens(tokenizer: Tokenizer, fields: dict[str, Any]) -> dict[str, str]:
    roles = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    tokens = {}
    for name, role in roles.items():
        token_id = fields.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None:
            tokens[role] = str(tokenizer.id_to_token(int(token_id)))
    return tokens


def _write_generation_config(folder: Path, fields: dict[str, Any]) -> None:
    ids = {
        f"{name}_token_id": fields.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    config = {name: int(value) for name, value in ids.items() if value is not None}
    (folder / "generation_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
