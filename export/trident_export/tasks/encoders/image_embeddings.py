"""Embeddings of images: the gate compares vectors.

Of a model with two towers they are the tower's, made to length 1, as the model itself compares them; of any other what
transformers' pipeline gives with `pool=True`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoModelForZeroShotImageClassification

from trident_export.errors import UnsupportedModel
from trident_export.graphs import towers
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.measure import fidelity
from trident_export.tasks.encoders.base import Floats
from trident_export.tasks.encoders.images import ImageExport
from trident_serving.encoders import image_embeddings
from trident_serving.encoders.image_embeddings import EmbeddingSettings
from trident_serving.encoders.pooling import normalize
from trident_serving.encoders.task import Tensors
from trident_serving.schema.limits import ImageEmbeddingLimits


class ImageEmbeddings(ImageExport):
    """`image-feature-extraction`; `read_images` gives vectors, [dimensions]."""

    task = image_embeddings.TASK
    head = AutoModel
    output = "pooled"

    def head_of(self, source: HuggingFaceFolder) -> Any:
        return AutoModelForZeroShotImageClassification if towers.has_towers(source) else self.head

    def problems(self, limits: ImageEmbeddingLimits, source: HuggingFaceFolder) -> Iterator[str]:
        dimensions = _dimensions(source)
        if limits.dimensions != dimensions:
            yield f"limits.dimensions is {limits.dimensions}, the model's is {dimensions}"

    def proposed_limits(self, source: HuggingFaceFolder, max_tokens: int) -> dict[str, Any]:
        return {"dimensions": _dimensions(source)}

    def outputs(self, model: Any, pixels: torch.Tensor) -> torch.Tensor:
        return towers.image_vectors(model, pixels)

    def files_of(self, model: Any, source: HuggingFaceFolder, folder: Path) -> None:
        EmbeddingSettings(normalize=towers.has_towers(source)).save(folder)

    def read_images(self, tensors: Tensors, folder: Path) -> list[Floats]:
        vectors = tensors["pooled"]
        return list(normalize(vectors) if EmbeddingSettings.load(folder).normalize else vectors)

    def compare(self, reference: Sequence[Floats], found: Sequence[Floats]) -> dict[str, float]:
        return fidelity.compare_embeddings(np.stack(reference), np.stack(found))


def _dimensions(source: HuggingFaceFolder) -> int:
    if towers.has_towers(source):
        return towers.dimensions(source)
    config = source.config
    size = getattr(config, "pooler_output_size", None) or getattr(config, "hidden_size", None)
    if not isinstance(size, int):
        raise UnsupportedModel(f"{source} is a model of type {config.model_type!r}, whose config names no hidden_size")
    return size


EXPORT = ImageEmbeddings()
check, trace, write, evaluator = EXPORT.check, EXPORT.trace, EXPORT.write, EXPORT.evaluator
