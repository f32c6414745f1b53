"""Zero-shot classification: a model of natural language inference says which of a request's labels follow from a text.

Each text is paired with a sentence for each label, and every pair is a row of the graph; the algorithm is that of the
transformers pipeline. Reference: transformers, `ZeroShotClassificationPipeline`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trident_serving.encoders.labels import softmax
from trident_serving.encoders.task import ENCODING, PAIR, TRUNCATE, EncoderTask, Stage, Tensor, Tensors, flag
from trident_serving.encoders.tokens import EncodingSettings, TextEncoder
from trident_serving.errors import InvalidRequest
from trident_serving.schema import reading
from trident_serving.schema.reading import read_parameters
from trident_serving.text import decode_texts, numbered

DEFAULT_TEMPLATE = "This example is {}."
_SETTINGS = "inference.json"


@dataclass(frozen=True)
class InferenceSettings:
    """Which of a model's logits say that a sentence follows, and that it is contradicted; `inference.json`."""

    entailment: int
    contradiction: int

    @classmethod
    def load(cls, folder: Path) -> InferenceSettings:
        """Read `folder/inference.json`."""
        return reading.load(cls, folder / _SETTINGS)

    def save(self, folder: Path) -> None:
        """Write `folder/inference.json`."""
        reading.save(self, folder / _SETTINGS)


def hypothesis(template: str, label: str) -> str:
    """The sentence for a label.

    Raises:
        InvalidRequest: the template has not exactly one {}.
    """
    before, found, after = template.partition("{}")
    if not found or {"{", "}"} & {*before, *after}:
        raise InvalidRequest(f"hypothesis_template must have one {{}}, where the label goes, found {template[:80]!r}")
    return before + label + after


def _read(folder: Path, parameters: Mapping[str, str]) -> Stage:
    settings = read_parameters(EncodingSettings, parameters)
    encoder = TextEncoder.load(folder, settings)
    max_pairs = int(parameters["max_pairs"])

    def preprocess(tensors: Tensors) -> Tensors:
        texts, labels = (
            decode_texts(tensors[name], name, settings.max_bytes) for name in ("text_input", "candidate_labels")
        )
        template = DEFAULT_TEMPLATE
        if "hypothesis_template" in tensors:
            template = decode_texts(tensors["hypothesis_template"][:1], "hypothesis_template", settings.max_bytes)[0]
        if not texts or not labels:
            raise InvalidRequest(f"there are {len(texts)} texts and {len(labels)} labels: give one of each at least")
        if len(texts) * len(labels) > max_pairs:
            raise InvalidRequest(
                f"text_input and candidate_labels make {len(texts)} x {len(labels)} pairs, the limit is {max_pairs}: "
                "give fewer labels, or fewer texts at once"
            )
        names = numbered("text_input", len(texts)), numbered("candidate_labels", len(labels))
        for name, label in zip(names[1], labels, strict=True):
            if not label.strip():
                raise InvalidRequest(f"{name} is empty: {label[:80]!r} names no class")
        pairs = [(text, hypothesis(template, label)) for text in texts for label in labels]
        return encoder.encode(
            *map(list, zip(*pairs, strict=True)),
            names=[(text, label) for text in names[0] for label in names[1]],
            truncate=flag(tensors, "truncate"),
            cut="only_first",
        )

    return preprocess


def _load(folder: Path, parameters: Mapping[str, str]) -> Stage:
    settings = InferenceSettings.load(folder)

    def postprocess(tensors: Tensors) -> Tensors:
        labels = tensors["candidate_labels"].reshape(-1)
        logits = tensors["logits"].reshape(-1, len(labels), tensors["logits"].shape[-1])
        if flag(tensors, "multi_label") or len(labels) == 1:
            scores = softmax(logits[..., [settings.contradiction, settings.entailment]])[..., 1]
        else:
            scores = softmax(logits[..., settings.entailment])
        order = scores.argsort(axis=-1)[:, ::-1]
        return {"label": labels[order], "score": np.take_along_axis(scores, order, axis=-1)}

    return postprocess


TASK = EncoderTask(
    name="zero-shot-classification",
    texts=(Tensor("text_input", "STRING", (-1,)), Tensor("candidate_labels", "STRING", (-1,))),
    options=(TRUNCATE, Tensor("hypothesis_template", "STRING", (1,))),
    model_inputs=PAIR,
    model_outputs=(Tensor("logits", "FP32", ("labels",)),),
    read=("candidate_labels", "logits"),
    answer_options=(Tensor("multi_label", "BOOL", (1,)),),
    answers=(Tensor("label", "STRING", (-1, -1)), Tensor("score", "FP32", (-1, -1))),
    batched=False,
    parameters={**ENCODING, "max_pairs": "max_batch_size"},
    preprocess=_read,
    postprocess=_load,
)
