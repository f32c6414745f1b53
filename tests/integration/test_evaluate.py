"""`trident-export evaluate`: the measures of every installed variant, as a table and as JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoModelForQuestionAnswering, AutoTokenizer

from tests import tiny_models
from tests.conftest import ROOT, run_export, run_export_cold
from trident_client import Client
from trident_export import corpora
from trident_export.measure import fidelity, quality
from trident_serving.launcher.local import LocalServer


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
    # By these rules it is served, so Hugging Face's answers follow them, too.
    tiny_models.make_seq2seq(folder / "t5", "t5", 0, no_repeat_ngram_size=2, repetition_penalty=1.3)
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


def ask(data: Path, model: str, reports: Path, url: str, *lines: Mapping[str, Any], against: str = "") -> Any:
    """The report of an evaluation against references, of a model and its variants that a server has."""
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = {"smollm2": "smollm2,smollm2_fp32", "minilm": "minilm,minilm_int8"}[model]
    options = ("--dataset", str(data), "--reports", str(reports), "--url", url, "--models", names)
    done = run_export("evaluate", model, *options, *(("--against", against) if against else ()))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (reports / "evaluation.md").read_text().strip()
    return json.loads((reports / "evaluation.json").read_text())


def test_perplexity_is_hugging_face_s(server: LocalServer, smollm2_folder: Path, tmp_path: Path) -> None:
    texts = corpora.held_out()[:3]
    report = ask(tmp_path / "d", "smollm2", tmp_path, server.grpc_url, *({"text": text} for text in texts))
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    losses, tokens = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.inference_mode():
            losses += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    exact = report["models"]["smollm2_fp32"]["perplexity"]
    assert exact["value"] == pytest.approx(math.exp(losses / tokens), rel=1e-4)
    assert exact["low"] < exact["value"] < exact["high"]
    assert (report["baseline"], report["examples"]) == ("smollm2_fp32", 3)
    difference = report["differences"]["smollm2"]["perplexity"]["interval"]
    assert difference["value"] == pytest.approx(report["models"]["smollm2"]["perplexity"]["value"] - exact["value"])
    assert 0 < abs(difference["value"]) < 1


def test_answers_are_compared_with_references(server: LocalServer, tmp_path: Path) -> None:
    question = {"messages": [{"role": "user", "content": "What is the capital of France? Answer in one word."}]}
    lines = [
        question | {"references": ["Paris"], "max_tokens": 8},
        question | {"references": ["Rome"], "max_tokens": 8},
    ]
    report = ask(tmp_path / "d", "smollm2", tmp_path, server.grpc_url, *lines, against="smollm2")
    with Client(server.grpc_url, timeout=120) as client:
        told = client.generate(question["messages"], model="smollm2_fp32", max_tokens=8).text
    found = report["models"]["smollm2_fp32"]
    assert "Paris" in told
    assert found["exact_match"]["value"] == 0.5 * (told.strip(" .") == "Paris")
    assert 0 < found["chrf"]["value"] < 100
    assert report["baseline"] == "smollm2"


def test_searches_are_scored(server: LocalServer, tmp_path: Path) -> None:
    passages = ["Trains run on rails.", "The Seine flows through Paris.", "Bread is made of flour."]
    lines = [
        {"query": "Which river is in Paris?", "passages": passages, "relevant": [1]},
        {"query": "How do I bake?", "passages": passages, "relevant": {"2": 2, "0": 0}},
        {"query": "How do I bake?", "passages": passages, "relevant": [0]},
    ]
    report = ask(tmp_path / "d", "minilm", tmp_path, server.grpc_url, *lines)
    found = report["models"]["minilm"]
    assert 0.5 <= found["mrr@10"]["value"] < 1
    assert found["recall@10"]["value"] == 1
    assert report["differences"]["minilm_int8"]["ndcg@10"]["p"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "--dataset", "d"), "--dataset is for one model: name it"),
        (
            ("evaluate", "smollm2", "--url", "127.0.0.1:1"),
            "--url is for an evaluation against references: name a --dat",
        ),
        (("evaluate", "smollm2", "--dataset", "none.jsonl"), "none.jsonl can't be read: No such file or directory"),
        (("evaluate", "smollm2", "--dataset", "README.md"), "README.md, line 1 is no JSON"),
        (("evaluate", "smollm2", "--dataset", "{d}", "--resamples", "9"), "an interval needs 100 at least"),
        (
            ("evaluate", "smollm2", "--dataset", "{d}", "--against", "x", "--url", "{url}"),
            "the baseline x is none of smollm2",
        ),
        (
            ("evaluate", "smollm2", "--dataset", "{d}", "--url", "127.0.0.1:9"),
            "trident-export: 127.0.0.1:9: failed to connect",
        ),
        (("evaluate", "smollm2", "--dataset", "{long}", "--url", "{url}"), "line 1: smollm2.* says: .*2048"),
        (("evaluate", "smollm2", "--dataset", "{option}", "--url", "{url}"), "line 1: smollm2.* says: .*colour"),
    ],
)
def test_an_evaluation_that_can_not_be(
    server: LocalServer, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    files = {"d": {"text": "a b"}, "long": {"text": "a " * 9000}, "option": {"text": "a b", "colour": "red"}}
    for name, line in files.items():
        (tmp_path / name).write_text(json.dumps(line) + "\n")
    paths = {name: tmp_path / name for name in files}
    done = run_export(*(each.format(**paths, url=server.grpc_url) for each in arguments), "--reports", str(tmp_path))
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
