"""Classification, entities, question answering, embeddings, ranking and masks through the real server.

Every family of encoders, with random weights and the family's tokenizer class, against the transformers pipeline of
the same name; that of question answering is gone, and its answers are kept in a file. Tolerance: float32 noise of two
libraries through two layers, 1e-5 on probabilities.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)

from tests import doors, tiny_models
from tests.conftest import runs_slow_tests, some_slow
from tests.golden import question_answering as record
from trident_client import Client, InvalidRequestError, cli
from trident_export import corpora, install, models_file, recipes, tasks
from trident_export.audit import cases, measuring, report
from trident_export.errors import FidelityError, UsageError
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.measure import fidelity
from trident_export.tasks.encoders import base
from trident_serving.launcher import local
from trident_serving.launcher.local import LocalServer

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-5
LABELS = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG"]
_ENTITY_NAMES = {"id2label": dict(enumerate(LABELS)), "label2id": {name: row for row, name in enumerate(LABELS)}}

CLASSIFIERS = {
    "cls-bert": ("bert", {"num_labels": 3}),
    "cls-distilbert": ("distilbert", {"num_labels": 2}),
    "cls-roberta": ("roberta", {"num_labels": 4, "problem_type": "multi_label_classification"}),
    "cls-xlmr": ("xlm-roberta", {"num_labels": 1, "problem_type": "regression"}),
    "cls-modernbert": ("modernbert", {"num_labels": 2}),
    "cls-deberta": ("deberta-v2", {"num_labels": 1}),
    "cls-mpnet": ("mpnet", {"num_labels": 3}),
}
TOKEN_CLASSIFIERS = {
    f"ner-{family}": family for family in ("bert", "roberta", "xlm-roberta", "deberta-v2", "modernbert")
}
QUESTION_ANSWERERS = {f"qa-{family}": family for family in ("bert", "distilbert", "roberta", "xlm-roberta", "mpnet")}
FILLERS = {f"fill-{family}": family for family in ("bert", "roberta", "modernbert", "deberta-v2")}
EMBEDDERS = {f"emb-{family}": family for family in ("mpnet", "xlm-roberta", "modernbert")}
# Served with slow tests only: the gate of the export proves these families elsewhere, and other families show the task.
SLOW = {
    *("cls-distilbert", "cls-modernbert", "cls-mpnet", "cls-deberta", "ner-xlm-roberta", "ner-modernbert"),
    *("qa-distilbert", "qa-xlm-roberta", "qa-mpnet", "fill-roberta", "fill-deberta-v2", "emb-modernbert"),
}


def _tables(folder: Path, make: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """The tables of models.toml that serve the models; some are made, in the same folder."""
    made: dict[str, dict[str, Any]] = {}

    def add(name: str, family: str, head: type, task: str, limits: dict[str, Any], **config: Any) -> None:
        path = folder / name
        if name in make:
            tiny_models.make_reader(path, family, head, seed=len(made), **config)
            if head is AutoModelForQuestionAnswering:
                tiny_models.settle(path)
        shared = {"max_tokens": 96, "buckets": [32], "threads": 1}
        made[name] = {"task": task, "source": {"path": str(path)}, "variants": ["fp32"], "limits": shared | limits}

    for name, (family, config) in CLASSIFIERS.items():
        add(
            name,
            family,
            AutoModelForSequenceClassification,
            "text-classification",
            {"labels": config["num_labels"]},
            **config,
        )
    for name, family in TOKEN_CLASSIFIERS.items():
        add(name, family, AutoModelForTokenClassification, "token-classification", {"labels": 5}, **_ENTITY_NAMES)
    for name, family in QUESTION_ANSWERERS.items():
        add(name, family, AutoModelForQuestionAnswering, "question-answering", {"stride": 24})
    for name, family in FILLERS.items():
        add(name, family, AutoModelForMaskedLM, "fill-mask", {"top_k": 4 if family == "modernbert" else 20})
    for name, family in EMBEDDERS.items():
        add(name, family, AutoModel, "feature-extraction", {"dimensions": 32})
    made["emb-xlm-roberta"]["prompts"] = {"query": "query: ", "passage": "passage: "}
    add("reranker", "bert", AutoModelForSequenceClassification, "text-ranking", {"labels": 1}, num_labels=1)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readers")


@pytest.fixture(scope="module")
def reader_server(folder: Path, request: pytest.FixtureRequest) -> Iterator[LocalServer]:
    served = {name for name in _tables(folder) if name not in SLOW or runs_slow_tests(request.config)}
    specs = [models_file.parse(name, table) for name, table in _tables(folder, served).items() if name in served]
    install.export(specs, folder / "repository", folder, folder / "cache", lambda message: None)
    with local.running(folder / "repository", folder / "log") as running:
        yield running


@pytest.fixture
def reader(reader_server: LocalServer) -> Iterator[Client]:
    with Client(reader_server.grpc_url, timeout=60) as connected:
        yield connected


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Short enough for the models; every writing of the corpus."""
    return [text.encode()[: 20 + 9 * row % 70].decode(errors="ignore") for row, text in enumerate(corpora.held_out())]


