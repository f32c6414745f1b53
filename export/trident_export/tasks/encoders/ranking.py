"""Passages for a query: a classifier of both, whose activation is that of sentence-transformers' cross-encoders."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig

from trident_export.errors import UnsupportedModel
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.tasks.encoders.base import Texts
from trident_export.tasks.encoders.classification import Classification
from trident_serving.encoders import ranking
from trident_serving.encoders.labels import Activation

_ACTIVATIONS = {"Identity": Activation.NONE, "Sigmoid": Activation.SIGMOID}


class Ranking(Classification):
    """`text-ranking`."""

    task = ranking.TASK
    architecture = ""

    def samples(self, texts: Sequence[str], source: HuggingFaceFolder) -> list[Texts]:
        return list(zip(texts, [*texts[1:], *texts[:1]], strict=True))

    def activation(self, config: PretrainedConfig) -> Activation:
        """What a cross-encoder applies.

        Raises:
            UnsupportedModel: it names one that is not supported.
        """
        settings = getattr(config, "sentence_transformers", None) or {}
        name = settings.get("activation_fn") or getattr(config, "sbert_ce_default_activation_function", None)
        if name is None:
            return Activation.SIGMOID if config.num_labels == 1 else Activation.NONE
        if name.rsplit(".", 1)[-1] not in _ACTIVATIONS:
            raise UnsupportedModel(f"the cross-encoder's activation {name!r} is not one of {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[name.rsplit(".", 1)[-1]]


EXPORT = Ranking()
trace, write, evaluator = EXPORT.trace, EXPORT.write, EXPORT.evaluator
