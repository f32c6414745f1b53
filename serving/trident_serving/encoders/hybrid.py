"""Both embeddings of a text in one run: a vector, and a weight for each of its tokens, as bge-m3 gives them.

Reference: BGE M3-Embedding (Chen et al., 2024); a token that comes several times has its largest weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trident_serving.encoders.embeddings import DIMENSIONS, embedded, sizes
from trident_serving.encoders.pooling import Floats, PoolingSettings
from trident_serving.encoders.sparse import ANSWERS, pairs
from trident_serving.encoders.task import PROMPT_NAME, SINGLE, TEXT, TRUNCATE, EncoderTask, Stage, Tensor, Tensors
from trident_serving.encoders.tokens import read_texts
from trident_serving.schema import reading

_SETTINGS = "weights.json"


@dataclass(frozen=True)
class WeightSettings:
    """Tokens that never have a weight, those that mark a text's ends and gaps; `weights.json`."""

    unused: tuple[int, ...]

    @classmethod
    def load(cls, folder: Path) -> WeightSettings:
        """Read `folder/weights.json`."""
        return reading.load(cls, folder / _SETTINGS)

    def save(self, folder: Path) -> None:
        """Write `folder/weights.json`."""
        reading.save(self, folder / _SETTINGS)


def lexical(
    input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], weights: Floats, unused: tuple[int, ...]
) -> tuple[NDArray[np.int64], Floats]:
    """The different tokens of one text that have a weight, rising, and the largest weight of each.

    Args:
        input_ids: int64 [tokens]; `attention_mask` too, 0 for padding.
        weights: float32 [tokens], none below 0.
        unused: tokens that have none.
    """
    kept = (attention_mask > 0) & (weights > 0) & ~np.isin(input_ids, unused)
    tokens, places = np.unique(input_ids[kept], return_inverse=True)
    largest = np.zeros(len(tokens), np.float32)
    np.maximum.at(largest, places, weights[kept])
    return tokens, largest


def _load(folder: Path, parameters: Mapping[str, str]) -> Stage:
    settings, unused = PoolingSettings.load(folder), WeightSettings.load(folder).unused
    shorter = sizes(parameters)

    def postprocess(tensors: Tensors) -> Tensors:
        columns = (tensors[name] for name in ("input_ids", "attention_mask", "token_weights"))
        found = [lexical(ids, mask, weights, unused) for ids, mask, weights in zip(*columns, strict=True)]
        return {"embedding": embedded(tensors, settings, shorter), **pairs(found)}

    return postprocess


TASK = EncoderTask(
    name="hybrid-embedding",
    texts=(TEXT,),
    options=(TRUNCATE, PROMPT_NAME),
    model_inputs=SINGLE,
    model_outputs=(Tensor("pooled", "FP32", ("dimensions",)), Tensor("token_weights", "FP32", (-1,))),
    read=("input_ids", "attention_mask", "pooled", "token_weights"),
    answer_options=(DIMENSIONS,),
    answers=(Tensor("embedding", "FP32", ("answered",)), *ANSWERS),
    answer_parameters={"matryoshka": "matryoshka"},
    preprocess=partial(read_texts, prompts=True),
    postprocess=_load,
)
