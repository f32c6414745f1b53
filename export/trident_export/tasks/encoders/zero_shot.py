"""Zero-shot classification: the gate compares what a model of natural language inference says of texts and labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any

from transformers import AutoModelForSequenceClassification

from trident_export.errors import UnsupportedModel
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.tasks.encoders.base import Arrays, EncoderExport, Floats, Texts
from trident_export.tasks.encoders.classification import label_problems
from trident_serving.encoders import zero_shot
from trident_serving.encoders.labels import softmax
from trident_serving.encoders.zero_shot import DEFAULT_TEMPLATE, InferenceSettings, hypothesis
from trident_serving.schema.limits import ZeroShotLimits

_LABELS = ("politics", "science", "sports", "music", "travel")


class ZeroShot(EncoderExport[ZeroShotLimits]):
    """`zero-shot-classification`; `read` gives probabilities of a text and a label, [1, labels of the model]."""

    task = zero_shot.TASK
    head = AutoModelForSequenceClassification

    def problems(self, limits: ZeroShotLimits, source: HuggingFaceFolder) -> Iterator[str]:
        yield from label_problems(limits, source)

    def settings(self, source: HuggingFaceFolder) -> InferenceSettings:
        """Which of the model's labels is entailment, as transformers' pipeline finds it.

        Raises:
            UnsupportedModel: none is, or the model is no encoder.
        """
        config = source.config
        if config.is_encoder_decoder:
            raise UnsupportedModel(f"{source} is an encoder-decoder model: zero-shot classification needs an encoder")
        found = [index for label, index in config.label2id.items() if label.lower().startswith("entail")]
        if not found:
            raise UnsupportedModel(
                f"{source} has the labels {', '.join(config.label2id)}, of which none is entailment: zero-shot "
                "classification needs a model of natural language inference"
            )
        last = config.num_labels - 1
        return InferenceSettings(entailment=found[0], contradiction=last if found[0] == 0 else 0)

    def samples(self, texts: Sequence[str], source: HuggingFaceFolder) -> list[Texts]:
        return list(zip(texts, cycle(_LABELS), strict=False))

    def far_sample(self, text: str, sample: Texts, source: HuggingFaceFolder) -> Texts:
        return (text, sample[1])

    def tokenize(self, tokenizer: Any, texts: Texts, max_tokens: int) -> Any:
        text, label = texts
        pair = (text, hypothesis(DEFAULT_TEMPLATE, label))
        return tokenizer(*pair, truncation="only_first", max_length=max_tokens, return_tensors="pt")

    def read(self, tensors: Arrays, settings: None) -> list[Floats]:
        return list(softmax(tensors["logits"])[:, None])


EXPORT = ZeroShot()
check, trace, write, evaluator = EXPORT.check, EXPORT.trace, EXPORT.write, EXPORT.evaluator
