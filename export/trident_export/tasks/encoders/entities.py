"""Entities: the gate compares the scores of every token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import AutoModelForTokenClassification

from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.tasks.encoders.base import EncoderExport
from trident_export.tasks.encoders.classification import Classification, label_problems
from trident_serving.encoders import entities
from trident_serving.encoders.labels import LabelSettings
from trident_serving.schema.limits import EntityLimits


class Entities(EncoderExport[EntityLimits]):
    """`token-classification`."""

    task = entities.TASK
    head = AutoModelForTokenClassification
    architecture = "ForTokenClassification"
    tokenizer_in_postprocess = True

    def problems(self, limits: EntityLimits, source: HuggingFaceFolder) -> Iterator[str]:
        yield from label_problems(limits, source)

    def proposed_limits(self, source: HuggingFaceFolder, max_tokens: int) -> dict[str, Any]:
        return {"labels": source.config.num_labels}

    def settings(self, source: HuggingFaceFolder) -> LabelSettings:
        return Classification().settings(source)


EXPORT = Entities()
check, trace, write, evaluator = EXPORT.check, EXPORT.trace, EXPORT.write, EXPORT.evaluator
