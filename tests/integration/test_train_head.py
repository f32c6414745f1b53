"""`trident-export train-head` as a person runs it: what comes out is exported, gated and served."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModel

from tests import tiny_models
from tests.conftest import ROOT, run_export, run_export_cold
from trident_client import Client
from trident_serving.launcher import local


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("heads")
    tiny_models.make_reader(root / "vectors", "bert", AutoModel)
    (root / "models.toml").write_text(
        '[vectors]\ntask = "feature-extraction"\nsource = { path = "vectors" }\nvariants = ["fp32"]\n'
        "limits = { dimensions = 32, max_tokens = 96 }\n"
    )
    places = ("garden", "house", "river", "street", "church", "field", "window", "table", "door", "sea")
    rows = [
        {"text": f"The {word} of the {place}", "label": word} for place in places for word in ("king", "queen", "child")
    ]
    (root / "classes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def trained(folder: Path, task: str, data: str, *more: str) -> tuple[dict[str, float], str]:
    """The measures, and the table."""
    done = run_export(
        "train-head", "vectors", "--task", task, "--data", str(folder / data), "--output", str(folder / task),
        "--models-file", str(folder / "models.toml"), *more,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said, table = done.stdout.split("# for models.toml:\n")
    return {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+)(?:,|\n)", said)}, table


@pytest.mark.slow
def test_a_classifier_is_trained_and_exported(folder: Path) -> None:
    measures, table = trained(
        folder, "text-classification", "classes.jsonl", "--epochs", "20", "--learning-rate", "0.003",
        "--batch-size", "8", "--length", "32",
    )  # fmt: skip
    assert measures["accuracy"] == 1
    assert measures["macro_f1"] == 1
    assert not (folder / "text-classification/modules.json").exists()
    (folder / "served.toml").write_text(table)
    done = run_export(
        "export", "--models-file", str(folder / "served.toml"), "--repository", str(folder / "repository")
    )
    assert "fp32: passed" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"text": "a", "label": "b"}'] * 9, "there are 9 examples, and 10 are the fewest"),
        (['{"text": "a", "label": "b"}'] * 10, "all examples are of the class 'b'"),
        (
            ['{"text": "a", "label": "b"}'] * 9 + ['{"text": "a", "label": "c"}'],
            "the class 'c' has examples to measure with and none to learn from",
        ),
        (["{}"], "line 1: text must be a text"),
    ],
)
def test_impossible_examples(folder: Path, tmp_path: Path, lines: list[str], said: str) -> None:
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    done = run_export(
        "train-head", "vectors", "--task", "text-classification", "--data", str(tmp_path / "data.jsonl"),
        "--output", str(tmp_path / "out"), "--models-file", str(folder / "models.toml"),
    )  # fmt: skip
    assert done.returncode == 1
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


def test_impossible_settings(folder: Path) -> None:
    common = ("--data", str(folder / "classes.jsonl"), "--models-file", str(folder / "models.toml"))
    done = run_export("train-head", "vectors", "--task", "text-classification", "--epochs", "0", *common)
    assert "--epochs must be above 0, found 0" in done.stderr
    done = run_export("train-head", "nobody", "--task", "question-answering", *common)
    assert "line 1: question must be a text" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_heads_on_real_weights(tmp_path: Path) -> None:
    """MiniLM learns six kinds of requests, and to answer from short notes; both are exported and served."""
    made = [sys.executable, str(ROOT / "examples/heads/questions.py"), "1200"]
    (tmp_path / "questions.jsonl").write_text(subprocess.run(made, check=True, capture_output=True, text=True).stdout)
    tables = ""
    for task, data, measure in (
        ("text-classification", ROOT / "examples/heads/requests.jsonl", "accuracy"),
        ("question-answering", tmp_path / "questions.jsonl", "exact_match"),
    ):
        epochs = "8" if task == "text-classification" else "3"
        done = run_export_cold(
            "train-head", "minilm", "--task", task, "--data", str(data), "--output", str(tmp_path / task),
            "--epochs", epochs, "--length", "96",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said, table = done.stdout.split("# for models.toml:\n")
        found = re.search(rf"{measure} ([\d.]+)", said)
        assert found is not None
        assert float(found[1]) > 0.7, said
        tables += table
    (tmp_path / "models.toml").write_text(tables)
    done = run_export(
        "export", "--models-file", str(tmp_path / "models.toml"), "--repository", str(tmp_path / "repository")
    )
    assert done.returncode == 0, done.stderr
    with (
        local.running(tmp_path / "repository", tmp_path / "log") as running,
        Client(running.grpc_url, timeout=60) as client,
    ):
        assert client.classify("My box has still not been delivered", model="minilm-text-classification")[0].label == (
            "delivery"
        )
        context = "Anna works as a nurse in Oslo. On 3 May Luis sold a piano for 200 euros."
        (answer,) = client.answer("What did Luis sell?", context, model="minilm-question-answering")
        assert answer.answer == "a piano"
