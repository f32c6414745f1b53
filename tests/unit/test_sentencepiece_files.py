"""Folders with a SentencePiece file and no tokenizer.json: SentencePiece's own tokens, or a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from trident_export import corpora
from trident_export.errors import UnsupportedTokenizer
from trident_export.huggingface.folder import HuggingFaceFolder

SHARED: dict[str, Any] = {"vocab_size": 500, "character_coverage": 0.98, "minloglevel": 2}
# As the published files of these models were trained, in the settings that change how a text is read.
LLAMA = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "vocab_size": 700,
}
T5 = {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
XLM_R = {"model_type": "unigram"}
FOLDERS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", "tokenizer.model", LLAMA, {"tokenizer_class": "LlamaTokenizer"}),
    "t5": ("t5", "spiece.model", T5, {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}),
    "xlm-roberta": ("xlm-roberta", "sentencepiece.bpe.model", XLM_R, {"tokenizer_class": "XLMRobertaTokenizer"}),
}


def make(folder: Path, name: str, **settings: Any) -> HuggingFaceFolder:
    kind, file, trained, config = FOLDERS[name]
    folder.mkdir()
    text = folder / "text"
    text.write_text("\n".join(line for one in corpora.held_out() for line in one.splitlines()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "trained"), **(SHARED | trained | settings)
    )
    (folder / "trained.model").rename(folder / file)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return HuggingFaceFolder(folder)


@pytest.mark.parametrize("name", FOLDERS)
def test_tokens_are_those_of_sentencepiece(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "m", name)
    tokenizer, pieces = folder.fast_tokenizer, sentencepiece.SentencePieceProcessor()
    pieces.load(str(folder.path / FOLDERS[name][1]))
    for text in corpora.held_out()[:4]:
        expected = ["<unk>" if pieces.is_unknown(index) else pieces.id_to_piece(index) for index in pieces.encode(text)]
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == expected


@pytest.mark.parametrize(
    "other",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
    ],
)
def test_a_file_of_another_kind_than_its_tokenizer(tmp_path: Path, other: dict[str, Any]) -> None:
    """transformers takes every file of Llama's for BPE without a normalizer."""
    folder = make(tmp_path / "m", "llama", **other)
    with pytest.raises(UnsupportedTokenizer, match="no tokenizer.json, and the LlamaTokenizer .* gives other"):
        _ = folder.fast_tokenizer
