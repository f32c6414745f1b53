"""A Hugging Face folder is read once, and what is handed out can't spoil it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from tests import tiny_models
from trident_export.errors import UnreadableSource, UnsupportedModel
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_serving.encoders.pooling import Pooling, PoolingSettings


@pytest.fixture
def source(tmp_path: Path) -> HuggingFaceFolder:
    names = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    made = tiny_models.make_reader(tmp_path / "model", "bert", AutoModelForSequenceClassification, **names)
    return HuggingFaceFolder(made)


def test_files_are_read_once(source: HuggingFaceFolder) -> None:
    before = source.config, source.tokenizer.vocab_size, source.labels, source.longest_input, source.roles()
    for file in source.path.iterdir():
        file.unlink()
    assert (source.config, source.tokenizer.vocab_size, source.labels, source.longest_input, source.roles()) == before
    assert source.labels == ("bad", "good")
    assert source.longest_input == 130
    with pytest.raises(UnreadableSource, match="the tokenizer can't be read"):
        _ = HuggingFaceFolder(source.path).tokenizer


def test_a_call_changes_only_its_own_tokenizer(source: HuggingFaceFolder) -> None:
    text = "the cat sat on the mat " * 9
    whole = source.tokenizer(text).input_ids
    cut = source.tokenizer
    assert len(cut(text, truncation=True, max_length=8).input_ids) == 8
    assert source.tokenizer.backend_tokenizer.truncation is None
    assert source.tokenizer(text).input_ids == whole


def test_a_generation_config_is_handed_out_as_a_copy(source: HuggingFaceFolder) -> None:
    source.generation_config.update(num_beams=7)
    assert source.generation_config.num_beams == 1


def test_pooling_is_that_of_sentence_transformers_files(tmp_path: Path) -> None:
    assert HuggingFaceFolder(tmp_path).pooling == PoolingSettings(Pooling.MEAN, normalize=True)
    modules = [{"type": "models.Transformer", "path": ""}, {"type": "models.Pooling", "path": "1_Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert HuggingFaceFolder(tmp_path).pooling == PoolingSettings(Pooling.CLS, normalize=False)
    (tmp_path / "modules.json").write_text(json.dumps([*modules, {"type": "models.LSTM", "path": "2_LSTM"}]))
    with pytest.raises(UnsupportedModel, match="the model has the modules LSTM, which are not supported"):
        _ = HuggingFaceFolder(tmp_path).pooling
