"""Classes of a text, or of a pair of texts, the likeliest first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from trident_serving.encoders.labels import LabelSettings, activate, best
from trident_serving.encoders.task import PAIR, SCORE, TEXT, TOP_K, TRUNCATE, EncoderTask, Stage, Tensor, Tensors, count
from trident_serving.encoders.tokens import read_texts


def best_labels(folder: Path, parameters: Mapping[str, str]) -> Stage:
    """The postprocess stage of classifiers: `top_k` labels with their scores and numbers, the likeliest first."""
    settings = LabelSettings.load(folder)
    labels = np.array([label.encode() for label in settings.labels], np.object_)

    def postprocess(tensors: Tensors) -> Tensors:
        top_k = count(tensors, "top_k", 1, len(labels), "the model's labels")
        indices, scores = best(activate(tensors["logits"], settings.activation), top_k)
        return {"label": labels[indices], "score": scores, "label_id": indices.astype(np.int32)}

    return postprocess


TASK = EncoderTask(
    name="text-classification",
    texts=(TEXT,),
    options=(TRUNCATE, Tensor("text_pair", "STRING", (1,))),
    model_inputs=PAIR,
    model_outputs=(Tensor("logits", "FP32", ("labels",)),),
    read=("logits",),
    answer_options=(TOP_K,),
    answers=(Tensor("label", "STRING", (-1,)), SCORE, Tensor("label_id", "INT32", (-1,))),
    answer_parameters={"labels": "labels"},
    preprocess=read_texts,
    postprocess=best_labels,
)
