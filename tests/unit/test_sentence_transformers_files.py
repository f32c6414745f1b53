"""What sentence-transformers' files say, of both generations, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from trident_export.errors import UnreadableSource, UnsupportedModel
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.huggingface.sentence_transformers import Dense, LayerNorm, Normalize, Truncate, applied
from trident_serving.encoders.labels import Activation
from trident_serving.encoders.pooling import Pooling, PoolingSettings

BASE, MODULES = "sentence_transformers.base.modules", "sentence_transformers.sentence_transformer.modules"


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))


def modules(folder: Path, *kinds: tuple[str, str]) -> None:
    write(folder, "modules.json", [{"type": kind, "path": path} for path, kind in kinds])


def test_one_model_in_both_generations(tmp_path: Path) -> None:
    older, newer = tmp_path / "older", tmp_path / "newer"
    modules(
        older,
        ("", "sentence_transformers.models.Transformer"),
        ("1_Pooling", "sentence_transformers.models.Pooling"),
        ("2_Normalize", "sentence_transformers.models.Normalize"),
    )
    modes = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}
    write(older, "1_Pooling/config.json", {"word_embedding_dimension": 8, **modes})
    write(older, "sentence_bert_config.json", {"max_seq_length": 64, "do_lower_case": False})
    modules(
        newer,
        ("", f"{BASE}.transformer.Transformer"),
        ("1_Pooling", f"{MODULES}.pooling.Pooling"),
        ("2_Normalize", f"{BASE}.normalize.Normalize"),
    )
    write(newer, "1_Pooling/config.json", {"embedding_dimension": 8, "pooling_mode": ["max", "mean"]})
    write(newer, "sentence_bert_config.json", {"transformer_task": "feature-extraction"})
    write(newer, "tokenizer_config.json", {"model_max_length": 64})
    for path in (older, newer):
        found = HuggingFaceFolder(path).sentence
        assert found.settings == PoolingSettings(Pooling.MAX, normalize=True, more=(Pooling.MEAN,))
        assert (found.layers, found.longest_input, found.task) == ((), 64, "feature-extraction")
        assert found.dimensions(8) == 16


def test_layers_are_torchs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense, norm = torch.nn.Linear(4, 3), torch.nn.LayerNorm(3)
    with torch.no_grad():
        norm.weight.add_(0.5)
    modules(
        tmp_path,
        ("", f"{BASE}.transformer.Transformer"),
        ("1_Pooling", f"{MODULES}.pooling.Pooling"),
        ("2_Dense", f"{BASE}.dense.Dense"),
        ("3_LayerNorm", f"{MODULES}.layer_norm.LayerNorm"),
        ("4_Normalize", f"{BASE}.normalize.Normalize"),
    )
    write(tmp_path, "1_Pooling/config.json", {"pooling_mode": "mean"})
    write(tmp_path, "2_Dense/config.json", {"activation_function": "torch.nn.modules.activation.Tanh"})
    save_file(
        {f"linear.{name}": value for name, value in dense.state_dict().items()},
        tmp_path / "2_Dense" / "model.safetensors",
    )
    (tmp_path / "3_LayerNorm").mkdir()
    torch.save(
        {f"norm.{name}": value for name, value in norm.state_dict().items()},
        tmp_path / "3_LayerNorm" / "pytorch_model.bin",
    )
    write(tmp_path, "config_sentence_transformers.json", {"truncate_dim": 2})
    found = HuggingFaceFolder(tmp_path).sentence
    assert [type(layer) for layer in found.layers] == [Dense, LayerNorm, Normalize, Truncate]
    assert found.settings == PoolingSettings(Pooling.MEAN, normalize=False, normalized=True)
    assert found.dimensions(4) == 2
    vectors = torch.randn(2, 4)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(norm(dense(vectors).tanh()), dim=1)[:, :2]
    np.testing.assert_allclose(applied(found.layers, vectors.numpy()), expected.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("Dense", {"activation_function": "my.Swish"}, "has the activation 'my.Swish'; supported are Identity, Tanh"),
        (
            "Dense",
            {"module_input_name": "token_embeddings"},
            "works on 'token_embeddings': supported are",
        ),
        ("WordWeights", {}, "the modules WordWeights, which are not supported"),
    ],
)
def test_what_is_not_supported_is_said(tmp_path: Path, kind: str, settings: dict[str, str], message: str) -> None:
    modules(tmp_path, ("", "a.Transformer"), ("1_Pooling", "a.Pooling"), ("2", f"a.{kind}"))
    write(tmp_path, "1_Pooling/config.json", {"pooling_mode": "mean"})
    write(tmp_path, "2/config.json", settings)
    torch.save({"linear.weight": torch.ones(2, 2)}, tmp_path / "2" / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match=message):
        _ = HuggingFaceFolder(tmp_path).sentence.layers


@pytest.mark.parametrize("settings", [{"pooling_mode": "attention"}, {"pooling_mode_attention": True}])
def test_an_unknown_pooling_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    modules(tmp_path, ("", "a.Transformer"), ("1_Pooling", "a.Pooling"))
    write(tmp_path, "1_Pooling/config.json", settings)
    with pytest.raises(UnsupportedModel, match=r"pools by .*attention.*; supported are mean, cls, lasttoken"):
        _ = HuggingFaceFolder(tmp_path).pooling


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "modules.json",
            [{"type": "a.Transformer", "path": "../b"}],
            "modules.json names '../b', which is no path inside",
        ),
        ("modules.json", [{"type": "a.Transformer", "path": "/b"}], "names '/b', which is no path inside"),
        ("1_Pooling/config.json", [1], r"1_Pooling/config.json must be an object, found '\[1\]'"),
        ("1_Pooling/config.json", {"pooling_mode": 5}, "config.json has pooling_mode '5', which must be a mode"),
        ("1_Pooling/config.json", {"pooling_mode": []}, r"has pooling_mode '\[\]', which must be a mode"),
        ("config_sentence_transformers.json", {"prompts": ["a"]}, "has prompts .*, which must be a table of texts"),
        (
            "config_sentence_transformers.json",
            {"prompts": {"query": 5}},
            "has prompts .*5.*, which must be texts by name",
        ),
        ("config_sentence_transformers.json", {"prompts": {"query": "\ud800"}}, "has prompts .*, which must be texts"),
        ("config_sentence_transformers.json", {"truncate_dim": "x"}, "has truncate_dim 'x', which must be a positive"),
        ("config_sentence_transformers.json", {"default_prompt_name": 5}, "has default_prompt_name '5', which must be"),
        ("sentence_bert_config.json", {"max_seq_length": "abc"}, "has max_seq_length 'abc', which must be a positive"),
        ("sentence_bert_config.json", {"max_seq_length": float("inf")}, "has max_seq_length 'inf', which must be a"),
        ("2_Dense/config.json", {"activation_function": 5}, "has the activation '5'; supported are"),
    ],
)
def test_values_of_another_kind_are_a_sentence(tmp_path: Path, file: str, content: Any, message: str) -> None:
    modules(tmp_path, ("", "a.Transformer"), ("1_Pooling", "a.Pooling"), ("2_Dense", "a.Dense"))
    write(tmp_path, "1_Pooling/config.json", {"pooling_mode": "mean"})
    (tmp_path / "2_Dense").mkdir()
    torch.save({"linear.weight": torch.ones(2, 2)}, tmp_path / "2_Dense" / "pytorch_model.bin")
    write(tmp_path, file, content)
    sentence = HuggingFaceFolder(tmp_path).sentence
    with pytest.raises((UnreadableSource, UnsupportedModel), match=message):
        _ = sentence.prompts, sentence.default_prompt, sentence.longest_input, sentence.settings


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"linear.weight": torch.ones(16, 48)}, "a Dense of modules.json reads 48 numbers and is given 32"),
        ({"linear.weight": torch.ones(16)}, r"need a linear.weight of 2 axes and have it as \[16\]"),
        ({"weight": torch.ones(16, 32)}, "need a linear.weight of 2 axes and are without it"),
        (
            {"linear.weight": torch.ones(16, 32), "linear.bias": torch.ones(3)},
            r"linear.weight of 2_Dense is \[16, 32\], and what is added to its output has another size",
        ),
    ],
)
def test_a_layer_of_another_size_is_refused(tmp_path: Path, weights: dict[str, torch.Tensor], message: str) -> None:
    modules(tmp_path, ("", "a.Transformer"), ("1_Pooling", "a.Pooling"), ("2_Dense", "a.Dense"))
    write(tmp_path, "1_Pooling/config.json", {"pooling_mode": "mean"})
    (tmp_path / "2_Dense").mkdir()
    torch.save(weights, tmp_path / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(UnreadableSource, match=message):
        HuggingFaceFolder(tmp_path).sentence.dimensions(32)


def test_a_missing_layer_is_a_sentence(tmp_path: Path) -> None:
    modules(tmp_path, ("", "a.Transformer"), ("1_Pooling", "a.Pooling"), ("2_Dense", "a.Dense"))
    write(tmp_path, "1_Pooling/config.json", {"pooling_mode": "mean"})
    with pytest.raises(UnreadableSource, match="the weights of 2_Dense can't be read"):
        _ = HuggingFaceFolder(tmp_path).pooling


@pytest.mark.parametrize(
    ("files", "config", "expected"),
    [
        ({"activation_fn": "torch.nn.modules.linear.Identity"}, {}, Activation.NONE),
        ({"activation_fn": "torch.nn.modules.activation.Sigmoid"}, {}, Activation.SIGMOID),
        ({}, {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, Activation.NONE),
        ({}, {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, Activation.NONE),
        ({}, {}, Activation.SIGMOID),
    ],
)
def test_activations_of_cross_encoders(
    tmp_path: Path, files: dict[str, str], config: dict[str, Any], expected: Activation
) -> None:
    write(tmp_path, "config_sentence_transformers.json", files)
    assert HuggingFaceFolder(tmp_path).sentence.score_activation(SimpleNamespace(**config), one=True) == expected


def test_other_activations_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "config_sentence_transformers.json", {"activation_fn": "torch.nn.modules.activation.Tanh"})
    with pytest.raises(UnsupportedModel, match=r"activation 'torch.nn.*Tanh' is not one of Identity, Sigmoid of torch"):
        HuggingFaceFolder(tmp_path).sentence.score_activation(SimpleNamespace(), one=True)