def hugging_face(folder: Path, task: str, name: str) -> Any:
    return pipeline(task, model=str(folder / name), tokenizer=str(folder / name), device="cpu")


def test_classifiers_are_audited(reader: Client) -> None:
    """Each class has a score for each sentence and group: the probability that a call gives."""
    asked = cases.Cases((cases.Axis("gender", ("the man", "the woman")),), ("{Person} left.", "See {person}."), ())
    for name, classes in (("cls-bert", 3), ("cls-roberta", 4), ("cls-xlmr", 1)):
        found = report.audit(reader, "text-classification", [name], asked, name)
        assert len(found.gaps[name]["gender"]) == classes
        scores = measuring.scores(reader, "text-classification", name, asked, asked.axes[0])
        for label in reader.classify("See the woman.", model=name, top_k=classes):
            assert scores[label.label][1, 1] == pytest.approx(label.score)
    with pytest.raises(UsageError, match="cls-roberta has other classes than cls-bert"):
        report.audit(reader, "text-classification", ["cls-bert", "cls-roberta"], asked, "cls-bert")


@pytest.mark.parametrize("name", some_slow(CLASSIFIERS, SLOW))
def test_classification(reader: Client, folder: Path, texts: list[str], name: str) -> None:
    pipe = hugging_face(folder, "text-classification", name)
    labels = CLASSIFIERS[name][1]["num_labels"]
    expected = pipe(texts, top_k=None)
    found = reader.classify(texts, model=name, top_k=labels)
    for wanted, given in zip(expected, found, strict=True):
        assert [label.label for label in given] == [item["label"] for item in wanted]
        np.testing.assert_allclose(
            [label.score for label in given], [item["score"] for item in wanted], atol=TOLERANCE, rtol=1e-4
        )
    assert [row[0] for row in found] == [row[0] for row in reader.classify(texts, model=name)]


