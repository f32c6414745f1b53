"""Sparse embeddings: the graph pools a masked language model's logits; the gate compares whole vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from transformers import AutoModelForMaskedLM

from trident_export.errors import UnsupportedModel
from trident_export.graphs import encoder as encoder_graph
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.models_file import ModelSpec
from trident_export.tasks.encoders.base import Arrays, Floats, Texts
from trident_export.tasks.encoders.embeddings import Embeddings
from trident_serving.encoders import sparse
from trident_serving.schema.limits import SparseLimits

_MODULES = ("Transformer", "MLMTransformer", "SpladePooling")
_POOLINGS = ("max", "sum")
_LAYERS = {"relu": 1, "log1p_relu": 2}  # how often log(1 + x) is applied


class Sparse(Embeddings):
    """`sparse-embedding`; `read` gives vectors, [vocabulary]."""

    task = sparse.TASK
    head = AutoModelForMaskedLM

    def problems(self, limits: SparseLimits, source: HuggingFaceFolder) -> Iterator[str]:  # type: ignore[override]
        _how(source)
        if limits.dimensions != source.config.vocab_size:
            yield f"limits.dimensions is {limits.dimensions}, the model has {source.config.vocab_size} tokens"

    def proposed_limits(self, source: HuggingFaceFolder, max_tokens: int) -> dict[str, Any]:
        return {"dimensions": source.config.vocab_size}

    def settings(self, source: HuggingFaceFolder) -> None:  # type: ignore[override]
        return None

    def load_settings(self, folder: Path) -> None:  # type: ignore[override]
        return None

    def head_of(self, source: HuggingFaceFolder) -> Any:
        return self.head

    def finish(self, model: ir.Model, limits: Any, source: HuggingFaceFolder) -> None:
        pooling, layers = _how(source)
        encoder_graph.with_best_logits(model, layers, summed=pooling == "sum")

    def read(self, tensors: Arrays, settings: Any) -> list[Floats]:
        return list(tensors["pooled"])

    def reference(self, spec: ModelSpec, source: HuggingFaceFolder) -> Callable[[Texts], list[Floats]]:
        pooling, layers = _how(source)
        read, model = self.reader(spec, source), source.reference(self.head)

        def ask(texts: Texts) -> list[Floats]:
            weights = np.maximum(model(**read(texts)).logits.numpy(), 0)
            for _ in range(layers):
                weights = np.log1p(weights)
            return list(weights.sum(axis=1) if pooling == "sum" else weights.max(axis=1))

        return ask


def _how(source: HuggingFaceFolder) -> tuple[str, int]:
    """How logits are pooled, and how often log(1 + x) is applied before.

    Raises:
        UnsupportedModel: the folder says what is not supported.
    """
    unknown = sorted({kind for kind, _ in source.sentence.modules} - set(_MODULES))
    if unknown:
        raise UnsupportedModel(
            f"the model has the modules {', '.join(unknown)}, which are not supported in sparse embeddings"
        )
    settings = source.sentence.settings_of("SpladePooling")
    pooling = settings.get("pooling_strategy", "max")
    activation = settings.get("activation_function", "relu")
    if pooling not in _POOLINGS or activation not in _LAYERS:
        raise UnsupportedModel(f"the model pools by {pooling} over {activation}: supported are {', '.join(_POOLINGS)}")
    return pooling, _LAYERS[activation]


EXPORT = Sparse()
check, trace, write, evaluator = EXPORT.check, EXPORT.trace, EXPORT.write, EXPORT.evaluator
