"""What a variant gets wrong, measured against Hugging Face in float32, and the gate that refuses it.

Generation: the mean Kullback-Leibler divergence of the next-token distributions (nats), the share of positions with
the same likeliest token, and the largest change of a logit by what else runs with it. Embeddings: the worst cosine
and the largest difference of a number. Other encoders: the share of equal choices and the largest error of a score.
Everything is run by the code that serves: the decoder with its in-place cache (prefill in two chunks, then
one token at a time, several texts at once), the encoder's tokenizer stage and pooling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trident_export.errors import FidelityError
from trident_serving import encoders

Floats = NDArray[np.floating[Any]]

# The measure that says how many tokens the longest text had that was compared with Hugging Face.
LONGEST = "longest_text"
# "at least" where the name is in this set, "at most" elsewhere.
_MINIMUMS = frozenset({"top1", "worst_cosine", "agreement"})

GATES: dict[str, dict[str, dict[str, float]]] = {
    "text-generation": {
        "fp32": {"kl": 1e-4, "top1": 0.99, "batch_effect": 0.0},
        "fp16": {"kl": 1e-3, "top1": 0.97, "batch_effect": 0.0},
        "int8": {"kl": 0.02, "top1": 0.93, "batch_effect": 0.0},
        "int4": {"kl": 0.1, "top1": 0.85, "batch_effect": 0.0},
        # What vLLM computes depends on what else runs, by roundings: its thresholds are those of its numbers.
        "vllm_fp32": {"kl": 1e-4, "top1": 0.99, "batch_effect": 1e-2},
        "vllm_fp16": {"kl": 1e-3, "top1": 0.97, "batch_effect": 0.1},
        "vllm_bf16": {"kl": 1e-2, "top1": 0.94, "batch_effect": 1.0},
    },
    "feature-extraction": {
        "fp32": {"worst_cosine": 0.99999, "max_difference": 1e-5, "batch_effect": 1e-5},
        "int8": {"worst_cosine": 0.99, "batch_effect": 1e-3},
        "int8_static": {"worst_cosine": 0.97, "batch_effect": 1e-3},
        "int4": {"worst_cosine": 0.95, "batch_effect": 1e-3},
    },
}


for _task in ("sparse-embedding", "hybrid-embedding"):
    GATES[_task] = GATES["feature-extraction"] | {
        "fp32": {"worst_cosine": 0.99999, "max_difference": 1e-4, "batch_effect": 1e-4},
        "int8": {"worst_cosine": 0.97, "batch_effect": 1e-2},
    }
for _task in ("translation", "summarization", "automatic-speech-recognition"):
    GATES[_task] = GATES["text-generation"]
# Images, whose numbers do not depend on what runs beside them.
GATES["image-feature-extraction"] = {
    "fp32": {"worst_cosine": 0.99999, "max_difference": 1e-4, "batch_effect": 0.0},
    "int8": {"worst_cosine": 0.99, "batch_effect": 0.0},
    "int4": {"worst_cosine": 0.95, "batch_effect": 0.0},
}
for _task in ("image-classification", "zero-shot-image-classification"):
    GATES[_task] = {
        "fp32": {"agreement": 0.999, "score_error": 1e-4, "batch_effect": 0.0},
        "int8": {"agreement": 0.95, "score_error": 0.15, "batch_effect": 0.0},
        "int4": {"agreement": 0.85, "score_error": 0.5, "batch_effect": 0.0},
    }
for _task in encoders.TASKS.keys() - GATES.keys():
    GATES[_task] = {
        "fp32": {"agreement": 0.999, "score_error": 1e-4, "batch_effect": 1e-4},
        "int8": {"agreement": 0.95, "score_error": 0.15, "batch_effect": 1e-3},
        "int8_static": {"agreement": 0.93, "score_error": 0.25, "batch_effect": 1e-3},
        "int4": {"agreement": 0.85, "score_error": 0.5, "batch_effect": 1e-3},
    }


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    """Log-probabilities over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def compare_logits(
    reference: Sequence[Floats], found: Sequence[Floats], ids: Sequence[Sequence[int]] | None = None
) -> dict[str, float]:
    """`kl`, its 99th percentile, `top1` and the number of `tokens`, over texts of [tokens, vocabulary] logits.

    Args:
        ids: the texts' tokens; with them also the perplexity of both.
    """
    compared = [compare_tokens(expected, actual) for expected, actual in zip(reference, found, strict=True)]
    more = {} if ids is None else {"perplexity": perplexity(found, ids), "hf_perplexity": perplexity(reference, ids)}
    return summary(compared) | more


