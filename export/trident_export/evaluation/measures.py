"""What answers are worth. A measure is statistics of each example, and a figure that comes from their sums.

So a figure over any choice of examples, which a bootstrap makes thousands of, costs one product of matrices. Texts:
sacrebleu (BLEU, chrF, TER), rouge-score, nltk (METEOR), jiwer (word error rate). Questions: SQuAD's exact match and F1
of words. Search: nDCG with the gain of TREC's evaluation, which is the grade itself.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trident_export.evaluation.datasets import Dataset

Floats = NDArray[np.float64]
_LARGEST = 700.0  # whose exponential a float holds
BEST = 10  # passages that a search is judged by


@dataclass(frozen=True)
class Measure:
    """One measure of one model.

    Attributes:
        rows: statistics, [examples, n].
        figure: makes the figure from the rows' sum, [n].
        higher: whether more is better.
    """

    name: str
    rows: Floats
    figure: Callable[[Floats], float]
    higher: bool = True

    @property
    def value(self) -> float:
        """Over all examples."""
        return self.figure(self.rows.sum(axis=0))


def of(data: Dataset, answers: Sequence[Any]) -> list[Measure]:
    """All measures for answers of a dataset's kind; see `asking.answers`."""
    kinds: dict[str, Callable[[list[Any], Sequence[Any]], list[Measure]]] = {
        "text": texts,
        "perplexity": lambda _, found: perplexity(found),
        "label": labels,
        "entities": lambda expected, found: entities([_spans(each) for each in expected], found),
        "answers": spans_of_text,
        "search": search,
    }
    return kinds[data.kind]([example.expected for example in data.examples], answers)


def _mean(name: str, values: Sequence[float], scale: float = 1.0, *, higher: bool = True) -> Measure:
    rows = np.array([[value, 1.0] for value in values])
    return Measure(name, rows, lambda sums: scale * float(sums[0] / sums[1]), higher)


def _ratio(name: str, pairs: Sequence[tuple[float, float]], scale: float = 1.0, *, higher: bool = True) -> Measure:
    return Measure(name, np.array(pairs, float), lambda sums: scale * _quotient(sums[0], sums[1]), higher)


def _quotient(above: float, below: float) -> float:
    return float(above / below) if below else 0.0


def texts(references: Sequence[Sequence[str]], found: Sequence[str]) -> list[Measure]:
    """Of free texts, each with one or several references; 0 to 100, but exact_match and f1."""
    import jiwer
    from rouge_score.rouge_scorer import RougeScorer

    kinds = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}
    scorer = RougeScorer([*kinds])
    rouge = [
        {name: max(scorer.score(each, answer)[name].fmeasure for each in right) for name in kinds}
        for right, answer in zip(references, found, strict=True)
    ]

    def errors(right: Sequence[str], answer: str) -> tuple[float, float]:
        """Wrong words and words of the reference that has the fewest wrong ones."""
        return min(
            (_wrong(jiwer.process_words(each, answer)) if each.split() else (len(answer.split()), 0) for each in right),
            key=lambda pair: (pair[0] / max(pair[1], 1), pair),
        )

    return [
        *_sacrebleu(references, found),
        *(_mean(title, [each[name] for each in rouge], 100) for name, title in kinds.items()),
        _meteor(references, found),
        _ratio("wer", [errors(*pair) for pair in zip(references, found, strict=True)], 100, higher=False),
        *spans_of_text(references, found),
    ]


class _NoSynonyms:
    """In place of WordNet, whose files nltk downloads."""

    def synsets(self, word: str) -> tuple[()]:
        """Of a word: none."""
        return ()


def _meteor(references: Sequence[Sequence[str]], found: Sequence[str]) -> Measure:
    """Nltk's METEOR of 2007 with two of its three modules: equal words, and equal stems of English words."""
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.translate.meteor_score import meteor_score

    words = NLTKWordTokenizer().tokenize
    scores = [
        meteor_score([words(each) for each in right], words(answer), wordnet=_NoSynonyms())
        for right, answer in zip(references, found, strict=True)
    ]
    return _mean("meteor_stem", scores, 100)


def _wrong(output: Any) -> tuple[float, float]:
    return (
        output.substitutions + output.deletions + output.insertions,
        output.hits + output.substitutions + output.deletions,
    )


