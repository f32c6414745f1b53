"""Evaluation against references: files, measures and how sure they are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import sacrebleu
from sklearn.metrics import accuracy_score, f1_score, ndcg_score

from trident_client import Answer, Client
from trident_export.errors import TextError
from trident_export.evaluation import asking, datasets, intervals, measures, report
from trident_export.evaluation.measures import Measure

REFERENCES = [["the cat sat on the mat", "a cat was on the mat"], ["It is raining."], ["Hello, world!"], ["a b c d e"]]
FOUND = ["the cat sat on mat", "it rains", "Hello world", "a b c d e"]


def written(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def by_name(found: list[Measure]) -> dict[str, float]:
    return {measure.name: measure.value for measure in found}


def test_examples_are_read_with_options(tmp_path: Path) -> None:
    lines = [
        {"id": 7, "text_input": "a", "references": ["b"], "target_lang": "de"},
        {"text_input": "c", "references": ["d"]},
    ]
    file = written(tmp_path / "data.jsonl", *lines)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n") + b"\n")
    data = datasets.read(file, "translation")
    first, second = data.examples
    assert (data.kind, first.asked, first.expected, first.options) == (
        "text",
        {"text_input": "a"},
        ["b"],
        {"target_lang": "de"},
    )
    assert (second.line, second.options) == (2, {})
    pair = {"text_input": "a", "text_pair": "b", "label": "x"}
    (one,) = datasets.read(written(tmp_path / "pair.jsonl", pair), "text-classification").examples
    assert one.asked == {"text_input": "a", "text_pair": "b"}


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("translation", {"text_input": "a"}, "line 1 has the keys text_input; needed are text_input, references"),
        (
            "text-generation",
            {},
            "has the keys of nothing; needed are text_input, references or messages, references or text",
        ),
        ("translation", {"text_input": "", "references": ["a"]}, 'has text_input "", which must be a text'),
        ("translation", {"text_input": "a", "references": "b"}, 'has references "b", which must be a list of texts'),
        ("text-classification", {"text_input": "a", "label": 3}, "has label 3, which must be the name of a class"),
        (
            "zero-shot-classification",
            {"text_input": "a", "candidate_labels": ["b"], "label": "c"},
            "none of its candidate",
        ),
        (
            "token-classification",
            {"text_input": "a", "entities": [{"entity": "x", "start": 1, "end": 1}]},
            "start before",
        ),
        (
            "token-classification",
            {"text_input": "a", "entities": [{"entity": "x", "start": 0, "end": 9}]},
            "ends at 9, and",
        ),
        (
            "text-ranking",
            {"query": "a", "passages": ["b"], "relevant": [1]},
            "names passage 1, and there are 1, counted",
        ),
        ("text-ranking", {"query": "a", "passages": ["b"], "relevant": []}, "names no relevant passage"),
        ("text-ranking", {"query": "a", "passages": ["b"], "relevant": {"0": -1}}, "must be a list of indices, or an"),
        ("text-ranking", {"query": "a", "passages": ["b"], "relevant": {"\u00b2": 1}}, "must be a list of indices, or"),
        ("text-ranking", {"query": "a", "passages": ["b"], "relevant": {"9" * 5000: 1}}, "must be a list of indices"),
        ("text-ranking", {"query": "a", "passages": ["b"], "relevant": {"0": math.inf}}, "must be a list of indices"),
        ("text-ranking", {"query": "a", "passages": ["b"], "relevant": {"0": 0}}, "names no relevant passage"),
        ("fill-mask", {}, "fill-mask models have no evaluation against references"),
    ],
)
def test_a_line_that_can_not_be_used(tmp_path: Path, task: str, line: Any, message: str) -> None:
    with pytest.raises(TextError, match=message):
        datasets.read(written(tmp_path / "data.jsonl", line), task)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no example: give it a JSON object in each line"),
        (b"\n \n", "has no example"),
        (
            '{"text": "a"}\n{"text": "Gr\u00fc\u00dfe"}'.encode("latin-1"),
            "is no text in UTF-8, line 2 has the byte 0xfc",
        ),
        ('{"text": "a"}'.encode("utf-16"), "is no text in UTF-8, line 1 has the byte 0xff"),
        (b'{"text": "a"', "line 1 is no JSON"),
        (b"[" * 100_000, "line 1 is no JSON"),
        (b"[1]", "line 1 is no JSON object"),
        (
            b'{"text": "a"}\n{"text_input": "a", "references": ["b"]}',
            "examples with references and others to be scored",
        ),
    ],
)
def test_a_file_that_can_not_be_used(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(TextError, match=message):
        datasets.read(tmp_path / "data", "text-generation")
    with pytest.raises(TextError, match="can't be read: No such file"):
        datasets.read(tmp_path / "none", "text-generation")


def test_texts_are_measured_as_sacrebleu_does() -> None:
    found = by_name(measures.texts(REFERENCES, FOUND))
    columns = [[each[row] if row < len(each) else None for each in REFERENCES] for row in range(2)]
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(FOUND, columns).score)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(FOUND, columns).score)
    assert found["chrf++"] == pytest.approx(sacrebleu.corpus_chrf(FOUND, columns, word_order=2).score)
    assert found["ter"] == pytest.approx(sacrebleu.corpus_ter(FOUND, columns).score)
    # Wrong words: one left out of six; "it rains" for "It is raining." 3 of 3; "Hello," and "world!" 2 of 2; none of 5.
    assert found["wer"] == pytest.approx(100 * (1 + 3 + 2 + 0) / (6 + 3 + 2 + 5))
    assert found["exact_match"] == 0.75  # without case, punctuation and articles
    assert found["rouge_l"] == pytest.approx(100 * (10 / 11 + 2 / 5 + 1 + 1) / 4)


def test_meteor_of_words_and_stems() -> None:
    """By hand: three words in a row of the reference's five are found, one by its stem; synonyms are other words."""
    mean = 0.6 / (0.9 + 0.1 * 0.6)  # precision 1, recall 0.6
    score = 100 * mean * (1 - 0.5 * (1 / 3) ** 3)
    references = [["the cat sat on mats", "dogs"], ["a film"], ["a film"]]
    found = by_name(measures.texts(references, ["The cats sat", "movies", ""]))["meteor_stem"]
    assert found == pytest.approx(score / 3)


