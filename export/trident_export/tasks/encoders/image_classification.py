"""Classes of images: the gate compares scores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageClassification

from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.tasks.encoders import classification
from trident_export.tasks.encoders.base import Floats
from trident_export.tasks.encoders.classification import label_problems
from trident_export.tasks.encoders.images import ImageExport
from trident_serving.encoders import image_classification
from trident_serving.encoders.labels import LabelSettings, activate
from trident_serving.encoders.task import Tensors
from trident_serving.schema.limits import ImageLabelLimits


class ImageClassification(ImageExport):
    """`image-classification`; `read_images` gives scores of an image, [1, labels]."""

    task = image_classification.TASK
    head = AutoModelForImageClassification
    architecture = "ForImageClassification"
    output = "logits"

    def problems(self, limits: ImageLabelLimits, source: HuggingFaceFolder) -> Iterator[str]:
        yield from label_problems(limits, source)

    def proposed_limits(self, source: HuggingFaceFolder, max_tokens: int) -> dict[str, Any]:
        return {"labels": source.config.num_labels}

    def outputs(self, model: Any, pixels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(pixel_values=pixels).logits
        return found

    def settings(self, source: HuggingFaceFolder) -> LabelSettings:
        return LabelSettings(source.labels, classification.EXPORT.activation(source))

    def files_of(self, model: Any, source: HuggingFaceFolder, folder: Path) -> None:
        self.settings(source).save(folder)

    def read_images(self, tensors: Tensors, folder: Path) -> list[Floats]:
        return list(activate(tensors["logits"], LabelSettings.load(folder).activation)[:, None])


EXPORT = ImageClassification()
check, trace, write, evaluator = EXPORT.check, EXPORT.trace, EXPORT.write, EXPORT.evaluator