def _sacrebleu(references: Sequence[Sequence[str]], found: Sequence[str]) -> list[Measure]:
    """Its corpus scores; the statistics of a text are what it adds up itself."""
    from sacrebleu.metrics import BLEU, CHRF, TER

    most = max(map(len, references))
    columns = [[each[row] if row < len(each) else None for each in references] for row in range(most)]
    kinds = {"bleu": BLEU(), "chrf": CHRF(), "chrf++": CHRF(word_order=2), "ter": TER()}
    measures = []
    for name, metric in kinds.items():
        rows = np.array(metric._extract_corpus_statistics(list(found), columns), float)

        def figure(sums: Floats, metric: Any = metric) -> float:
            counts = sums.round().astype(int).tolist() if not isinstance(metric, TER) else sums.tolist()
            return float(metric._compute_score_from_stats(counts).score)

        measures.append(Measure(name, rows, figure, name != "ter"))
    return measures


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _normalized(text: str) -> list[str]:
    """Words as SQuAD compares them: without case, punctuation and English articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(expected: str, answer: str) -> float:
    right, given = _normalized(expected), _normalized(answer)
    if not right or not given:
        return float(right == given)
    shared = sum((Counter(right) & Counter(given)).values())
    return 2 * shared / (len(right) + len(given))


def spans_of_text(references: Sequence[Sequence[str]], found: Sequence[str]) -> list[Measure]:
    """`exact_match` and `f1` with the reference that is nearest; no reference: "" is right. 0 to 1."""
    pairs = [(right or [""], answer) for right, answer in zip(references, found, strict=True)]
    exact = [max(float(_normalized(each) == _normalized(answer)) for each in right) for right, answer in pairs]
    return [
        _mean("exact_match", exact),
        _mean("f1", [max(_f1(each, answer) for each in right) for right, answer in pairs]),
    ]


def perplexity(found: Sequence[Sequence[float]]) -> list[Measure]:
    """Of texts, from the log-probabilities of their tokens."""
    rows = np.array([[-sum(each), len(each)] for each in found], float)

    def figure(sums: Floats) -> float:
        return math.exp(min(sums[0] / sums[1], _LARGEST))

    return [Measure("perplexity", rows, figure, higher=False)]


def labels(expected: Sequence[str], found: Sequence[str]) -> list[Measure]:
    """`accuracy`, and `macro_f1`: the mean over the classes that occur, as references or as answers. 0 to 1."""
    names = sorted({*expected, *found})
    place = {name: index for index, name in enumerate(names)}
    rows = np.zeros((len(expected), 3, len(names)))  # right, given, wanted
    for row, (right, answer) in zip(rows, zip(expected, found, strict=True), strict=True):
        row[0, place[right]] += right == answer
        row[1, place[answer]] += 1
        row[2, place[right]] += 1

    def macro(sums: Floats) -> float:
        right, given, wanted = sums.reshape(3, -1)
        occurs = given + wanted > 0
        return float(np.mean(2 * right[occurs] / (given + wanted)[occurs]))

    accuracy = _mean("accuracy", [float(a == b) for a, b in zip(expected, found, strict=True)])
    return [accuracy, Measure("macro_f1", rows.reshape(len(rows), -1), macro)]


Spans = set[tuple[str, int, int]]


def _spans(entities: Sequence[dict[str, Any]]) -> Spans:
    return {(each["entity"], each["start"], each["end"]) for each in entities}


def entities(expected: Sequence[Spans], found: Sequence[Spans]) -> list[Measure]:
    """`precision`, `recall` and `f1` of entities with the same class and place; 0 to 1."""
    pairs = list(zip(expected, found, strict=True))
    shared = [len(right & given) for right, given in pairs]
    return [
        _ratio("precision", [(both, len(given)) for both, (_, given) in zip(shared, pairs, strict=True)]),
        _ratio("recall", [(both, len(right)) for both, (right, _) in zip(shared, pairs, strict=True)]),
        _ratio("f1", [(2 * both, len(right) + len(given)) for both, (right, given) in zip(shared, pairs, strict=True)]),
    ]


def search(expected: Sequence[Sequence[int] | dict[str, float]], found: Sequence[Sequence[int]]) -> list[Measure]:
    """`ndcg@10`, `recall@10` and `mrr@10` of orders of passages; 0 to 1."""
    gains, recalls, ranks = [], [], []
    for right, order in zip(expected, found, strict=True):
        graded = right if isinstance(right, dict) else dict.fromkeys(map(str, right), 1.0)
        grades = {int(index): float(grade) for index, grade in graded.items()}
        relevant = {index for index, grade in grades.items() if grade > 0}
        best = list(order[:BEST])
        ideal = _discounted(sorted(grades.values(), reverse=True)[:BEST])
        gains.append(_quotient(_discounted([grades.get(index, 0.0) for index in best]), ideal))
        recalls.append(_quotient(len(relevant & set(best)), len(relevant)))
        ranks.append(next((1 / place for place, index in enumerate(best, 1) if index in relevant), 0.0))
    return [_mean(f"{name}@{BEST}", each) for name, each in (("ndcg", gains), ("recall", recalls), ("mrr", ranks))]


def _discounted(grades: Sequence[float]) -> float:
    return sum(grade / math.log2(place + 1) for place, grade in enumerate(grades, 1))
