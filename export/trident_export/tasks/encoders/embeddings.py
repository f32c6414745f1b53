"""Embeddings: the graph pools; the gate compares vectors. Of a model with two towers they are those of its texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from transformers import (
    AutoModel,
    AutoModelForTextEncoding,
    AutoModelForZeroShotImageClassification,
    PreTrainedModel,
)

from trident_export import corpora
from trident_export.graphs import encoder as encoder_graph
from trident_export.graphs import towers
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.huggingface.sentence_transformers import applied
from trident_export.measure import fidelity
from trident_export.models_file import ModelSpec
from trident_export.tasks.encoders.base import Arrays, EncoderExport, Floats, Texts
from trident_serving.encoders import embeddings
from trident_serving.encoders.pooling import PoolingSettings, normalize, pool
from trident_serving.schema.limits import EmbeddingLimits


class Embeddings(EncoderExport[EmbeddingLimits]):
    """`feature-extraction`; `read` gives vectors, [dimensions]."""

    task = embeddings.TASK
    head = AutoModel

    def problems(self, limits: EmbeddingLimits, source: HuggingFaceFolder) -> Iterator[str]:
        dimensions = _dimensions(source)
        if limits.dimensions != dimensions:
            yield f"limits.dimensions is {limits.dimensions}, the model's is {dimensions}"
        if source.padded_to and limits.max_tokens != source.padded_to:
            yield f"limits.max_tokens is {limits.max_tokens}, the model's texts are all of {source.padded_to}"

    def proposed_limits(self, source: HuggingFaceFolder, max_tokens: int) -> dict[str, Any]:
        dimensions = _dimensions(source)
        sizes = sorted(
            size for size in getattr(source.config, "matryoshka_dimensions", None) or () if size < dimensions
        )
        return {"dimensions": dimensions} | ({"matryoshka": sizes} if sizes else {})

    def settings(self, source: HuggingFaceFolder) -> PoolingSettings:
        return source.pooling

    def load_settings(self, folder: Path) -> PoolingSettings:
        return PoolingSettings.load(folder)

    def check(self, spec: ModelSpec, source: HuggingFaceFolder) -> None:
        super().check(spec, source)
        if towers.has_towers(source):
            towers.check_texts(source)

    def head_of(self, source: HuggingFaceFolder) -> Any:
        if towers.has_towers(source):
            return AutoModelForZeroShotImageClassification
        # Of an encoder-decoder, such as T5, the encoder alone embeds.
        return AutoModelForTextEncoding if source.config.is_encoder_decoder else self.head

    def part(self, source: HuggingFaceFolder) -> Callable[[PreTrainedModel], Any] | None:
        return towers.TextTower if towers.has_towers(source) else None

    def finish(self, model: ir.Model, limits: EmbeddingLimits, source: HuggingFaceFolder) -> None:
        if towers.has_towers(source):
            return
        if not source.sentence.counts_prompt:
            encoder_graph.with_marked_prompt(model)
        # A vector a text is a hundredth of what the tokens' vectors are to hand on.
        encoder_graph.with_pooling(model, source.pooling.pooling, *source.pooling.more)
        encoder_graph.with_layers(model, source.sentence.layers)

    def read(self, tensors: Arrays, settings: PoolingSettings) -> list[Floats]:
        vectors = tensors["pooled"]
        return list(normalize(vectors) if settings.normalize else vectors)

    def reference(self, spec: ModelSpec, source: HuggingFaceFolder) -> Callable[[Texts], list[Floats]]:
        read, model, settings = self.reader(spec, source), source.reference(self.head_of(source)), self.settings(source)
        uncounted = self.uncounted(spec, source)
        if towers.has_towers(source):
            return lambda texts: self.read({"pooled": towers.text_vectors(model, read(texts)).numpy()}, settings)

        def ask(texts: Texts) -> list[Floats]:
            batch = read(texts)
            hidden, mask = model(**batch).last_hidden_state.numpy(), batch["attention_mask"].numpy()
            return self.read({"pooled": self.pooled(hidden, mask, source, uncounted)}, settings)

        return ask

    def reader(self, spec: ModelSpec, source: HuggingFaceFolder) -> Callable[[Texts], Any]:
        """What Hugging Face's tokenizer makes of a text behind the default prompt, as torch tensors of one row."""
        assert spec.encoder is not None
        limit, tokenizer, lower = spec.encoder.max_tokens, source.tokenizer, source.sentence.lower_case
        prompt = _default_prompt(spec, source)

        def read(texts: Texts) -> Any:
            text = prompt + texts[0]
            if towers.has_towers(source):
                return towers.tokenize(source, tokenizer, [text], limit)
            return self.tokenize(tokenizer, (text.lower() if lower else text,), limit)

        return read

    def uncounted(self, spec: ModelSpec, source: HuggingFaceFolder) -> int:
        """Tokens of the default prompt that are left out of the pooling."""
        prompt, tokenizer = _default_prompt(spec, source), source.tokenizer
        if not prompt or source.sentence.counts_prompt:
            return 0
        ids = tokenizer(prompt).input_ids
        return len(ids) - (ids[-1] in tokenizer.all_special_ids)

    def pooled(self, hidden: Floats, mask: NDArray[np.int64], source: HuggingFaceFolder, uncounted: int) -> Floats:
        """What the graph gives of a text's tokens, by numpy and torch: float32 [1, dimensions]."""
        settings = source.pooling
        counted = mask.copy()
        counted[:, :uncounted] = 2
        vectors = [pool(hidden, counted, kind) for kind in (settings.pooling, *settings.more)]
        return applied(source.sentence.layers, np.concatenate(vectors, axis=1))

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


def _default_prompt(spec: ModelSpec, source: HuggingFaceFolder) -> str:
    roles = source.roles(spec.own_prompts)
    return roles.prompts[roles.default_prompt] if roles.default_prompt is not None else ""


def _dimensions(source: HuggingFaceFolder) -> int:
    if towers.has_towers(source):
        return towers.dimensions(source)
    return source.sentence.dimensions(source.config.get_text_config().hidden_size)


EXPORT = Embeddings()
check, trace, write, evaluator = EXPORT.check, EXPORT.trace, EXPORT.write, EXPORT.evaluator
