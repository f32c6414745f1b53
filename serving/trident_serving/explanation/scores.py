"""What of an encoder's outputs is explained: a class, an entity, a rank, an answer. A number of each, for each task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trident_serving.encoders.labels import LabelSettings, activate, softmax
from trident_serving.encoders.zero_shot import InferenceSettings
from trident_serving.errors import InvalidRequest
from trident_serving.explanation.encoders import EncoderStages, Reading, Tensors
from trident_serving.text import decode_texts

Floats = NDArray[Any]
PROBABILITY = "probability"
_NAMED, _LONGEST = 20, 1000  # classes and characters of a message


@dataclass(frozen=True)
class Target:
    """A statement of a model, and its score.

    Attributes:
        of: what it says.
        measure: what the score is.
        score: from the graph's outputs, whole or without a unit.
    """

    of: str
    measure: str
    score: Callable[[Mapping[str, Floats]], float]


def targets(stages: EncoderStages, reading: Reading, whole: Tensors, label: str = "") -> list[Target]:
    """What is explained of a text.

    Args:
        whole: the graph's outputs for all of it.
        label: of a classifier: the class; "": the likeliest. Of entities: only those of this class. Of a masked text:
            the token.

    Raises:
        InvalidRequest: there is no answer to explain, or the model has no such class.
    """
    return _MAKERS[stages.task.name](stages, reading, whole, label)


def _classes(stages: EncoderStages, reading: Reading, whole: Tensors, label: str) -> list[Target]:
    settings = LabelSettings.load(stages.answers_folder)

    def scores(outputs: Mapping[str, Floats]) -> Floats:
        return activate(outputs["logits"][0], settings.activation)

    chosen = _index(settings.labels, label) if label else int(scores(whole).argmax())
    return [Target(settings.labels[chosen], PROBABILITY, lambda outputs: float(scores(outputs)[chosen]))]


def _index(labels: Sequence[str], label: str) -> int:
    if label not in labels:
        known = ", ".join(labels[:_NAMED]) + (" ..." if len(labels) > _NAMED else "")
        raise InvalidRequest(f"there is no class {label[:80]!r}; the model has {known}"[:_LONGEST])
    return labels.index(label)


def _rank(stages: EncoderStages, reading: Reading, whole: Tensors, label: str) -> list[Target]:
    settings = LabelSettings.load(stages.answers_folder)
    return [Target("score", "score", lambda outputs: float(activate(outputs["logits"][0], settings.activation)[0]))]


def _entities(stages: EncoderStages, reading: Reading, whole: Tensors, label: str) -> list[Target]:
    """Each entity's score: the mean over its tokens of the probability of its class, beginning or not."""
    settings = LabelSettings.load(stages.answers_folder)
    kinds = [_kind(name) for name in settings.labels]
    if label:
        _index(sorted({*kinds}), label)
    found = stages.answer(reading, whole)
    text = reading.texts["text_input"]
    shown = reading.stage["token_spans"]  # each token in one window

    def target(kind: str, start: int, end: int) -> Target:
        inside = (shown[..., 0] >= start) & (shown[..., 1] <= end) & (shown[..., 0] >= 0)
        columns = [column for column, each in enumerate(kinds) if each == kind]

        def score(outputs: Mapping[str, Floats]) -> float:
            # A token that was removed has no class.
            scores = np.nan_to_num(softmax(outputs["logits"][inside])[:, columns].sum(axis=-1))
            return float(scores.mean())

        return Target(f"{kind}: {text[start:end]}", PROBABILITY, score)

    rows = zip(found["entity"][0], found["start"][0].tolist(), found["end"][0].tolist(), strict=True)
    spans = [(_kind(name.decode()), start, end) for name, start, end in rows if start >= 0]
    return [target(*span) for span in spans if label in ("", span[0])]


def _kind(label: str) -> str:
    return label[2:] if label[:2] in ("B-", "I-") else label


