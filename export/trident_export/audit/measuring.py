"""Scores of texts that differ in one word, the gaps between groups, and what a variant changes.

A classifier's score is the probability of a class. A generator's is the log-odds of the favourable end: the
log-probability of the whole text with it, less that with the other end, in nats. The gap of an axis is the distance
between the groups with the highest and the lowest mean score. It is never below 0, so it is judged against what it
would be if the group names were exchanged at random within each sentence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trident_client import Client
from trident_export.audit.cases import Axis, Cases, filled, texts
from trident_export.errors import UsageError
from trident_export.evaluation.intervals import RESAMPLES, resamples

Floats = NDArray[np.float64]
CALLERS = 8
CLASSIFYING = "text-classification"
GENERATING = "text-generation"
TASKS = (CLASSIFYING, GENERATING)


@dataclass(frozen=True)
class Gap:
    """What an axis shows.

    Attributes:
        score: the name of the class, or "log-odds".
        means: of each group, less the mean of all, in the order of the axis.
        value: the distance between the highest and the lowest.
        low, high: where 95 % of the resamples of the sentences lie.
        p: how probable a gap as large is where groups make no difference.
    """

    score: str
    means: dict[str, float]
    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Shift:
    """What a variant changes: of its gap, and of single scores, against the baseline's.

    Attributes:
        gap: the variant's less the baseline's, with its interval.
        largest: the largest change of one group's mean.
    """

    score: str
    gap: float
    low: float
    high: float
    largest: float


def scores(client: Client, task: str, model: str, cases: Cases, axis: Axis) -> dict[str, Floats]:
    """Scores by name, [sentences, groups].

    Raises:
        TridentError: the server refuses a text, or can't be asked.
    """
    width = len(axis.groups)
    if task == CLASSIFYING:
        asked = texts(cases.sentences, axis)
        found = client.classify(asked, model=model, top_k=_classes(client, model))
        names = sorted(label.label for label in found[0])
        rows = [{label.label: label.score for label in labels} for labels in found]
        return {name: np.array([row[name] for row in rows]).reshape(-1, width) for name in names}
    ends = [
        tuple(filled(beginning, group) + end for end in (good, bad))
        for beginning, good, bad in cases.endings
        for group in axis.groups
    ]

    def odds(pair: Sequence[str]) -> float:
        good, bad = (sum(_log_probs(client, model, text)) for text in pair)
        return good - bad

    with ThreadPoolExecutor(CALLERS) as pool:
        return {"log-odds": np.array(list(pool.map(odds, ends))).reshape(-1, width)}


def _classes(client: Client, model: str) -> int:
    """How many classes a model has; the stage that makes them knows, and its variants share it."""
    return int(client.parameters(f"{model.partition('_')[0]}_postprocess").get("labels", 1))


def _log_probs(client: Client, model: str, text: str) -> tuple[float, ...]:
    return client.generate(text, model=model, max_tokens=0, prompt_logprobs=0).prompt_log_probs


def gap(name: str, axis: Axis, found: Floats, count: int = RESAMPLES) -> Gap:
    """The gap of one score, [sentences, groups]."""
    weights = resamples(len(found), count)
    means = weights @ found / len(found)
    low, high = np.quantile(np.ptp(means, axis=1), [0.025, 0.975])
    centred = found.mean(axis=0) - found.mean()
    value = float(np.ptp(centred))
    random = np.random.default_rng(0)
    shuffled = [np.ptp(random.permuted(found, axis=1).mean(axis=0)) for _ in range(count)]
    beyond = int((np.array(shuffled) >= value - 1e-12).sum())
    deviations = {group: float(mean) for group, mean in zip(axis.groups, centred, strict=True)}
    return Gap(name, deviations, value, float(low), float(high), (beyond + 1) / (count + 1))


def shift(name: str, found: Floats, baseline: Floats, count: int = RESAMPLES) -> Shift:
    """What a variant's scores change of the baseline's, both [sentences, groups]."""
    weights = resamples(len(found), count)
    apart = np.ptp(weights @ found / len(found), axis=1) - np.ptp(weights @ baseline / len(found), axis=1)
    low, high = np.quantile(apart, [0.025, 0.975])
    gaps = [float(np.ptp(each.mean(axis=0))) for each in (found, baseline)]
    centred = [each.mean(axis=0) - each.mean() for each in (found, baseline)]
    return Shift(name, gaps[0] - gaps[1], float(low), float(high), float(np.abs(centred[0] - centred[1]).max()))


def audit(
    client: Client, task: str, models: Sequence[str], cases: Cases, baseline: str
) -> tuple[dict[str, dict[str, list[Gap]]], dict[str, dict[str, list[Shift]]]]:
    """Gaps by model and axis, and of the models but the baseline what they change.

    Raises:
        UsageError: a model has other classes than the baseline.
        TridentError: see `scores`.
    """
    gaps: dict[str, dict[str, list[Gap]]] = {model: {} for model in models}
    shifts: dict[str, dict[str, list[Shift]]] = {model: {} for model in models if model != baseline}
    for axis in cases.axes:
        found: Mapping[str, Mapping[str, Any]] = {
            model: scores(client, task, model, cases, axis) for model in (baseline, *shifts)
        }
        for model, by_name in found.items():
            if by_name.keys() != found[baseline].keys():
                raise UsageError(f"{model} has other classes than {baseline}, so they can't be compared")
            gaps[model][axis.name] = [gap(name, axis, each) for name, each in by_name.items()]
            if model != baseline:
                shifts[model][axis.name] = [shift(name, each, found[baseline][name]) for name, each in by_name.items()]
    return gaps, shifts
