"""Embeddings: the graph pools; the gate compares vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from transformers import AutoModel, PretrainedConfig

from trident_export import corpora
from trident_export.graphs import encoder as encoder_graph
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.measure import fidelity
from trident_export.tasks.encoders.base import Arrays, EncoderExport, Floats, Texts
from trident_serving.encoders import embeddings
from trident_serving.encoders.pooling import PoolingSettings, normalize, pool
from trident_serving.schema.limits import EmbeddingLimits


class Embeddings(EncoderExport[EmbeddingLimits]):
    """`feature-extraction`; `read` gives vectors, [dimensions]."""

    task = embeddings.TASK
    head = AutoModel

    def problems(self, limits: EmbeddingLimits, source: HuggingFaceFolder) -> Iterator[str]:
        if limits.dimensions != source.config.hidden_size:
            yield f"limits.dimensions is {limits.dimensions}, the model's is {source.config.hidden_size}"

    def proposed_limits(self, config: PretrainedConfig, max_tokens: int) -> dict[str, Any]:
        return {"dimensions": config.hidden_size}

    def settings(self, source: HuggingFaceFolder) -> PoolingSettings:
        return source.pooling

    def load_settings(self, folder: Path) -> PoolingSettings:
        return PoolingSettings.load(folder)

    def finish(self, model: ir.Model, limits: EmbeddingLimits, source: HuggingFaceFolder) -> None:
        # A vector a text is a hundredth of what the tokens' vectors are to hand on.
        encoder_graph.with_pooling(model, source.pooling.pooling)

    def read(self, tensors: Arrays, settings: PoolingSettings) -> list[Floats]:
        vectors = tensors.get("pooled")
        if vectors is None:  # Hugging Face's side
            vectors = pool(tensors["last_hidden_state"], tensors["attention_mask"], settings.pooling)
        return list(normalize(vectors) if settings.normalize else vectors)

    def compare(self, reference: Sequence[Floats], found: Sequence[Floats]) -> dict[str, float]:
        return fidelity.compare_embeddings(np.stack(reference), np.stack(found))

    def searched(self) -> Sequence[Sequence[Texts]]:
        return [[(text,) for text in texts] for texts in (corpora.passages(), corpora.questions())]

    def compare_thoroughly(
        self,
        reference: Sequence[Floats],
        found: Sequence[Floats],
        searched: Sequence[tuple[Sequence[Floats], Sequence[Floats]]],
    ) -> dict[str, float]:
        (passages, found_passages), (questions, found_questions) = (map(np.stack, both) for both in searched)
        return {"recall_at_10": fidelity.recall(passages, questions, found_passages, found_questions)}


EXPORT = Embeddings()
trace, write, evaluator = EXPORT.trace, EXPORT.write, EXPORT.evaluator
