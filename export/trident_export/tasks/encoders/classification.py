"""Classes of texts: the gate compares scores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, PreTrainedModel

from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.tasks.encoders.base import Arrays, EncoderExport, Floats
from trident_serving.encoders import classification
from trident_serving.encoders.labels import Activation, LabelSettings, activate
from trident_serving.schema.limits import ImageLabelLimits, LabelLimits


class Classification(EncoderExport[LabelLimits]):
    """`text-classification`; `read` gives scores of a text, [1, labels]."""

    task = classification.TASK
    head = AutoModelForSequenceClassification
    architecture = "ForSequenceClassification"

    def problems(self, limits: LabelLimits, source: HuggingFaceFolder) -> Iterator[str]:
        yield from label_problems(limits, source)

    def proposed_limits(self, source: HuggingFaceFolder, max_tokens: int) -> dict[str, Any]:
        return {"labels": source.config.num_labels}

    def settings(self, source: HuggingFaceFolder) -> LabelSettings:
        return LabelSettings(source.labels, self.activation(source))

    def load_settings(self, folder: Path) -> LabelSettings:
        return LabelSettings.load(folder)

    def activation(self, source: HuggingFaceFolder) -> Activation:
        """What transformers' pipeline applies."""
        config = source.config
        if config.problem_type == "regression":
            return Activation.NONE
        if config.problem_type == "multi_label_classification" or config.num_labels == 1:
            return Activation.SIGMOID
        return Activation.SOFTMAX

    def prepare(self, model: PreTrainedModel, source: HuggingFaceFolder) -> None:
        # A decoder's class finds a text's last token by the padding token.
        padding = source.tokenizer.pad_token_id
        if model.config.get_text_config().pad_token_id is None and padding is not None:
            model.config.get_text_config().pad_token_id = model.config.pad_token_id = padding

    def read(self, tensors: Arrays, settings: LabelSettings) -> list[Floats]:
        return list(activate(tensors["logits"], settings.activation)[:, None])


def label_problems(limits: LabelLimits | ImageLabelLimits, source: HuggingFaceFolder) -> Iterator[str]:
    """What differs between the labels of models.toml and the model's."""
    if limits.labels != source.config.num_labels:
        yield f"limits.labels is {limits.labels}, the model has {source.config.num_labels}"


EXPORT = Classification()
check, trace, write, evaluator = EXPORT.check, EXPORT.trace, EXPORT.write, EXPORT.evaluator
