"""`trident-export evaluate`: the measures of every installed variant, as a table and as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, run_export
from trident_export import fidelity, quality


def test_the_default_models(default_repository: Path, tmp_path: Path) -> None:
    done = run_export("evaluate", "minilm", "--reports", str(tmp_path), "--repository", str(default_repository))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "quality.json").read_text())
    assert set(report) == {"minilm"}
    fp32, int8 = report["minilm"]["fp32"], report["minilm"]["int8"]
    assert fp32["worst_cosine"] > 0.99999
    assert 0.99 <= int8["worst_cosine"] < int8["mean_cosine"] < fp32["mean_cosine"]
    assert int8["rank_agreement"] > 0.98
    assert max(fp32["batch_effect"], int8["batch_effect"]) <= 1e-3
    weights = sum(file.stat().st_size for file in (default_repository / "minilm_model_int8/1").glob("*.onnx*")) / 2**20
    assert int8["size_mib"] == pytest.approx(weights)
    assert int8["size_mib"] < 0.7 * fp32["size_mib"]
    for measured in (fp32, int8):
        assert measured["texts_s_64_tokens"] > 1
        assert measured["size_mib"] < measured["resident_mib"] < 1000
    table = (tmp_path / "quality.md").read_text()
    assert table == done.stdout
    assert "## minilm" in table
    assert table.count("\n| int8 |") == 1


def test_a_model_that_is_not_exported(tmp_path: Path) -> None:
    done = run_export("evaluate", "gpt2", "--repository", str(tmp_path), "--models-file", str(ROOT / "models.toml"))
    assert done.returncode == 1
    assert "gpt2 is not exported: run make export MODEL=gpt2" in done.stderr


def test_perplexity_is_that_of_the_next_tokens() -> None:
    logits = np.log(np.array([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [1 / 3, 1 / 3, 1 / 3]]], np.float32))
    # The second token had probability 0.25, the third 0.8; what follows the third is not known.
    assert fidelity.perplexity(list(logits), [[0, 1, 1]]) == pytest.approx(1 / math.sqrt(0.25 * 0.8), rel=1e-6)


def test_rank_agreement() -> None:
    vectors = np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32)
    assert fidelity.rank_agreement(vectors, 3 * vectors) == pytest.approx(1.0)
    assert fidelity.rank_agreement(vectors, vectors[::-1]) < 0.6


def test_a_table_has_a_column_for_every_measure() -> None:
    table = quality.as_table({"m": {"fp32": {"kl": 0.0}, "int8": {"kl": 0.00512345, "size_mib": 12.0}}})
    assert table.splitlines() == [
        "## m",
        "",
        "| variant | kl | size_mib |",
        "|---|---:|---:|",
        "| fp32 | 0 |  |",
        "| int8 | 0.005123 | 12 |",
    ]
