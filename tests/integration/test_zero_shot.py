"""Zero-shot classification through the real server, against the transformers pipeline of that name.

Tolerance: float32 noise of two libraries through two layers, 1e-4 on probabilities.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from tests import doors, tiny_models
from trident_client import Client, InvalidRequestError, cli
from trident_export import corpora, install, models_file, recipes
from trident_export.errors import FidelityError, UnsupportedModel
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.tasks.encoders import zero_shot
from trident_serving.launcher import local
from trident_serving.launcher.local import LocalServer

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-4
# Families of encoders, with the index of entailment in published models.
LABELS = {
    "bert": ["contradiction", "neutral", "entailment"],
    "deberta-v2": ["entailment", "neutral", "contradiction"],
    "modernbert": ["entailment", "not_entailment"],
    "roberta": ["CONTRADICTION", "ENTAILMENT", "NEUTRAL"],
}
TOPICS = ["politics", "the weather", "music", "a long walk", "3"]
SAMPLES = list(itertools.product(corpora.held_out()[:6], TOPICS))


def _named(labels: list[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {name: row for row, name in enumerate(labels)}}


def _table(folder: Path, name: str) -> dict[str, Any]:
    limits = {"max_tokens": 96, "buckets": [32], "threads": 1, "max_batch_size": 40, "labels": len(LABELS[name])}
    source = {"path": str(folder / name)}
    return {"task": "zero-shot-classification", "source": source, "variants": ["fp32"], "limits": limits}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inference")
    head = AutoModelForSequenceClassification
    for seed, (name, labels) in enumerate(LABELS.items()):
        made = tiny_models.make_reader(folder / "flat" / name, name, head, seed=seed, **_named(labels))
        tokenizer, model = AutoTokenizer.from_pretrained(made), head.from_pretrained(made).eval()
        layer = getattr(model.classifier, "out_proj", model.classifier)
        with torch.no_grad():  # a random head says nearly the same of every pair
            pairs = [tokenizer(text[:30], f"This example is {topic}.", return_tensors="pt") for text, topic in SAMPLES]
            logits = torch.cat([model(**pair).logits for pair in pairs])
            layer.weight.mul_(2 / logits.std(0, keepdim=True).T)
            layer.bias.sub_(logits.mean(0)).mul_(2 / logits.std(0))
        tokenizer.save_pretrained(folder / name)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LocalServer]:
    specs = [models_file.parse(name, _table(folder, name)) for name in LABELS]
    install.export(specs, folder / "repository", folder, folder / "cache", lambda message: None)
    with local.running(folder / "repository", folder / "log") as running:
        yield running


@pytest.fixture
def client(server: LocalServer) -> Iterator[Client]:
    with Client(server.grpc_url, timeout=60) as connected:
        yield connected


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Short enough for the models; every writing of the corpus."""
    return [text.encode()[: 16 + 5 * row % 40].decode(errors="ignore") for row, text in enumerate(corpora.held_out())]


def _pipeline(folder: Path, name: str) -> Any:
    path = str(folder / name)
    return pipeline("zero-shot-classification", model=path, tokenizer=path, device="cpu")


def _assert_equal(found: list[Any], expected: dict[str, Any]) -> None:
    """The scores label by label, in falling order; labels whose scores are equal have none."""
    wanted = dict(zip(expected["labels"], expected["scores"], strict=True))
    np.testing.assert_allclose([item.score for item in found], expected["scores"], atol=TOLERANCE)
    assert sorted(item.label for item in found) == sorted(wanted)
    np.testing.assert_allclose([item.score for item in found], [wanted[item.label] for item in found], atol=TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"multi_label": True}, {"hypothesis_template": "It is about {}, I think."}])
@pytest.mark.parametrize("name", LABELS)
def test_scores_are_the_pipelines(
    client: Client, folder: Path, texts: list[str], name: str, options: dict[str, Any]
) -> None:
    pipe = _pipeline(folder, name)
    together = client.classify_zero_shot(texts, TOPICS, model=name, batch_size=8, **options)
    spread = 0.0
    for text, found in zip(texts, together, strict=True):
        _assert_equal(found, pipe(text, candidate_labels=TOPICS, **options))
        spread = max(spread, found[0].score - found[-1].score)
    assert spread > 0.1  # the labels make a difference to this model
    alone = client.classify_zero_shot(texts[0], TOPICS, model=name, **options)
    assert [item.label for item in alone] == [item.label for item in together[0]]


def test_one_label_is_entailment_against_contradiction(client: Client, folder: Path, texts: list[str]) -> None:
    pipe = _pipeline(folder, "bert")
    for text in texts[:5]:
        found = client.classify_zero_shot(text, ["music"], model="bert")
        assert 0 < found[0].score < 1
        _assert_equal(found, pipe(text, candidate_labels=["music"]))


