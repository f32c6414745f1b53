"""Embeddings: one vector a text. The graph pools, see `pooling`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from trident_serving.encoders.pooling import Floats, PoolingSettings, normalize
from trident_serving.encoders.task import (
    PROMPT_NAME,
    SINGLE,
    TEXT,
    TRUNCATE,
    EncoderTask,
    Stage,
    Tensor,
    Tensors,
)
from trident_serving.encoders.tokens import read_texts
from trident_serving.errors import InvalidRequest

# Over HTTP the server reads numbers of JSON into an INT32 by their last 32 bits, and 2**32 + 8 would be 8.
DIMENSIONS = Tensor("dimensions", "INT64", (1,), of="matryoshka")


def _load(folder: Path, parameters: Mapping[str, str]) -> Stage:
    settings = PoolingSettings.load(folder)
    shorter = sizes(parameters)

    def postprocess(tensors: Tensors) -> Tensors:
        return {"embedding": embedded(tensors, settings, shorter)}

    return postprocess


def sizes(parameters: Mapping[str, str]) -> list[int]:
    """The shorter embeddings that a config allows."""
    return [int(size) for size in parameters["matryoshka"].split(",") if size]


def embedded(tensors: Tensors, settings: PoolingSettings, shorter: Sequence[int]) -> Floats:
    """The embeddings of a request, float32 [texts, dimensions].

    Args:
        shorter: what `dimensions` may say besides the model's own; such a vector is the beginning of the model's, of
            length 1 again where that is.

    Raises:
        InvalidRequest: `dimensions` says something else.
    """
    pooled = tensors["pooled"]
    vectors = normalize(pooled) if settings.normalize else pooled
    if "dimensions" not in tensors:
        return vectors
    asked, whole = {int(size) for size in tensors["dimensions"].reshape(-1)}, vectors.shape[1]
    if len(asked) != 1 or not asked <= {*shorter, whole}:
        known = ", ".join(map(str, sorted({*shorter, whole})))
        said = ", ".join(map(str, sorted(asked))) or "none"
        raise InvalidRequest(f"dimensions must be one of {known} for all texts of a request, found {said}")
    size = asked.pop()
    if size == whole:
        return vectors
    return normalize(vectors[:, :size]) if settings.normalize or settings.normalized else vectors[:, :size]


TASK = EncoderTask(
    name="feature-extraction",
    texts=(TEXT,),
    options=(TRUNCATE, PROMPT_NAME),
    model_inputs=SINGLE,
    model_outputs=(Tensor("pooled", "FP32", ("dimensions",)),),
    read=("pooled",),
    answer_options=(DIMENSIONS,),
    answers=(Tensor("embedding", "FP32", ("answered",)),),
    alias={"input_text": "text_input", "embedding": "embedding"},  # LiteLLM's, which sends a list of texts as [n]
    answer_parameters={"matryoshka": "matryoshka"},
    preprocess=partial(read_texts, prompts=True),
    postprocess=_load,
)
