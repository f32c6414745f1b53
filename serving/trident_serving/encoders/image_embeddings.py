"""Embeddings of images: one vector an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trident_serving.encoders.images import IMAGE, PARAMETERS, PIXELS, STAGE, read_images
from trident_serving.encoders.pooling import normalize
from trident_serving.encoders.task import EncoderTask, Stage, Tensor, Tensors
from trident_serving.schema import reading

_SETTINGS = "embedding.json"


@dataclass(frozen=True)
class EmbeddingSettings:
    """Whether the graph's vectors are made to length 1; `embedding.json` in the version folder."""

    normalize: bool

    @classmethod
    def load(cls, folder: Path) -> EmbeddingSettings:
        """Read `folder/embedding.json`."""
        return reading.load(cls, folder / _SETTINGS)

    def save(self, folder: Path) -> None:
        """Write `folder/embedding.json`."""
        reading.save(self, folder / _SETTINGS)


def _load(folder: Path, parameters: Mapping[str, str]) -> Stage:
    settings = EmbeddingSettings.load(folder)

    def postprocess(tensors: Tensors) -> Tensors:
        vectors = tensors["pooled"]
        return {"embedding": normalize(vectors) if settings.normalize else vectors}

    return postprocess


TASK = EncoderTask(
    name="image-feature-extraction",
    stage=STAGE,
    texts=(IMAGE,),
    model_inputs=(PIXELS,),
    model_outputs=(Tensor("pooled", "FP32", ("dimensions",)),),
    read=("pooled",),
    answers=(Tensor("embedding", "FP32", ("dimensions",)),),
    parameters=PARAMETERS,
    preprocess=read_images,
    postprocess=_load,
)