LONG = "the cat sat on the mat " * 60


def test_a_text_is_cut_and_its_label_is_not(client: Client, folder: Path) -> None:
    pipe = _pipeline(folder, "bert")
    pipe.tokenizer.model_max_length = 96
    topics = ["music", "a very long walk in the woods, and back again by night"]
    found = client.classify_zero_shot(LONG, topics, model="bert", truncate=True)
    _assert_equal(found, pipe(LONG, candidate_labels=topics))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.classify_zero_shot("hello", [], model="bert"), "there are 1 texts and 0 labels: give one of each"),
        (lambda c: c.classify_zero_shot("hello", ["a", " "], model="bert"), r"candidate_labels\[1\] is empty: ' '"),
        (lambda c: c.classify_zero_shot("hello", ["a"] * 41, model="bert"), "make 1 x 41 pairs, the limit is 40"),
        (
            lambda c: c.classify_zero_shot(["a"] * 5, ["b"] * 9, model="bert", batch_size=5),
            "make 5 x 9 pairs, the limit is 40: give fewer labels, or fewer texts at once",
        ),
        (
            lambda c: c.classify_zero_shot("hello", ["a"], model="bert", hypothesis_template="It is."),
            "hypothesis_template must have one {}, where the label goes, found 'It is.'",
        ),
        (
            lambda c: c.classify_zero_shot("hello", ["a"], model="bert", hypothesis_template="{} {}"),
            "hypothesis_template must have one {}",
        ),
        (
            lambda c: c.classify_zero_shot("hello", ["a"], model="bert", hypothesis_template="{0.__class__} {}"),
            "hypothesis_template must have one {}",
        ),
        (lambda c: c.classify_zero_shot("", ["a"], model="bert"), "text_input is empty"),
        (
            lambda c: c.classify_zero_shot(LONG, ["a", "b"], model="bert"),
            r"text_input and candidate_labels\[0\] have .* tokens together, the model takes 96",
        ),
        (
            lambda c: c.classify_zero_shot("hello", ["a", LONG], model="bert", truncate=True),
            r"text_input and candidate_labels\[1\] have .* tokens together",
        ),
    ],
)
def test_bad_requests(client: Client, call: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        call(client)


def test_a_request_without_labels(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match="candidate_labels"):
        client._infer("bert", [{"text_input": np.array([b"hello"], np.object_)}], None)


def test_command_line(server: LocalServer, client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["zero-shot", "--url", server.grpc_url, "--model", "bert", "--label", "music", "--label", "the weather"]
    assert cli.main([*common, "--multi-label", "--json", "a song", "rain"]) == 0
    rows = json.loads(capsys.readouterr().out)
    expected = client.classify_zero_shot(["a song", "rain"], ["music", "the weather"], model="bert", multi_label=True)
    assert [[item["label"] for item in row] for row in rows] == [[item.label for item in row] for row in expected]
    assert cli.main([*common, "--template", "no place", "a song"]) == 1
    assert "hypothesis_template must have one {}" in capsys.readouterr().err


def test_a_damaged_model_is_refused(
    folder: Path, server: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of one matmul three percent too large."""
    original = recipes.apply

    def damaged(recipe: Any, kind: Any, graph: Path, *more: Any) -> None:
        model = onnx.load(str(graph))
        tensor = next(t for t in model.graph.initializer if list(t.dims) == [32, 48])
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.03), tensor.name))
        onnx.save(model, str(graph))
        original(recipe, kind, graph, *more)

    monkeypatch.setattr(recipes, "apply", damaged)
    spec = models_file.parse("bert", _table(folder, "bert"))
    with pytest.raises(FidelityError, match="score_error"):
        install.export([spec], tmp_path, tmp_path, tmp_path, lambda message: None)


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        (
            "bert",
            ["bad", "good"],
            "has the labels bad, good, of which none is entailment: zero-shot classification needs",
        ),
        ("bart", LABELS["bert"], "is an encoder-decoder model: zero-shot classification needs an encoder"),
    ],
)
def test_models_that_can_not(tmp_path: Path, kind: str, labels: list[str], message: str) -> None:
    AutoConfig.for_model(kind, **_named(labels)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=message):
        zero_shot.EXPORT.settings(HuggingFaceFolder(tmp_path))


def test_both_clients_over_grpc_and_http(server: LocalServer, texts: list[str]) -> None:
    options = {"model": "bert", "hypothesis_template": "It is about {}."}
    found = doors.answers(
        server,
        lambda client: client.classify_zero_shot(texts[:5], TOPICS, batch_size=2, **options),
        lambda client: client.classify_zero_shot(texts[0], TOPICS, multi_label=True, **options),
    )
    assert {label.label for label in found[0][4]} == {label.label for label in found[1]} == set(TOPICS)
