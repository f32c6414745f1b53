"""Tokens for a mask token: the graph gives the likeliest, the gate compares their scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from transformers import AutoModelForMaskedLM

from trident_export.graphs import encoder as encoder_graph
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.tasks.encoders.base import Arrays, EncoderExport, Floats, Texts
from trident_serving.encoders import fill_mask
from trident_serving.encoders.labels import softmax
from trident_serving.encoders.tokens import TokenRoles
from trident_serving.schema.limits import FillMaskLimits


class FillMask(EncoderExport[FillMaskLimits]):
    """`fill-mask`; `read` gives [mask tokens, vocabulary] of a text."""

    task = fill_mask.TASK
    head = AutoModelForMaskedLM
    architecture = "ForMaskedLM"
    tokenizer_in_postprocess = True

    def problems(self, limits: FillMaskLimits, source: HuggingFaceFolder) -> Iterator[str]:
        if limits.top_k > source.config.vocab_size:
            yield f"limits.top_k is {limits.top_k}, the model has {source.config.vocab_size} tokens"
        if source.roles().mask_token_id is None:
            yield f"task is {self.task.name}, and the tokenizer has no mask token: choose a masked language model"

    def load_settings(self, folder: Path) -> TokenRoles:
        return TokenRoles.load(folder)

    def settings(self, source: HuggingFaceFolder) -> TokenRoles:
        return source.roles()

    def finish(self, model: ir.Model, limits: FillMaskLimits, source: HuggingFaceFolder) -> None:
        encoder_graph.with_top_logits(model, limits.top_k)

    def samples(self, texts: Sequence[str], source: HuggingFaceFolder) -> list[Texts]:
        mask = source.tokenizer.mask_token
        words = [text.split()[:16] for text in texts]
        return [(" ".join([*row[: len(row) // 2], mask, *row[len(row) // 2 + 1 :]]),) for row in words]

    def far_sample(self, text: str, sample: Texts, source: HuggingFaceFolder) -> Texts:
        words = text.split()
        words[7::16] = [source.tokenizer.mask_token] * len(words[7::16])
        return (" ".join(words),)

    def read(self, tensors: Arrays, settings: TokenRoles) -> list[Floats]:
        if "logits" in tensors:  # Hugging Face's side
            both = zip(tensors["logits"], tensors["input_ids"], strict=True)
            return [softmax(row[ids == settings.mask_token_id]) for row, ids in both]
        found = []
        columns = (tensors[name] for name in ("top_scores", "top_ids", "log_normalizer", "input_ids"))
        for scores, tokens, normalizer, ids in zip(*columns, strict=True):
            masks = ids == settings.mask_token_id
            row = np.full((int(masks.sum()), int(tensors["top_ids"].max()) + 1), np.nan, np.float32)
            np.put_along_axis(row, tokens[masks], np.exp(scores[masks] - normalizer[masks, None]), axis=1)
            found.append(row)
        return found


EXPORT = FillMask()
check, trace, write, evaluator = EXPORT.check, EXPORT.trace, EXPORT.write, EXPORT.evaluator
