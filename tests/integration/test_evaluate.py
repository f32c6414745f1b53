"""`trident-export evaluate`: the measures of every installed variant, as a table and as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from transformers import AutoModelForQuestionAnswering

from tests import tiny_models
from tests.conftest import ROOT, run_export, run_export_cold
from trident_export.measure import fidelity, quality


@pytest.mark.slow
def test_the_default_models(default_repository: Path, tmp_path: Path) -> None:
    done = run_export_cold("evaluate", "minilm", "--reports", str(tmp_path), "--repository", str(default_repository))
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
    assert fp32["recall_at_10"] == 1.0
    assert 0.9 < report["minilm"]["int8_static"]["recall_at_10"] <= int8["recall_at_10"] <= 1.0
    drawing = (tmp_path / "quality.svg").read_text()
    for text in ("minilm", "int8_static", "texts/s, 64 tokens each", "1 - worst_cosine"):
        assert f"<!-- {text} -->" in drawing


def test_your_own_text(default_repository: Path, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    options = ("--text", str(text), "--reports", str(tmp_path), "--repository", str(default_repository))
    text.write_text("\n\n")
    done = run_export("evaluate", "minilm", *options)
    assert done.returncode == 1
    assert f"{text} has no text: it needs paragraphs" in done.stderr
    text.write_text("One paragraph\nof two lines.\n\nAnother one.\n\nA third.\n")
    done = run_export("evaluate", "minilm", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "quality.json").read_text())["minilm"]["int8"]["texts"] == 3


@pytest.fixture(scope="module")
def tiny_models_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each kind with random weights, exported; `coarse` rounds to four bits."""
    folder = tmp_path_factory.mktemp("evaluated")
    tiny_models.make_causal(folder / "llama", "llama")
    tiny_models.make_seq2seq(folder / "t5", "t5")
    tiny_models.make_reader(folder / "qa", "bert", AutoModelForQuestionAnswering)
    recipe = '[{ pass = "groups", bits = 4, group = 32 }]'
    (folder / "recipes.toml").write_text(f'[coarse]\nprecision = "int4"\ndecoder = {recipe}\nencoder = {recipe}\n')
    limits = {
        "llama": ("text-generation", "context = 128, slots = 4, threads = 1"),
        "t5": ("translation", "max_source_tokens = 64, max_target_tokens = 64, threads = 1"),
        "qa": ("question-answering", "max_tokens = 96, stride = 16, threads = 1"),
    }
    (folder / "models.toml").write_text(
        "".join(
            f'[{name}]\ntask = "{task}"\nsource = {{ path = "{name}" }}\nvariants = ["fp32", "coarse"]\n'
            f"limits = {{ {text} }}\n\n"
            for name, (task, text) in limits.items()
        )
    )
    done = run_export("export", "--force", "--models-file", str(folder / "models.toml"), *_in(folder))
    assert done.returncode == 0, done.stderr
    return folder / "models.toml"


def _in(folder: Path) -> tuple[str, ...]:
    return ("--repository", str(folder / "repository"))


@pytest.mark.parametrize(
    ("name", "best"),
    [
        ("llama", {"greedy_match": 32.0, "kl": 0.0, "top1": 1.0}),
        ("t5", {"bleu": 100.0, "chrf": 100.0, "rouge_l": 100.0, "kl": 0.0}),
        ("qa", {"exact_match": 1.0, "f1": 1.0, "agreement": 1.0}),
    ],
)
def test_whole_answers_of_every_kind_of_model(
    tiny_models_file: Path, tmp_path: Path, name: str, best: dict[str, float]
) -> None:
    options = ("--models-file", str(tiny_models_file), "--reports", str(tmp_path), *_in(tiny_models_file.parent))
    done = run_export("evaluate", name, *options)
    assert done.returncode == 0, done.stderr
    (report,) = json.loads((tmp_path / "quality.json").read_text()).values()
    for measure, value in best.items():
        assert report["fp32"][measure] == pytest.approx(value, abs=1e-5), measure
    # Random weights decide by a hair, so four bits must show in answers.
    assert any(abs(report["coarse"][measure] - value) > 1e-3 for measure, value in best.items())
    assert {"size_mib", "resident_mib", "batch_effect"} <= set(report["coarse"])


def test_spans_of_answers() -> None:
    def rows(start: int, end: int) -> NDArray[np.float32]:
        scores = np.full((2, 30), 0.01, np.float32)
        scores[0, start] = scores[1, end] = 0.7
        return scores

    assert fidelity.compare_spans([rows(3, 6)], [rows(3, 6)]) == {"exact_match": 1.0, "f1": 1.0}
    # Two tokens of four and three are shared.
    assert fidelity.compare_spans([rows(3, 6)], [rows(5, 7)]) == {"exact_match": 0.0, "f1": pytest.approx(4 / 7)}
    # An end before its start is no span: the best one that is allowed ends or starts somewhere else.
    assert fidelity.compare_spans([rows(3, 6)], [rows(9, 2)])["exact_match"] == 0.0


def test_texts_against_the_references() -> None:
    texts = ["the cat sat on the mat", "eine zweite Zeile, die länger ist"]
    assert list(fidelity.compare_texts(texts, texts).values()) == pytest.approx([100, 100, 100])
    worse = fidelity.compare_texts(texts, [texts[0], "something else altogether, quite"])
    assert 20 < worse["bleu"] < 80
    assert 20 < worse["chrf"] < 80
    assert worse["rouge_l"] == pytest.approx(50)
    assert fidelity.compare_texts(["", "你好"], ["", "你好"])["rouge_l"] == 100


def test_match_and_recall() -> None:
    assert fidelity.mean_match([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 9, 6]]) == 2.0
    passages = np.eye(4, dtype=np.float32)
    questions = np.array([[3, 2, 1, 0]], np.float32)
    assert fidelity.recall(passages, questions, passages, questions, best=2) == 1.0
    assert fidelity.recall(passages, questions, passages, np.array([[3, 0, 2, 0]], np.float32), best=2) == 0.5


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