@pytest.mark.parametrize("name", ["cls-bert", "cls-roberta", "cls-xlmr"])
def test_classification_of_pairs(reader: Client, folder: Path, texts: list[str], name: str) -> None:
    pipe = hugging_face(folder, "text-classification", name)
    others = texts[::-1]
    expected = [pipe({"text": a, "text_pair": b}, top_k=None) for a, b in zip(texts, others, strict=True)]
    found = reader.classify(texts, text_pairs=others, model=name, top_k=len(expected[0]))
    for wanted, given in zip(expected, found, strict=True):
        scores = {item["label"]: item["score"] for item in wanted}
        np.testing.assert_allclose(
            [label.score for label in given], [scores[label.label] for label in given], atol=2e-5
        )


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
@pytest.mark.parametrize("name", some_slow(TOKEN_CLASSIFIERS, SLOW))
def test_entities(reader: Client, folder: Path, texts: list[str], name: str, strategy: str) -> None:
    pipe = hugging_face(folder, "token-classification", name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tokenizers without words: the pipeline guesses, and so do we
        expected = [pipe(text, aggregation_strategy=strategy) for text in texts]
    found = reader.entities(texts, model=name, aggregation_strategy=strategy)
    assert sum(map(len, found)) > len(texts)
    for wanted, given in zip(expected, found, strict=True):
        kind = "entity" if strategy == "none" else "entity_group"
        assert [(entity.entity, entity.word, entity.start, entity.end) for entity in given] == [
            (item[kind], item["word"], item["start"], item["end"]) for item in wanted
        ]
        np.testing.assert_allclose([e.score for e in given], [item["score"] for item in wanted], atol=TOLERANCE)


@pytest.mark.parametrize("name", ["ner-bert", "ner-roberta"])
def test_entities_of_a_long_text(reader: Client, folder: Path, texts: list[str], name: str) -> None:
    """Each token as the window sees it that shows more around it; windows overlap by a quarter of 96 tokens."""
    text = " ".join(texts)
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    model = AutoModelForTokenClassification.from_pretrained(folder / name).eval()
    options = {"max_length": 96, "stride": 24, "truncation": True, "return_overflowing_tokens": True}
    batch = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, **options)
    expected: list[tuple[int, str, float]] = []
    rows = len(batch["input_ids"])
    assert rows > 3
    for row in range(rows):
        with torch.inference_mode():
            scores = model(torch.tensor([batch["input_ids"][row]])).logits[0].softmax(-1)
        real = [index for index, special in enumerate(batch["special_tokens_mask"][row]) if not special]
        for index in real[12 if row else 0 : len(real) - 12 if row < rows - 1 else len(real)]:
            start = batch["offset_mapping"][row][index][0]
            expected.append((start, LABELS[int(scores[index].argmax())], float(scores[index].max())))
    expected = [token for token in expected if token[1] != "O"]
    found = reader.entities(text, model=name, aggregation_strategy="none")
    assert [(e.start, e.entity) for e in found] == [(start, label) for start, label, _ in expected]
    np.testing.assert_allclose([e.score for e in found], [score for _, _, score in expected], atol=TOLERANCE)
    whole = reader.entities(text, model=name)  # neighbours are joined across windows, and characters are the text's
    assert all(e.start <= e.end <= len(text) for e in whole)
    assert whole[-1].start > len(text) * 0.9
    short = "Anna went to Rome with Bob Stone"
    together, alone = reader.entities([text, short], model=name), reader.entities(short, model=name)
    assert [len(row) for row in together] == [len(whole), len(alone)]


@pytest.mark.parametrize("name", some_slow(QUESTION_ANSWERERS, SLOW))
def test_question_answering(reader: Client, folder: Path, name: str) -> None:
    """Answer, characters and score equal on fifty mixed contexts: F1 against the pipeline is 1."""
    windows = 0
    for (question, context, options), expected in zip(record.questions(), record.answers()[name], strict=True):
        found = reader.answer(question, context, model=name, **options)
        assert [(a.start, a.end) for a in found] == [(start, end) for start, end, _ in expected]
        np.testing.assert_allclose([a.score for a in found], [score for *_, score in expected], atol=TOLERANCE)
        assert all(context[a.start : a.end] == a.answer for a in found)
        windows += len(context.encode()) > 400
    assert windows > 20


def test_several_questions_at_once(reader: Client) -> None:
    questions, found_contexts, _ = zip(*record.questions()[:6], strict=True)
    together = reader.answer(questions, found_contexts, model="qa-bert", top_k=2)
    alone = [reader.answer(q, c, model="qa-bert", top_k=2) for q, c in zip(questions, found_contexts, strict=True)]
    assert [[a.answer for a in row] for row in together] == [[a.answer for a in row] for row in alone]
    one_context = reader.answer(questions, found_contexts[0], model="qa-bert")
    assert [row[0].answer for row in one_context] == [
        reader.answer(q, found_contexts[0], model="qa-bert")[0].answer for q in questions
    ]


