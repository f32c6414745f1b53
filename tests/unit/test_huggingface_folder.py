"""A Hugging Face folder is read once, and what is handed out can't spoil it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from tests import tiny_models
from trident_export.errors import UnreadableSource, UnsupportedArchitecture, UnsupportedModel
from trident_export.huggingface.folder import HuggingFaceFolder, check_files
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
    with pytest.raises(UnreadableSource, match="there is no file with a vocabulary"):
        _ = HuggingFaceFolder(source.path).tokenizer


def test_a_call_changes_only_its_own_tokenizer(source: HuggingFaceFolder) -> None:
    text = "the cat sat on the mat " * 9
    whole = source.tokenizer(text).input_ids
    cut = source.tokenizer
    assert len(cut(text, truncation=True, max_length=8).input_ids) == 8
    assert source.tokenizer.backend_tokenizer.truncation is None
    assert source.tokenizer(text).input_ids == whole


def test_a_generation_config_is_handed_out_as_a_copy(source: HuggingFaceFolder) -> None:
    before = source.generation_config.num_beams
    source.generation_config.update(num_beams=7)
    assert source.generation_config.num_beams == before != 7


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("temperature", "hot", "says temperature 'hot', which is no number"),
        ("top_k", "many", "says top_k 'many', which is no whole number"),
        ("num_beams", "x", "says num_beams 'x', which is no whole number"),
        ("max_length", 10**12, "says max_length 1000000000000, which is no whole number"),
        ("bad_words_ids", "x", "says bad_words_ids 'x', which is no list of lists of tokens"),
        ("suppress_tokens", ["a"], "which is no list of tokens"),
        ("eos_token_id", ["a"], "which is no token or list of tokens"),
        ("decoder_start_token_id", 99999, "names the token 99999 in decoder_start_token_id, the model has 512"),
        ("bad_words_ids", [[5], [99999]], "names the token 99999 in bad_words_ids, the model has 512"),
    ],
)
def test_generation_settings_of_another_kind_are_refused(
    source: HuggingFaceFolder, key: str, value: object, said: str
) -> None:
    (source.path / "generation_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(UnreadableSource) as refused:
        _ = source.generation_config
    assert said in str(refused.value)


def test_a_vocabulary_that_lacks_a_merged_token(tmp_path: Path) -> None:
    folder = tiny_models.make_causal(tmp_path / "llama", "llama")
    state = json.loads((folder / "tokenizer.json").read_text())
    state["model"]["vocab"]["".join(state["model"]["merges"][-1])] = state["model"]["vocab"]["a"]
    (folder / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UnreadableSource, match=r"tokenizer.json can't be used, it gives the id \d+ to 'a' and to "):
        _ = HuggingFaceFolder(folder).tokenizer


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_attention_that_a_config_names_is_not_taken(source: HuggingFaceFolder, key: str) -> None:
    ids = torch.arange(4, 30)[None]
    with torch.no_grad():
        expected = source.load(AutoModel)(ids).last_hidden_state
    config = json.loads((source.path / "config.json").read_text())
    (source.path / "config.json").write_text(json.dumps(config | {key: "flash_attention_2"}))
    model = HuggingFaceFolder(source.path).load(AutoModel)
    assert model.config._attn_implementation == "eager"
    with torch.no_grad():
        assert torch.equal(model(ids).last_hidden_state, expected)


@pytest.mark.parametrize("default", ["nope", "query"])
def test_a_default_prompt_that_names_nothing_is_refused(source: HuggingFaceFolder, default: str) -> None:
    settings = source.path / "config_sentence_transformers.json"
    settings.write_text(json.dumps({"prompts": {"topic": "about: "}, "default_prompt_name": default}))
    assert source.roles({default: "x: "}).default_prompt == default  # a table of models.toml can have it
    if default == "query":  # sentence-transformers has this one, empty, without a file
        assert source.roles().default_prompt is None
        return
    for prompts in (None, {"topic": "x: "}):
        with pytest.raises(
            UnreadableSource, match=r"default_prompt_name 'nope', which is none of its prompts \(topic\)"
        ):
            source.roles(prompts)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"id2label": {"0": "a", "5": "b"}}, "has id2label 'None' for class 1 of 2, which must be a text"),
        ({"id2label": {"0": 1, "1": None}}, "has id2label '1' for class 0 of 2"),
        ({"id2label": {"0": "\ud800", "1": "b"}}, "for class 0 of 2, which must be a text"),
        ({"model_type": "roberta", "pad_token_id": None}, "pad_token_id None, behind which a model of type 'roberta'"),
        ({"model_type": "roberta", "pad_token_id": 99999}, "pad_token_id 99999, behind which"),
        ({"text_config": [1]}, r"has text_config '\[1\]', which must be an object"),
    ],
)
def test_a_config_with_values_of_another_kind(source: HuggingFaceFolder, values: dict[str, Any], message: str) -> None:
    changed(source.path, **values)
    with pytest.raises(UnreadableSource, match=message):
        _ = source.labels, source.longest_input


def test_a_tokenizer_with_values_of_another_kind(source: HuggingFaceFolder) -> None:
    file = source.path / "tokenizer_config.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps(written | {"model_max_length": "long"}))
    with pytest.raises(UnreadableSource, match="tokenizer_config.json has model_max_length 'long', which must be"):
        _ = source.tokenizer


def test_a_folder_has_regular_files_of_its_own_alone(source: HuggingFaceFolder) -> None:
    check_files(source.path)
    index = source.path / "model.safetensors.index.json"
    for path in ("../outside.safetensors", "/outside.safetensors", 5):
        index.write_text(json.dumps({"weight_map": {"a": path}}))
        with pytest.raises(UnreadableSource, match="index.json names '.*', which is no path inside of the folder"):
            check_files(source.path)
    index.unlink()
    os.mkfifo(source.path / "model-00002.safetensors")
    with pytest.raises(UnreadableSource, match="model-00002.safetensors is no regular file"):
        check_files(source.path)


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


def changed(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def lost_shard(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    (folder / "model-00002-of-00007.safetensors").unlink()


def not_a_number(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def biases(folder: Path) -> None:
    """Weights of Qwen2, whose projections have biases, with Llama's config."""
    weights = load_file(folder / "model.safetensors")
    weights |= {f"model.layers.{layer}.self_attn.q_proj.bias": torch.ones(64) for layer in range(2)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


UNFIT: dict[str, tuple[Callable[[Path], None], str]] = {
    "shard": (lost_shard, "the weights can't be read .*model-00002-of-00007"),
    "layer too many": (
        lambda folder: changed(folder, num_hidden_layers=3),
        "the weights have no model.layers.2.* and 8 more, which config.json asks for",
    ),
    "layer too few": (
        lambda folder: changed(folder, num_hidden_layers=1),
        "the weights have model.layers.1.*, which config.json leaves out",
    ),
    "width": (
        lambda folder: changed(folder, hidden_size=128, head_dim=16),
        r"lm_head.weight is \[512, 64\] in the weights and \[512, 128\] by config.json",
    ),
    "vocabulary": (
        lambda folder: changed(folder, vocab_size=600),
        r"is \[512, 64\] in the weights and \[600, 64\] by config.json: one of the two is another model's",
    ),
    "family": (
        lambda folder: changed(folder, model_type="qwen2", architectures=["Qwen2ForCausalLM"]),
        "the weights have no model.layers.0.self_attn.k_proj.bias and 5 more",
    ),
    "biases": (biases, "the weights have model.layers.0.self_attn.q_proj.bias, which config.json leaves out"),
    "not a number": (not_a_number, "model.layers.1.mlp.up_proj.weight holds numbers that are not finite"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_weights_that_do_not_fit_their_config(tmp_path: Path, name: str) -> None:
    """Transformers fills what is missing with random numbers, and leaves out what it has no place for."""
    folder = tiny_models.make_causal(tmp_path / "llama", "llama")
    damage, reason = UNFIT[name]
    damage(folder)
    with pytest.raises(UnreadableSource, match=reason):
        HuggingFaceFolder(folder).load(AutoModelForCausalLM)


def test_a_base_model_may_come_without_its_pooler(source: HuggingFaceFolder) -> None:
    weights = load_file(source.path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("bert.pooler")}
    assert len(kept) == len(weights) - 2
    save_file(kept, source.path / "model.safetensors", {"format": "pt"})
    model = source.load(AutoModel)
    assert torch.equal(model.embeddings.word_embeddings.weight, weights["bert.embeddings.word_embeddings.weight"])
    with pytest.raises(UnreadableSource, match="the weights have no bert.pooler.dense.bias and 1 more"):
        source.load(AutoModelForSequenceClassification)


def test_a_folder_of_a_later_version_names_it(tmp_path: Path) -> None:
    folder = tiny_models.make_causal(tmp_path / "llama", "llama")
    changed(folder, model_type="llama9", transformers_version="5.99.1")
    with pytest.raises(
        UnsupportedArchitecture, match="'llama9'.*: transformers 5.99.1, which wrote it, or a newer one"
    ):
        _ = HuggingFaceFolder(folder).config
    changed(folder, model_type="llama", rope_parameters={"rope_type": "spiral", "rope_theta": 1.0})
    with pytest.raises(
        UnreadableSource, match=r"the folder was written by transformers 5.99.1, 5\.\d+\.\d+ is installed"
    ):
        HuggingFaceFolder(folder).load(AutoModelForCausalLM)
    changed(folder, transformers_version="6.0.0")
    with pytest.raises(UnreadableSource, match="was written by transformers 6.0.0, and 5.* may read it otherwise"):
        _ = HuggingFaceFolder(folder).config


CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("kind", ["own", "llama"])
def test_code_in_a_folder_runs_only_where_its_table_says_so(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nothing is asked"))
    marker = tmp_path / "ran"
    folder = tiny_models.make_causal(tmp_path / "llama", "llama")
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    changed(folder, model_type=kind, auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})
    if kind == "llama":  # transformers has the class itself
        assert type(HuggingFaceFolder(folder).load(AutoModelForCausalLM)).__module__.startswith("transformers.models.")
    else:
        with pytest.raises(UnsupportedArchitecture, match="run only with trust_remote_code = true in its table"):
            HuggingFaceFolder(folder).load(AutoModelForCausalLM)
    _ = HuggingFaceFolder(folder).generation_config
    assert not marker.exists()
    if kind == "own":
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        model = HuggingFaceFolder(folder, trust_remote_code=True).load(AutoModelForCausalLM)
        assert type(model).__name__ == "OwnModel"
        assert marker.exists()