def test_questions_without_an_answer() -> None:
    found = by_name(measures.spans_of_text([[], ["The Seine"], ["Paris, France"]], ["", "the  seine!", "Paris"]))
    assert found == {"exact_match": pytest.approx(2 / 3), "f1": pytest.approx((1 + 1 + 2 / 3) / 3)}
    assert by_name(measures.spans_of_text([[]], ["Paris"])) == {"exact_match": 0, "f1": 0}


def test_classes_are_measured_as_scikit_learn_does() -> None:
    random = np.random.default_rng(0)
    expected = [f"class {each}" for each in random.integers(0, 4, 60)]
    found = [f"class {each}" for each in random.integers(0, 5, 60)]
    measured = by_name(measures.labels(expected, found))
    assert measured["accuracy"] == pytest.approx(accuracy_score(expected, found))
    assert measured["macro_f1"] == pytest.approx(f1_score(expected, found, average="macro"))


def test_entities() -> None:
    expected = [{("PER", 0, 4), ("LOC", 8, 12)}, {("PER", 3, 5)}, set()]
    found = [{("PER", 0, 4), ("LOC", 8, 11)}, set(), {("PER", 0, 1)}]
    assert by_name(measures.entities(expected, found)) == {
        "precision": pytest.approx(1 / 3),
        "recall": pytest.approx(1 / 3),
        "f1": pytest.approx(1 / 3),
    }