@pytest.mark.parametrize("name", some_slow(FILLERS, SLOW))
def test_fill_mask(reader: Client, folder: Path, name: str) -> None:
    pipe = hugging_face(folder, "fill-mask", name)
    mask = pipe.tokenizer.mask_token
    for text in (
        f"The {mask} sat on the mat.",
        f"{mask} und {mask} sind da",
        f"Eine lange {mask}, die noch weiter geht",
    ):
        expected = pipe(text, top_k=4)
        expected = expected if isinstance(expected[0], list) else [expected]
        found = reader.fill_mask(text, model=name, top_k=4)
        for wanted, given in zip(expected, found, strict=True):
            assert [(f.token, f.token_str, f.sequence) for f in given] == [
                (item["token"], item["token_str"], item["sequence"]) for item in wanted
            ]
            np.testing.assert_allclose([f.score for f in given], [item["score"] for item in wanted], atol=TOLERANCE)
        unsaid = reader.fill_mask(text, model=name)
        assert [row[:4] for row in unsaid] == list(found)
        assert {len(row) for row in unsaid} == {4 if name == "fill-modernbert" else 5}  # what the model gives, or five


@pytest.mark.parametrize("name", some_slow(EMBEDDERS, SLOW))
def test_embeddings(reader: Client, folder: Path, texts: list[str], name: str) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(folder / name), AutoModel.from_pretrained(folder / name).eval()
    prefix = "query: " if name == "emb-xlm-roberta" else ""
    expected = []
    with torch.inference_mode():
        for text in texts:
            mean = model(**tokenizer(prefix + text, return_tensors="pt")).last_hidden_state[0].mean(0)
            expected.append((mean / mean.norm()).numpy())
    found = reader.embed(texts, model=name, prompt_name="query" if prefix else None)
    np.testing.assert_allclose(found, np.stack(expected), atol=TOLERANCE)


def test_ranking(reader: Client, folder: Path, texts: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "reranker")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "reranker").eval()
    with torch.inference_mode():
        scores = [
            model(**tokenizer("where is it?", text, return_tensors="pt")).logits.sigmoid().item() for text in texts
        ]
    ranked = reader.rank("where is it?", texts, model="reranker")
    assert [row.index for row in ranked] == sorted(range(len(texts)), key=lambda row: -scores[row])
    np.testing.assert_allclose([row.score for row in ranked], sorted(scores, reverse=True), atol=TOLERANCE)


