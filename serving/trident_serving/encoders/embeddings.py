"""Embeddings: one vector a text. The graph pools, see `pooling`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trident_serving.encoders.pooling import PoolingSettings, normalize
from trident_serving.encoders.task import SINGLE, TEXT, TRUNCATE, EncoderTask, Stage, Tensor, Tensors
from trident_serving.encoders.tokens import read_texts


def _load(folder: Path, parameters: Mapping[str, str]) -> Stage:
    settings = PoolingSettings.load(folder)

    def postprocess(tensors: Tensors) -> Tensors:
        vectors = tensors["pooled"]
        return {"embedding": normalize(vectors) if settings.normalize else vectors}

    return postprocess


TASK = EncoderTask(
    name="feature-extraction",
    texts=(TEXT,),
    options=(TRUNCATE, Tensor("prompt_name", "STRING", (1,))),
    model_inputs=SINGLE,
    model_outputs=(Tensor("pooled", "FP32", ("dimensions",)),),
    read=("pooled",),
    answers=(Tensor("embedding", "FP32", ("dimensions",)),),
    preprocess=read_texts,
    postprocess=_load,
)
