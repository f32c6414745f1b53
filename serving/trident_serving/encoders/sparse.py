"""Sparse embeddings: a weight for some tokens of the vocabulary, as pairs of index and weight.

Reference: SPLADE (Formal et al., 2021), as sentence-transformers' `SparseEncoder` computes it; the graph pools.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trident_serving.encoders.pooling import Floats
from trident_serving.encoders.task import PROMPT_NAME, SINGLE, TEXT, TRUNCATE, EncoderTask, Stage, Tensor, Tensors
from trident_serving.encoders.tokens import read_texts

ANSWERS = (Tensor("indices", "INT32", (-1,)), Tensor("weights", "FP32", (-1,)))


def pairs(rows: Sequence[tuple[NDArray[np.int64], Floats]]) -> Tensors:
    """`indices` and `weights`, [texts, pairs] each; shorter rows end with the index -1 and the weight 0.

    Args:
        rows: indices and weights of each text.
    """
    width = max((len(indices) for indices, _ in rows), default=0)
    indices, weights = np.full((len(rows), width), -1, np.int32), np.zeros((len(rows), width), np.float32)
    for row, (found, their) in enumerate(rows):
        indices[row, : len(found)], weights[row, : len(found)] = found, their
    return {"indices": indices, "weights": weights}


def _load(folder: Path, parameters: Mapping[str, str]) -> Stage:
    def postprocess(tensors: Tensors) -> Tensors:
        found = [np.flatnonzero(vector) for vector in tensors["pooled"]]
        return pairs([(indices, vector[indices]) for indices, vector in zip(found, tensors["pooled"], strict=True)])

    return postprocess


TASK = EncoderTask(
    name="sparse-embedding",
    texts=(TEXT,),
    options=(TRUNCATE, PROMPT_NAME),
    model_inputs=SINGLE,
    model_outputs=(Tensor("pooled", "FP32", ("dimensions",)),),
    read=("pooled",),
    answers=ANSWERS,
    preprocess=partial(read_texts, prompts=True),
    postprocess=_load,
)
