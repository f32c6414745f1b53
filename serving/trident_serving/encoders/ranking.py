"""Scores of passages for a query: by a cross-encoder that reads both, or by a decoder that answers yes or no."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trident_serving.encoders.labels import LabelSettings, activate
from trident_serving.encoders.task import PAIR, PROMPT_NAME, TEXT, TRUNCATE, EncoderTask, Stage, Tensor, Tensors, flag
from trident_serving.encoders.tokens import EncodingSettings, TextEncoder, prompt_name
from trident_serving.errors import InvalidRequest
from trident_serving.schema import reading
from trident_serving.schema.reading import read_parameters
from trident_serving.text import decode_texts, numbered

_TEMPLATES = "templates.json"


@dataclass(frozen=True)
class RankingTemplates:
    """What a decoder reads: a query and a passage within a text; `templates.json`, where a model has one.

    Attributes:
        parts: what stands before the query, between both and behind the passage, by the prompt's text; "": none.
    """

    parts: Mapping[str, Sequence[str]]

    @classmethod
    def load(cls, folder: Path) -> RankingTemplates | None:
        """Read `folder/templates.json`; None without it."""
        return reading.load(cls, folder / _TEMPLATES) if (folder / _TEMPLATES).exists() else None

    def save(self, folder: Path) -> None:
        """Write `folder/templates.json`."""
        reading.save(self, folder / _TEMPLATES)


def _read(folder: Path, parameters: Mapping[str, str]) -> Stage:
    settings = read_parameters(EncodingSettings, parameters)
    encoder = TextEncoder.load(folder, settings)
    templates = RankingTemplates.load(folder)

    def preprocess(tensors: Tensors) -> Tensors:
        fields = ("query", "text_input")
        queries, passages = (decode_texts(tensors[name], name, settings.max_bytes) for name in fields)
        names = list(zip(*(numbered(name, len(queries)) for name in fields), strict=True))
        prompt, truncate = encoder.prompt(prompt_name(tensors)), flag(tensors, "truncate")
        if templates is None:
            return encoder.encode([prompt + query for query in queries], passages, names=names, truncate=truncate)
        before, between, after = templates.parts[prompt]
        texts = []
        for query, passage, called in zip(queries, passages, names, strict=True):
            for text, name in zip((query, passage), called, strict=True):
                if not text.strip():
                    raise InvalidRequest(f"{name} is empty: {text[:80]!r} holds no token")
            text, start = before + query + between + passage + after, len(before + query + between)
            if encoder.truncates if truncate is None else truncate:
                text = encoder.without_end(text, start, start + len(passage))
            texts.append(text)
        both = [(f"{query} with {passage}",) for query, passage in names]
        return encoder.encode(texts, names=both, truncate=False, special=False)

    return preprocess


def _load(folder: Path, parameters: Mapping[str, str]) -> Stage:
    settings = LabelSettings.load(folder)

    def postprocess(tensors: Tensors) -> Tensors:
        return {"score": activate(tensors["logits"], settings.activation)}

    return postprocess


TASK = EncoderTask(
    name="text-ranking",
    texts=(Tensor("query", "STRING", (1,)), TEXT),
    options=(TRUNCATE, PROMPT_NAME),
    model_inputs=PAIR,
    model_outputs=(Tensor("logits", "FP32", ("labels",)),),
    read=("logits",),
    answers=(Tensor("score", "FP32", ("labels",)),),
    preprocess=_read,
    postprocess=_load,
)