def test_searches_are_measured_as_scikit_learn_does() -> None:
    grades = [[0.0, 3.0, 0.0, 1.0, 2.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
    orders = [[0, 4, 1, 2, 3, 5], [5, 4, 0, 1, 2, 3]]
    scores = np.zeros((2, 6))
    for row, order in zip(scores, orders, strict=True):
        row[order] = np.arange(6, 0, -1)
    relevant = [{str(index): grade for index, grade in enumerate(row)} for row in grades]
    measured = by_name(measures.search(relevant, orders))
    assert measured["ndcg@10"] == pytest.approx(ndcg_score(np.array(grades), scores, k=10))
    assert measured["mrr@10"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert by_name(measures.search([[1]], [list(range(20, 0, -1))]))["recall@10"] == 0


def test_perplexity_weighs_tokens() -> None:
    (measure,) = measures.perplexity([[math.log(0.5)] * 3, [math.log(0.125)]])
    assert measure.value == pytest.approx(math.exp((3 * math.log(2) + math.log(8)) / 4))
    assert measures.perplexity([[-2000.0]])[0].value == pytest.approx(math.exp(700))  # and no OverflowError


def test_an_interval_is_as_wide_as_it_should_be() -> None:
    """Of a share, whose standard error is known."""
    values = [1.0] * 300 + [0.0] * 100
    (measure, _) = measures.labels(["a"] * 400, ["a" if value else "b" for value in values])
    found = intervals.interval(measure, intervals.resamples(400))
    error = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert found.value == 0.75
    assert (found.low, found.high) == (pytest.approx(0.75 - error, abs=0.006), pytest.approx(0.75 + error, abs=0.006))


def test_differences_between_models() -> None:
    random = np.random.default_rng(1)
    right = random.random(400) < 0.8
    noise, worse = random.random(400) < 0.02, random.random(400) < 0.1

    def accuracy(found: np.ndarray) -> Measure:
        return measures.labels(["a"] * 400, ["a" if each else "b" for each in found])[0]

    weights = intervals.resamples(400)
    same = intervals.difference(accuracy(right), accuracy(right), weights)
    assert (same.interval, same.p) == (intervals.Interval(0, 0, 0), 1)
    swapped = intervals.difference(accuracy(right ^ noise), accuracy(right), weights)
    clear = intervals.difference(accuracy(right & ~worse), accuracy(right), weights)
    assert swapped.p > 0.05
    assert clear.p < 0.01
    assert clear.interval.high < 0
    assert intervals.holm([0.01, 0.04, 0.03]) == [pytest.approx(0.03), pytest.approx(0.06), pytest.approx(0.06)]


def test_many_examples_take_two_bytes_for_each_resample() -> None:
    """As one draw of all resamples gives them."""
    found = intervals.resamples(300, 250)
    drawn = np.random.default_rng(0).multinomial(300, np.full(300, 1 / 300), size=250)
    assert found.nbytes == 2 * 300 * 250
    np.testing.assert_array_equal(found, drawn)
    (measure, _) = measures.labels(["a"] * 300, ["a" if index % 3 else "b" for index in range(300)])
    shares = drawn @ measure.rows[:, 0] / 300
    low, high = np.quantile(shares, [0.025, 0.975])
    assert intervals.interval(measure, found) == intervals.Interval(200 / 300, pytest.approx(low), pytest.approx(high))


@pytest.mark.parametrize("task", ["labels", "spans_of_text"])
@pytest.mark.parametrize(("examples", "p"), [(1, 1.0), (3, 0.25), (7, 2**-6)])
def test_few_examples_show_little(task: str, examples: int, p: float) -> None:
    """All of them are right by one model and wrong by the other, so that all resamples say the same."""
    right, wrong = ["a"] * examples, ["b"] * examples
    expected: Any = right if task == "labels" else [[each] for each in right]
    found, base = (getattr(measures, task)(expected, each)[0] for each in (wrong, right))
    assert intervals.difference(found, base, intervals.resamples(examples)).p == pytest.approx(p)


class Asked:
    """A client that keeps the options of the questions that it is asked."""

    def __init__(self) -> None:
        self.options: list[dict[str, Any]] = []

    def answer(self, question: str, context: str, *, model: str, **options: Any) -> list[Answer]:
        self.options.append(options)
        return []


@pytest.mark.parametrize("none", [[], [""]])
def test_a_model_is_not_told_which_questions_have_no_answer(tmp_path: Path, none: list[str]) -> None:
    lines = [{"question": "a?", "context": "b c", "answers": each} for each in (["b"], none)]
    for count, wanted in ((2, {"handle_impossible_answer": True}), (1, {})):
        data = datasets.read(written(tmp_path / "data.jsonl", *lines[:count]), "question-answering")
        client = Asked()
        asking.answers(cast("Client", client), "question-answering", "m", data)
        assert client.options == [wanted] * count


def test_how_often_no_difference_is_called_one() -> None:
    """Of models that err equally often, one in twenty pairs is told apart at p < 0.05."""
    random = np.random.default_rng(2)
    weights = intervals.resamples(100, 400)
    told = 0
    for _ in range(200):
        pair = [measures._mean("accuracy", (random.random(100) < 0.7).astype(float).tolist()) for _ in range(2)]
        told += intervals.difference(pair[0], pair[1], weights).p < 0.05
    assert 2 <= told <= 20


def test_the_report_says_what_is_better_and_what_is_not(tmp_path: Path) -> None:
    interval = intervals.Interval(-0.1, -0.15, -0.05)
    figures = {name: {"accuracy": intervals.Interval(0.8, 0.7, 0.9), "wer": interval} for name in ("m", "m_int8")}
    worse, unclear = intervals.Difference(interval, 0.001), intervals.Difference(interval, 0.2)
    found = {
        "dataset": "d.jsonl",
        "examples": 9,
        "task": "text-classification",
        "baseline": "m",
        "higher_is_better": {"accuracy": True, "wer": False},
        "models": figures,
        "differences": {"m_int8": {"accuracy": worse, "wer": worse}},
    }
    table = report.write(found, tmp_path)
    assert "| m_int8 | accuracy | -0.1 [-0.15, -0.05] | 0.0010 | worse |" in table
    assert "| m_int8 | wer | -0.1 [-0.15, -0.05] | 0.0010 | better |" in table
    assert "no difference shown" in report.as_table(found | {"differences": {"m_int8": {"accuracy": unclear}}})
    kept = json.loads((tmp_path / "evaluation.json").read_text())
    assert kept["differences"]["m_int8"]["accuracy"] == {
        "interval": {"value": -0.1, "low": -0.15, "high": -0.05},
        "p": 0.001,
    }


def test_a_field_that_a_task_does_not_have_is_named(tmp_path: Path) -> None:
    data = datasets.read(
        written(tmp_path / "data.jsonl", {"text_input": "a", "label": "b", "colour": 1}), "text-classification"
    )
    with Client("127.0.0.1:9") as client, pytest.raises(TextError, match=r"line 1: m takes no field 'colour'$"):
        asking.answers(client, "text-classification", "m", data)