def compare_tokens(expected: Floats, actual: Floats) -> NDArray[np.float64]:
    """Of each token the divergence, and 1 where the likeliest is the same, [2, tokens].

    Args:
        expected: logits [tokens, vocabulary]; `actual` too.
    """
    p, q = log_softmax(expected), log_softmax(actual)
    return np.stack([(np.exp(p) * (p - q)).sum(axis=-1), expected.argmax(axis=-1) == actual.argmax(axis=-1)])


def summary(compared: Sequence[NDArray[np.float64]]) -> dict[str, float]:
    """`kl`, its 99th percentile, `top1` and the number of `tokens` of texts that `compare_tokens` compared."""
    divergence, same = np.concatenate(compared, axis=1)
    return {
        "kl": float(divergence.mean()),
        "kl_p99": float(np.quantile(divergence, 0.99)),
        "top1": float(same.mean()),
        "tokens": float(divergence.size),
    }


def perplexity(logits: Sequence[Floats], ids: Sequence[Sequence[int]]) -> float:
    """Of texts under their logits, [tokens, vocabulary] each; the first token of a text is given."""
    surprises = [
        -log_softmax(rows[:-1])[np.arange(len(tokens) - 1), list(tokens[1:])]
        for rows, tokens in zip(logits, ids, strict=True)
    ]
    return float(np.exp(np.concatenate(surprises).mean()))


def rank_agreement(reference: Floats, found: Floats) -> float:
    """Spearman's correlation of the similarities of all pairs of texts, for embeddings [texts, dimensions]."""
    pairs = np.triu_indices(len(reference), k=1)
    ranks = []
    for vectors in (reference, found):
        directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        ranks.append(np.argsort(np.argsort((directions @ directions.T)[pairs])))
    return float(np.corrcoef(np.stack(ranks))[0, 1])


def compare_embeddings(reference: Floats, found: Floats) -> dict[str, float]:
    """Cosines, `max_difference` and `rank_agreement` over rows of [texts, dimensions], and the number of `texts`."""
    norms = np.linalg.norm(reference, axis=1) * np.linalg.norm(found, axis=1)
    cosines = (reference * found).sum(axis=1) / norms
    return {
        "worst_cosine": float(cosines.min()),
        "mean_cosine": float(cosines.mean()),
        "rank_agreement": rank_agreement(reference, found),
        "max_difference": float(np.abs(reference - found).max()),
        "texts": float(len(reference)),
    }


def compare_scores(reference: Sequence[Floats], found: Sequence[Floats]) -> dict[str, float]:
    """`agreement`, the share of choices with the same best class, and `score_error`, the largest difference of a score.

    Where some score of the reference is no probability, as a ranker's logits are not, the difference is a share of the
    reference's range, from the smallest score of all texts to the largest.

    Args:
        reference: scores of each text, [choices, classes].
        found: the same; NaN where a class was not named, which is not compared.
    """
    same, errors = [], []
    for expected, actual in zip(reference, found, strict=True):
        expected = expected[:, : actual.shape[1]]
        # A tie within the float32 noise is no disagreement.
        chosen = np.take_along_axis(expected, np.nanargmax(actual, axis=1)[:, None], axis=1)[:, 0]
        same.append(chosen >= expected.max(axis=1) - 1e-6)
        errors.append(float(np.nanmax(np.abs(expected - actual))))
    choices = np.concatenate(same)
    return {
        "agreement": float(choices.mean()),
        "score_error": max(errors) / _score_range(reference),
        "choices": float(choices.size),
    }


def _score_range(scores: Sequence[Floats]) -> float:
    """Of logits from the smallest to the largest; 1 of probabilities, or where all scores are the same."""
    lowest, highest = (float(extreme([extreme(rows) for rows in scores])) for extreme in (np.min, np.max))
    noise = 1e-5  # of a softmax
    if lowest >= 0 and highest <= 1 + noise:
        return 1.0
    return highest - lowest or 1.0


def compare_spans(reference: Sequence[Floats], found: Sequence[Floats], longest: int = 15) -> dict[str, float]:
    """`exact_match` and `f1` of the best span of tokens of each text against the reference's best.

    Args:
        reference: of each text the probabilities to start and to end at a token, [2, tokens].
        found: the same.
        longest: tokens in a span at most.
    """
    exact, overlaps = [], []
    for expected, actual in zip(reference, found, strict=True):
        (start, end), (first, last) = (_best_span(rows, longest) for rows in (expected, actual))
        shared = max(0, min(end, last) - max(start, first) + 1)
        exact.append((start, end) == (first, last))
        overlaps.append(2 * shared / (end - start + 1 + last - first + 1))
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(overlaps))}


