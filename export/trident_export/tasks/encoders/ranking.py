"""Passages for a query: a classifier of both, whose activation is that of sentence-transformers' cross-encoders."""

from __future__ import annotations

from collections.abc import Sequence

from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.tasks.encoders.base import Texts
from trident_export.tasks.encoders.classification import Classification
from trident_serving.encoders import ranking
from trident_serving.encoders.labels import Activation


class Ranking(Classification):
    """`text-ranking`."""

    task = ranking.TASK
    architecture = ""

    def samples(self, texts: Sequence[str], source: HuggingFaceFolder) -> list[Texts]:
        return list(zip(texts, [*texts[1:], *texts[:1]], strict=True))

    def activation(self, source: HuggingFaceFolder) -> Activation:
        """What a cross-encoder applies.

        Raises:
            UnsupportedModel: it names one that is not supported.
        """
        return source.sentence.score_activation(source.config)


EXPORT = Ranking()
trace, write, evaluator = EXPORT.trace, EXPORT.write, EXPORT.evaluator
