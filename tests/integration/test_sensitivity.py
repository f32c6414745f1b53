"""`trident-export sensitivity`: which layers a recipe hurts, and a recipe that spares them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny_models
from tests.conftest import ROOT, run_export, run_export_cold
from trident_export import models_file, recipes
from trident_export.measure.sensitivity import Grouping, group, probing
from trident_serving.artefacts import read_manifest

COARSE = '[coarse]\nprecision = "int8"\ndecoder = [{ pass = "groups", bits = 4, group = 32 }]\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose second layer says much more than its first."""
    tiny_models.make_causal(tmp_path / "llama", "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    with torch.no_grad():
        for layer, factor in zip(model.model.layers, (0.01, 1.0), strict=True):
            layer.mlp.down_proj.weight.mul_(factor)
            layer.self_attn.o_proj.weight.mul_(factor)
    model.save_pretrained(tmp_path / "llama")
    (tmp_path / "models.toml").write_text(
        '[llama]\ntask = "text-generation"\nsource = { path = "llama" }\nvariants = ["coarse"]\n'
        "limits = { context = 96, slots = 2, threads = 1 }\n"
    )
    (tmp_path / "recipes.toml").write_text(COARSE)
    return tmp_path


def test_the_recipe_that_it_prints_is_closer(folder: Path) -> None:
    options = ("--models-file", str(folder / "models.toml"))
    done = run_export("sensitivity", "llama", "--keep", "1", "--reports", str(folder / "reports"), *options)
    assert done.returncode == 0, done.stderr
    losses = json.loads((folder / "reports/sensitivity.json").read_text())
    assert [loss["loss"] for loss in losses] == sorted((loss["loss"] for loss in losses), reverse=True)
    by_group = {loss["group"]: loss for loss in losses}
    assert losses[0]["group"] == "model/model/layers.1"
    assert losses[0]["measure"] == "kl"
    assert losses[0]["loss"] > 2 * by_group["model/model/layers.0"]["loss"] > 0
    assert len(losses[0]["matmuls"]) == 4
    assert "| model/model/layers.1 | 4 |" in done.stdout

    recipe = done.stdout[done.stdout.index("[coarse_kept]") :]
    (folder / "recipes.toml").write_text(COARSE + recipe)
    models = (folder / "models.toml").read_text().replace('["coarse"]', '["coarse", "coarse_kept"]')
    (folder / "models.toml").write_text(models)
    repository = ("--repository", str(folder / "repository"))
    exported = run_export("export", "--force", *options, *repository)
    assert exported.returncode == 0, exported.stderr
    manifest = read_manifest(folder / "repository", "llama")
    assert manifest is not None
    assert manifest.fidelity["coarse_kept"]["kl"] < 0.5 * manifest.fidelity["coarse"]["kl"]


@pytest.mark.slow
def test_both_graphs_of_a_translation_model(tmp_path: Path) -> None:
    """One matmul at a time: the other graph is kept as a whole, which is no misfit of the recipe."""
    tiny_models.make_seq2seq(tmp_path / "t5", "t5")
    (tmp_path / "recipes.toml").write_text(COARSE)
    (tmp_path / "models.toml").write_text(
        '[t5]\ntask = "translation"\nsource = { path = "t5" }\nvariants = ["coarse"]\n'
        "limits = { max_source_tokens = 64, max_target_tokens = 64, threads = 1 }\n"
    )
    options = ("--models-file", str(tmp_path / "models.toml"), "--reports", str(tmp_path))
    done = run_export_cold("sensitivity", "t5", "--by", "kind", *options)
    assert done.returncode == 0, done.stderr
    losses = {loss["group"]: loss for loss in json.loads((tmp_path / "sensitivity.json").read_text())}
    assert len(losses) > 4
    assert all(loss["loss"] > 1e-9 for loss in losses.values())


def test_what_can_not_be_analyzed(folder: Path) -> None:
    options = ("--models-file", str(folder / "models.toml"), "--reports", str(folder))
    for variant, message in (
        ("int5", f"there is no recipe 'int5'; known are {', '.join(recipes.load())}, coarse"),
        ("fp32", "the recipe quantizes nothing: name another with --variant"),
        ("int8_static", "variant int8_static is for encoder models, this is decoder"),
    ):
        done = run_export("sensitivity", "llama", "--variant", variant, *options)
        assert done.returncode == 1
        assert message in done.stderr


def test_a_group_has_the_loss_of_its_matmuls_alone() -> None:
    """And not that of the embedding table or the cache, which are rounded whatever the group."""
    spec = models_file.load(ROOT / "models.toml")[0]
    probe = probing(spec, recipes.load()["int8_cache"], recipes.Kind.DECODER, ["a"])
    (recipe,) = probe.recipes.values()
    assert [type(step).__name__ for step in recipe.passes[recipes.Kind.DECODER]] == [
        "Rotate",
        "Keep",
        "Smooth",
        "GptqPerChannel",
        "GptqGroups",
        "Groups",
    ]


def test_groups() -> None:
    names = ["/m/layers.0/attn/q/MatMul", "/m/layers.0/mlp/up/MatMul", "/m/layers.10/attn/q/MatMul", "/lm_head/MatMul"]
    assert group(names, Grouping.LAYER) == {
        "m/layers.0": names[:2],
        "m/layers.10": names[2:3],
        "lm_head/MatMul": names[3:],
    }
    assert group(names, Grouping.KIND) == {"attn/q": [names[0], names[2]], "mlp/up": names[1:2], "lm_head": names[3:]}
    assert [re.sub(r"^.*/(layers|lm)", r"\1", key) for key in group(names, Grouping.MATMUL)][3] == "lm_head/MatMul"
