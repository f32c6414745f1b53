"""Tokenizers with more tokens than the model's embedding has rows, in encoders and encoder-decoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoModel

from tests import tiny_models
from trident_export import models_file, tasks
from trident_export.errors import UnreadableSource
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_serving.schema.fields import LongInput
from trident_serving.seq2seq.source import SourceText

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:Recommended. pip install")]
TABLES: dict[str, dict[str, Any]] = {
    "bert": {"task": "feature-extraction", "limits": {"dimensions": 32, "max_tokens": 64}},
    "t5": {"task": "translation", "limits": {"max_source_tokens": 64, "max_target_tokens": 16}},
    "bart": {"task": "summarization", "limits": {"max_source_tokens": 64, "max_target_tokens": 32}},
}


def made(family: str, folder: Path) -> Path:
    if family == "bert":
        return tiny_models.make_reader(folder, "bert", AutoModel)
    return tiny_models.make_seq2seq(folder, family)


def build(family: str, folder: Path) -> Path:
    """The folder with the tokenizer that is served."""
    table = TABLES[family] | {"source": {"path": str(folder)}, "variants": ["fp32"]}
    staging = folder.parent / "staging"
    tasks.build(tasks.Job(models_file.parse("m", table), HuggingFaceFolder(folder), staging, lambda message: None))
    return staging / ("m_tokenizer" if family == "bert" else "m") / "1"


def change(folder: Path, **added: Any) -> int:
    """Add to tokenizer.json; returns the rows of the embedding."""
    state = json.loads((folder / "tokenizer.json").read_text())
    rows: int = json.loads((folder / "config.json").read_text())["vocab_size"]
    if token := added.get("token"):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        state["added_tokens"].append({"id": rows + 5, "content": token, "special": True, **flags})
    if word := added.get("word"):
        words = state["model"]["vocab"]
        if isinstance(words, dict):
            words[word] = rows + 4
        else:
            words += [[f"{word}{index}", -1.0] for index in range(rows + 5 - len(words))]
    (folder / "tokenizer.json").write_text(json.dumps(state))
    return rows


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_an_added_token_beyond_the_embedding_is_read_letter_by_letter(tmp_path: Path, family: str) -> None:
    folder = made(family, tmp_path / "model")
    text = "Hello <x> there"
    expected = HuggingFaceFolder(folder).tokenizer(text).input_ids
    rows = change(folder, token="<x>")
    assert max(HuggingFaceFolder(folder).tokenizer(text).input_ids) >= rows
    served = build(family, folder)
    if family == "t5":
        found = list(SourceText.load(served, 64).windows(text, LongInput.ERROR)[0].ids)
    else:
        found = Tokenizer.from_file(str(served / "tokenizer.json")).encode(text).ids
    assert found == expected
    assert max(found) < rows


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_vocabulary_beyond_the_embedding_is_another_models(tmp_path: Path, family: str) -> None:
    folder = made(family, tmp_path / "model")
    rows = change(folder, word="zz")
    with pytest.raises(UnreadableSource, match=f"gives the token {rows + 4} .'zz.*, the model has {rows}: it is anoth"):
        build(family, folder)


def test_a_mask_that_no_source_has_needs_no_row(tmp_path: Path) -> None:
    """BART's summarizers were cut by the row of their mask, which lies in the vocabulary too."""
    folder = made("bart", tmp_path / "model")
    words = HuggingFaceFolder(folder).tokenizer
    state = json.loads((folder / "tokenizer.json").read_text())
    rows: int = json.loads((folder / "config.json").read_text())["vocab_size"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != words.mask_token]
    state["added_tokens"].append({"id": rows, "content": "<mask>", "special": True, **flags})
    state["model"]["vocab"].pop("<mask>", None)
    state["model"]["vocab"]["<mask>"] = rows
    (folder / "tokenizer.json").write_text(json.dumps(state))
    assert HuggingFaceFolder(folder).tokenizer.mask_token_id == rows
    ids = SourceText.load(build("bart", folder), 64).windows("a <mask> b", LongInput.ERROR)[0].ids
    assert max(ids) < rows
