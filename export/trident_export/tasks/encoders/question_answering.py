"""Answers from contexts: the gate compares the scores of a window's tokens to start and to end an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import AutoModelForQuestionAnswering

from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.measure import fidelity
from trident_export.tasks.encoders.base import Arrays, EncoderExport, Floats, Texts
from trident_serving.encoders import question_answering
from trident_serving.encoders.labels import softmax
from trident_serving.schema.limits import AnswerLimits


class QuestionAnswering(EncoderExport[AnswerLimits]):
    """`question-answering`; `read` gives [2, tokens] of a window."""

    task = question_answering.TASK
    head = AutoModelForQuestionAnswering
    architecture = "ForQuestionAnswering"
    proposed_tokens = 384

    def proposed_limits(self, source: HuggingFaceFolder, max_tokens: int) -> dict[str, Any]:
        return {"stride": min(128, max_tokens // 3)}

    def samples(self, texts: Sequence[str], source: HuggingFaceFolder) -> list[Texts]:
        return [(text[:24], text) for text in texts]

    def far_sample(self, text: str, sample: Texts, source: HuggingFaceFolder) -> Texts:
        return (sample[0], text)

    def tokenize(self, tokenizer: Any, texts: Texts, max_tokens: int) -> Any:
        return tokenizer(*texts, truncation="only_second", max_length=max_tokens, return_tensors="pt")

    def read(self, tensors: Arrays, settings: None) -> list[Floats]:
        kept = [mask > 0 for mask in tensors["attention_mask"]]
        both = zip(tensors["start_logits"], tensors["end_logits"], kept, strict=True)
        return [softmax(np.stack([start[real], end[real]])) for start, end, real in both]

    def compare_thoroughly(
        self,
        reference: Sequence[Floats],
        found: Sequence[Floats],
        searched: Sequence[tuple[Sequence[Floats], Sequence[Floats]]],
    ) -> dict[str, float]:
        return fidelity.compare_spans(reference, found)


EXPORT = QuestionAnswering()
check, trace, write, evaluator = EXPORT.check, EXPORT.trace, EXPORT.write, EXPORT.evaluator
