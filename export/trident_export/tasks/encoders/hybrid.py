"""A vector and the weights of tokens from one graph: the gate compares both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from trident_export.errors import UnreadableSource, UnsupportedModel
from trident_export.graphs import encoder as encoder_graph
from trident_export.huggingface.folder import HuggingFaceFolder, reading
from trident_export.huggingface.sentence_transformers import SPARSE_LINEAR, read_weights
from trident_export.measure import fidelity
from trident_export.models_file import ModelSpec
from trident_export.tasks.encoders.base import Arrays, Floats, Texts
from trident_export.tasks.encoders.embeddings import Embeddings
from trident_serving.encoders import hybrid
from trident_serving.encoders.hybrid import WeightSettings, lexical
from trident_serving.encoders.pooling import PoolingSettings
from trident_serving.schema.limits import EmbeddingLimits


@dataclass(frozen=True)
class _Settings:
    pooling: PoolingSettings
    weights: WeightSettings

    def save(self, folder: Path) -> None:
        self.pooling.save(folder)
        self.weights.save(folder)


class Hybrid(Embeddings):
    """`hybrid-embedding`; `read` gives [2, numbers]: the vector, ended by NaN, and weights by the token's id."""

    task = hybrid.TASK

    def problems(self, limits: EmbeddingLimits, source: HuggingFaceFolder) -> Iterator[str]:
        yield from super().problems(limits, source)
        _linear(source)

    def settings(self, source: HuggingFaceFolder) -> Any:
        tokenizer = source.tokenizer
        roles = (tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
        unused = tuple(sorted({token for token in roles if token is not None}))
        return _Settings(source.pooling, WeightSettings(unused))

    def load_settings(self, folder: Path) -> Any:
        return _Settings(PoolingSettings.load(folder), WeightSettings.load(folder))

    def finish(self, model: ir.Model, limits: EmbeddingLimits, source: HuggingFaceFolder) -> None:
        super().finish(model, limits, source)
        encoder_graph.with_token_weights(model, *_linear(source))

    def read(self, tensors: Arrays, settings: Any) -> list[Floats]:
        found = []
        vectors = super().read(tensors, settings.pooling)
        columns = (tensors[name] for name in ("input_ids", "attention_mask", "token_weights"))
        for vector, ids, mask, weights in zip(vectors, *columns, strict=True):
            row = np.zeros((2, max(len(vector), int(ids.max()) + 1)), np.float32)
            row[0], row[0, : len(vector)] = np.nan, vector
            tokens, largest = lexical(ids, mask, weights, settings.weights.unused)
            row[1, tokens] = largest
            found.append(row)
        return found

    def reference(self, spec: ModelSpec, source: HuggingFaceFolder) -> Callable[[Texts], list[Floats]]:
        read, model, settings = self.reader(spec, source), source.reference(self.head_of(source)), self.settings(source)
        weight, bias = _linear(source)

        def ask(texts: Texts) -> list[Floats]:
            batch = read(texts)
            hidden = model(**batch).last_hidden_state.numpy()
            inputs = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
            weights = np.maximum(hidden @ weight[0] + bias, 0)
            pooled = self.pooled(hidden, inputs["attention_mask"], source, self.uncounted(spec, source))
            return self.read({**inputs, "pooled": pooled, "token_weights": weights}, settings)

        return ask

    def compare(self, reference: Sequence[Floats], found: Sequence[Floats]) -> dict[str, float]:
        measured = fidelity.compare_embeddings(_vectors(reference), _vectors(found))
        width = max(row.shape[1] for row in (*reference, *found))
        weights = [np.stack([_wide(row[1], width) for row in rows]) for rows in (reference, found)]
        sparse = fidelity.compare_embeddings(*weights)
        return measured | {
            "worst_cosine": min(measured["worst_cosine"], sparse["worst_cosine"]),
            "max_difference": max(measured["max_difference"], sparse["max_difference"]),
        }

    def compare_thoroughly(
        self,
        reference: Sequence[Floats],
        found: Sequence[Floats],
        searched: Sequence[tuple[Sequence[Floats], Sequence[Floats]]],
    ) -> dict[str, float]:
        return super().compare_thoroughly(
            list(_vectors(reference)),
            list(_vectors(found)),
            [(list(_vectors(expected)), list(_vectors(given))) for expected, given in searched],
        )


def _vectors(rows: Sequence[Floats]) -> Floats:
    return np.stack([row[0][~np.isnan(row[0])] for row in rows])


def _wide(weights: Floats, width: int) -> Floats:
    return np.pad(weights, (0, width - len(weights)))


def _linear(source: HuggingFaceFolder) -> tuple[Floats, Floats]:
    """Weight, float32 [1, hidden], and bias of the layer that gives a token's weight.

    Raises:
        UnsupportedModel: the folder has no such layer.
        UnreadableSource: its file is damaged, or of another model.
    """
    file = source.path / SPARSE_LINEAR
    if not file.exists():
        raise UnsupportedModel(
            f"{source} has no {SPARSE_LINEAR}, which gives the weights of tokens: choose another task"
        )
    with reading(source.path, SPARSE_LINEAR):
        found = read_weights(file)
        weight, bias, hidden = found["weight"], found["bias"], source.config.get_text_config().hidden_size
    if weight.shape != (1, hidden) or bias.shape != (1,):
        raise UnreadableSource(
            f"{source}: {SPARSE_LINEAR} has a weight of {list(weight.shape)} and a bias of {list(bias.shape)}, the "
            f"model needs [1, {hidden}] and [1]: it is another model's"
        )
    return weight, bias


EXPORT = Hybrid()
check, trace, write, evaluator = EXPORT.check, EXPORT.trace, EXPORT.write, EXPORT.evaluator