def _answer(stages: EncoderStages, reading: Reading, whole: Tensors, label: str) -> list[Target]:
    """The best answer's score: the probabilities of its first and its last token, multiplied, of all such tokens."""
    found = stages.answer(reading, whole)
    if not found["start"].size or found["start"][0, 0] < 0:
        raise InvalidRequest("the model finds no answer in the context: ask something else")
    start, end = int(found["start"][0, 0]), int(found["end"][0, 0])
    spans = reading.stage["token_spans"]
    allowed = spans[..., 0] >= 0
    of_words = np.where(spans[..., 2:] >= 0, spans[..., 2:], spans[..., :2])  # as answers grow to whole words
    first, last = (allowed & (of_words[..., side] == edge) for side, edge in ((0, start), (1, end)))

    def score(outputs: Mapping[str, Floats]) -> float:
        begins, ends = (
            softmax(np.where(allowed & ~np.isnan(outputs[name]), outputs[name], -10000.0)) * chosen
            for name, chosen in (("start_logits", first), ("end_logits", last))
        )
        before = np.cumsum(begins, axis=-1)  # no answer ends before it begins
        return float((before * ends).sum())

    return [Target(reading.texts["context"][start:end], PROBABILITY, score)]


def _zero_shot(stages: EncoderStages, reading: Reading, whole: Tensors, label: str) -> list[Target]:
    """The score of a label as it is served: by itself, or beside the others."""
    settings = InferenceSettings.load(stages.answers_folder)
    names = decode_texts(reading.request["candidate_labels"], "candidate_labels")
    alone = "multi_label" in reading.request or len(names) == 1

    def scores(outputs: Mapping[str, Floats]) -> Floats:
        if alone:
            return softmax(outputs["logits"][:, [settings.contradiction, settings.entailment]])[:, 1]
        return softmax(outputs["logits"][:, settings.entailment])

    chosen = _index(names, label) if label else int(scores(whole).argmax())
    return [Target(names[chosen], PROBABILITY, lambda outputs: float(scores(outputs)[chosen]))]


def _fillings(stages: EncoderStages, reading: Reading, whole: Tensors, label: str) -> list[Target]:
    """The probability of a token at each mask: the likeliest one, or a token that is named.

    The graph gives its likeliest tokens only. One that is not among them counts as the last of those.
    """
    tokenizer = stages.tokenizer
    ids = reading.stage["input_ids"][0]
    gaps = [at for at, span in enumerate(reading.tokens[0]) if span is None and ids[at] == stages.mask_token_id]
    if not gaps:
        token = None if stages.mask_token_id is None else tokenizer.id_to_token(stages.mask_token_id)
        raise InvalidRequest(f"text_input has no gap to fill: write {token} in its place")
    named = None
    if label:
        inside = tokenizer.encode(label, add_special_tokens=False).ids
        named = tokenizer.token_to_id(label) if len(inside) != 1 else inside[0]
        if named is None:
            raise InvalidRequest(f"label must be one token of the model, {label[:80]!r} is {len(inside)}")

    def target(gap: int, token: int, text: str) -> Target:
        def score(outputs: Mapping[str, Floats]) -> float:
            tops, scores = outputs["top_ids"][0, gap], outputs["top_scores"][0, gap]
            (places,) = np.nonzero(tops == token)
            best = scores[places[0]] if places.size else scores.min()
            return float(np.exp(best - outputs["log_normalizer"][0, gap]))

        return Target(text, PROBABILITY, score)

    tokens = whole["top_ids"][0, gaps, 0].tolist() if named is None else [named] * len(gaps)
    texts = [tokenizer.decode([token], skip_special_tokens=False) for token in tokens]
    return [target(*each) for each in zip(gaps, tokens, texts, strict=True)]


_MAKERS: Mapping[str, Callable[[EncoderStages, Reading, Tensors, str], list[Target]]] = {
    "text-classification": _classes,
    "token-classification": _entities,
    "text-ranking": _rank,
    "question-answering": _answer,
    "zero-shot-classification": _zero_shot,
    "fill-mask": _fillings,
}
