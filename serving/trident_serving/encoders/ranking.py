"""Scores of passages for a query, by a cross-encoder that reads both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trident_serving.encoders.labels import LabelSettings, activate
from trident_serving.encoders.task import PAIR, TEXT, TRUNCATE, EncoderTask, Stage, Tensor, Tensors, flag
from trident_serving.encoders.tokens import EncodingSettings, TextEncoder
from trident_serving.schema.reading import read_parameters
from trident_serving.text import decode_texts, numbered


def _read(folder: Path, parameters: Mapping[str, str]) -> Stage:
    settings = read_parameters(EncodingSettings, parameters)
    encoder = TextEncoder.load(folder, settings)

    def preprocess(tensors: Tensors) -> Tensors:
        fields = ("query", "text_input")
        queries, passages = (decode_texts(tensors[name], name, settings.max_bytes) for name in fields)
        names = zip(*(numbered(name, len(queries)) for name in fields), strict=True)
        return encoder.encode(queries, passages, names=names, truncate=flag(tensors, "truncate"))

    return preprocess


def _load(folder: Path, parameters: Mapping[str, str]) -> Stage:
    settings = LabelSettings.load(folder)

    def postprocess(tensors: Tensors) -> Tensors:
        return {"score": activate(tensors["logits"], settings.activation)}

    return postprocess


TASK = EncoderTask(
    name="text-ranking",
    texts=(Tensor("query", "STRING", (1,)), TEXT),
    options=(TRUNCATE,),
    model_inputs=PAIR,
    model_outputs=(Tensor("logits", "FP32", ("labels",)),),
    read=("logits",),
    answers=(Tensor("score", "FP32", ("labels",)),),
    preprocess=_read,
    postprocess=_load,
)