LONG = "the cat sat on the mat " * 60


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.classify("hello", model="cls-bert", top_k=10000), r"top_k must be between 1 and 3 .*found 10000"),
        (lambda c: c.classify("hello", model="cls-bert", top_k=0), "top_k must be between 1 and 3"),
        (lambda c: c.classify("", model="cls-bert"), "text_input is empty"),
        (lambda c: c.classify("hello", text_pairs="", model="cls-bert"), "text_pair is empty"),
        (lambda c: c.classify(LONG, model="cls-bert"), "text_input has .* tokens, the model takes 96"),
        (lambda c: c.classify("\N{SNOWMAN}", model="cls-bert"), "holds no token that the model's vocabulary knows"),
        (lambda c: c.classify("\N{SNOWMAN}", model="cls-xlmr"), "holds no token that the model's vocabulary knows"),
        (
            lambda c: c.entities("hi", model="ner-bert", aggregation_strategy="best"),
            "must be one of none, simple, first",
        ),
        (lambda c: c.entities(LONG * 20, model="ner-bert"), r"takes \d+ windows of 96 tokens, the limit is 32"),
        (lambda c: c.answer("who?", "", model="qa-bert"), "context is empty"),
        (lambda c: c.answer("", "He was.", model="qa-bert"), "question is empty"),
        (lambda c: c.answer(LONG, "He was.", model="qa-bert"), r"question has \d+ tokens, the limit is 68"),
        (lambda c: c.answer("who?", LONG * 20, model="qa-bert"), r"take \d+ windows of 96 tokens, the limit is 32"),
        (lambda c: c.answer("who?", "He.", model="qa-bert", top_k=1000), "top_k must be between 1 and 100"),
        (lambda c: c.answer(["a b", "c"], ["x", "y", "z"], model="qa-bert"), "there are 2 questions and 3 contexts"),
        (lambda c: c.fill_mask("nothing to fill", model="fill-bert"), r"no gap to fill: write \[MASK\]"),
        (lambda c: c.fill_mask("[MASK]", model="fill-bert", top_k=21), "top_k must be between 1 and 20"),
        (
            lambda c: c.embed("x", model="emb-xlm-roberta", prompt_name="doc"),
            "not known to this model; known: query, passage",
        ),
        (lambda c: c.embed("x", model="emb-mpnet", prompt_name="doc"), "unexpected inference input 'prompt_name'"),
        (lambda c: c.rank("", ["a"], model="reranker"), "query is empty"),
        (
            lambda c: c.rank("a", ["b", LONG], model="reranker"),
            r"query\[1\] and text_input\[1\] have .* tokens together",
        ),
    ],
)
def test_bad_requests(reader: Client, call: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        call(reader)


def test_truncation_is_asked_for(reader: Client, folder: Path) -> None:
    expected = hugging_face(folder, "text-classification", "cls-bert")(LONG, truncation=True, max_length=96)[0]
    (found,) = reader.classify(LONG, model="cls-bert", truncate=True)
    assert found.label == expected["label"]
    assert found.score == pytest.approx(expected["score"], abs=TOLERANCE)


def test_command_line(reader_server: LocalServer, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> Any:
        assert cli.main([arguments[0], "--url", reader_server.grpc_url, "--json", *arguments[1:]]) == 0
        return json.loads(capsys.readouterr().out)

    with Client(reader_server.grpc_url) as client:
        found = run("classify", "--model", "cls-bert", "--top-k", "3", "one text", "another")
        assert [[item["label"] for item in row] for row in found] == [
            [label.label for label in row]
            for row in client.classify(["one text", "another"], model="cls-bert", top_k=3)
        ]
        entities = run("entities", "--model", "ner-bert", "--aggregation", "none", "Anna went to Rome with Bob Stone")
        assert [item["start"] for item in entities[0]] == [
            entity.start
            for entity in client.entities(
                "Anna went to Rome with Bob Stone", model="ner-bert", aggregation_strategy="none"
            )
        ]
        question, context = record.questions()[1][:2]
        answers = run("answer", "--model", "qa-bert", "--question", question, "--top-k", "2", context)
        assert [item["answer"] for item in answers[0]] == [
            answer.answer for answer in client.answer(question, context, model="qa-bert", top_k=2)
        ]
    ranked = run("rank", "--query", "where", "the mat", "the cat is here")
    assert sorted(item["index"] for item in ranked[0]) == [0, 1]
    fillings = run("fill-mask", "--model", "fill-bert", "--top-k", "2", "the [MASK] sat")
    assert [len(row) for row in fillings] == [2]
    assert cli.main(["classify", "--url", reader_server.grpc_url, "--model", "cls-bert", "hello", "there"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "hello"
    assert "LABEL_" in shown[1]


@pytest.mark.parametrize("name", ["cls-bert", "ner-bert", "qa-bert", "fill-bert", "reranker", "emb-mpnet"])
def test_a_damaged_model_is_refused(
    reader_server: LocalServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The weights of one matmul three percent too large."""
    spec = models_file.parse(name, _tables(folder)[name])
    original = recipes.apply

    def damaged(recipe: Any, kind: Any, graph: Path, *more: Any) -> None:
        model = onnx.load(str(graph))
        tensor = next(t for t in model.graph.initializer if len(t.dims) == 2 and list(t.dims) == [32, 48])
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.03), tensor.name))
        onnx.save(model, str(graph))
        original(recipe, kind, graph, *more)

    monkeypatch.setattr(recipes, "apply", damaged)
    with pytest.raises(FidelityError, match="score_error|max_difference"):
        install.export([spec], tmp_path, tmp_path, tmp_path, lambda message: None)


def test_a_table_of_positions_is_compared_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No text of the corpora reads the last positions; one that is as long as the limit does."""
    folder = tiny_models.make_reader(tmp_path / "hf", "bert", AutoModel, positions=300)
    table = {"task": "feature-extraction", "source": {"path": str(folder)}, "variants": ["fp32"]}
    spec = models_file.parse("m", table | {"limits": {"dimensions": 32, "max_tokens": 300, "threads": 1}})
    said: list[str] = []
    job = tasks.Job(spec, HuggingFaceFolder(folder), tmp_path / "staging", said.append)
    job.staging.mkdir()
    checked = tasks.build(job)
    assert checked.measures["fp32"]["longest_text"] == 300
    assert not [line for line in said if "compared texts have" in line]
    graph = tmp_path / "staging/m_model/1/model.onnx"
    model = onnx.load(str(graph))
    (tensor,) = (t for t in model.graph.initializer if list(t.dims) == [300, 32])
    rows = numpy_helper.to_array(tensor).copy()
    rows[280:] = np.roll(rows[280:], 1, axis=0)
    tensor.CopyFrom(numpy_helper.from_array(rows, tensor.name))
    onnx.save(model, str(graph))
    measured = tasks.evaluate(spec, job.source, job.staging)["fp32"]
    with pytest.raises(FidelityError, match="max_difference is"):
        fidelity.check("feature-extraction", "fp32", measured)
    monkeypatch.setattr(base, "FAR_TOKENS", 240)
    measured = tasks.evaluate(spec, job.source, job.staging)["fp32"]
    fidelity.check("feature-extraction", "fp32", measured)
    assert 180 < measured["longest_text"] <= 240
    assert tasks._uncompared(spec, {"fp32": measured}) == (
        f"compared texts have {measured['longest_text']:.0f} tokens at most, the model takes 300"
    )


@pytest.mark.parametrize(
    ("name", "limits", "message"),
    [
        ("cls-bert", {"labels": 7}, "limits.labels is 7, the model has 3"),
        ("fill-bert", {"top_k": 5000}, "limits.top_k is 5000, the model has 512 tokens"),
        ("emb-mpnet", {"dimensions": 33}, "limits.dimensions is 33, the model's is 32"),
        ("cls-roberta", {"labels": 4, "max_tokens": 129}, "limits.max_tokens is 129, the model's longest text is 128"),
    ],
)
def test_limits_that_are_not_the_models(
    reader_server: LocalServer, folder: Path, tmp_path: Path, name: str, limits: dict[str, int], message: str
) -> None:
    spec = models_file.parse(name, _tables(folder)[name] | {"limits": limits})
    with pytest.raises(ValueError, match=message):
        install.export([spec], tmp_path, tmp_path, tmp_path, lambda message: None)


def test_both_clients_over_grpc_and_http(reader_server: LocalServer, texts: list[str]) -> None:
    short, context = texts[:6], "Ada Lovelace wrote the first program in London."
    entities = {"model": "ner-bert", "aggregation_strategy": "simple"}
    found = doors.answers(
        reader_server,
        lambda client: client.classify(short, model="cls-bert", top_k=3, batch_size=2),
        lambda client: client.classify(short[0], text_pairs=short[1], model="cls-roberta", top_k=4),
        lambda client: client.entities([context, *short], **entities),
        lambda client: client.entities(context, **entities),
        lambda client: client.answer(["Who?", "Where?"], context, model="qa-bert", top_k=2),
        lambda client: client.answer("Who?", context, model="qa-bert", handle_impossible_answer=True),
        lambda client: client.rank("Who?", short, batch_size=4),
        lambda client: client.fill_mask("the [MASK] sat on the [MASK]", model="fill-bert", top_k=3),
        lambda client: client.embed(short, model="emb-xlm-roberta", prompt_name="query"),
    )
    assert [len(answer) for answer in found[:8]] == [6, 4, 7, len(found[2][0]), 2, 1, 6, 2]
    assert found[2][0] == found[3]