def _best_span(rows: Floats, longest: int) -> tuple[int, int]:
    scores = np.outer(rows[0], rows[1])
    allowed = np.triu(np.tril(np.ones_like(scores), longest - 1))
    start, end = np.unravel_index(int((scores * allowed).argmax()), scores.shape)
    return int(start), int(end)


def compare_texts(reference: Sequence[str], found: Sequence[str]) -> dict[str, float]:
    """`bleu`, `chrf` and `rouge_l` of texts against the reference's, 0 to 100; by sacrebleu and rouge-score."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    rouge = [
        1.0 if expected == actual else scorer.score(expected, actual)["rougeL"].fmeasure
        for expected, actual in zip(reference, found, strict=True)
    ]
    return {
        "bleu": float(sacrebleu.corpus_bleu(list(found), [list(reference)], tokenize="char").score),
        "chrf": float(sacrebleu.corpus_chrf(list(found), [list(reference)]).score),
        "rouge_l": 100 * float(np.mean(rouge)),
    }


def mean_match(reference: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> float:
    """Tokens of each answer that are the reference's, up to the first that is not; the mean."""
    matches = []
    for expected, actual in zip(reference, found, strict=True):
        different = [index for index, pair in enumerate(zip(expected, actual, strict=False)) if pair[0] != pair[1]]
        matches.append(different[0] if different else min(len(expected), len(actual)))
    return float(np.mean(matches))


def recall(
    passages: Floats, questions: Floats, found_passages: Floats, found_questions: Floats, best: int = 10
) -> float:
    """Of the `best` passages that the reference puts first for a question, the share that is among the `best` found.

    Args:
        passages: the reference's embeddings, [passages, dimensions], and so on.
    """

    def first(texts: Floats, queries: Floats) -> NDArray[np.intp]:
        directions = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries, texts)]
        return np.argsort(-(directions[0] @ directions[1].T), axis=1)[:, :best]

    pairs = zip(first(passages, questions), first(found_passages, found_questions), strict=True)
    return float(np.mean([len(set(expected) & set(actual)) / len(expected) for expected, actual in pairs]))


def of_adapter(measured: Mapping[str, float], name: str) -> dict[str, float]:
    """Measures of an adapter, under its name beside those of its base: `kl.<name>`."""
    return {f"{measure}.{name}": value for measure, value in measured.items()}


def by_adapter(measured: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Measures of the base, whose name is "", and of each adapter."""
    found: dict[str, dict[str, float]] = {"": {}}
    for key, value in measured.items():
        measure, _, name = key.partition(".")
        found.setdefault(name, {})[measure] = value
    return found


def check(
    task: str,
    variant: str,
    measured: Mapping[str, float],
    overrides: Mapping[str, float] | None = None,
    precision: str = "",
) -> None:
    """Refuse a variant that is beyond its thresholds, with each of its adapters; what is not a number is beyond any.

    Args:
        overrides: thresholds from models.toml, which replace the default ones of the same name.
        precision: whose default thresholds hold (default: the variant's).

    Raises:
        FidelityError: the message says by how much, for each threshold.
    """
    thresholds = {**GATES[task].get(precision or variant, {}), **(overrides or {})}
    if len(parts := by_adapter(measured)) > 1:
        for name, part in parts.items():
            check(task, f"{variant} with adapter {name}" if name else variant, part, thresholds)
        return
    if not thresholds:
        raise FidelityError(
            f"{variant} has no gate for {task}: give its recipe one of the precisions {', '.join(GATES[task])}, "
            "or the model gates of its own"
        )
    unknown = sorted(set(thresholds) - set(measured))
    if unknown:
        raise FidelityError(f"there is no measure {', '.join(unknown)}; measured are {', '.join(measured)}")
    failures = []
    for name, limit in thresholds.items():
        value = measured[name]
        passes = value >= limit if name in _MINIMUMS else value <= limit
        if not passes:
            side = "at least" if name in _MINIMUMS else "at most"
            failures.append(f"{name} is {value:.4g}, must be {side} {limit:g}")
    if failures:
        raise FidelityError(f"{variant} does not compute what Hugging Face computes: {'; '.join(failures)}")
