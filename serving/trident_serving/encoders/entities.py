"""Named entities from a token classifier's logits, with every aggregation strategy of the transformers pipeline.

Reference: transformers, `TokenClassificationPipeline`; the scheme of labels is B-, I- and O.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from trident_serving.encoders.labels import LabelSettings, softmax
from trident_serving.encoders.task import (
    ENCODING,
    SCORE,
    SINGLE,
    TEXT,
    TRUNCATE,
    EncoderTask,
    Stage,
    Tensor,
    Tensors,
    flag,
)
from trident_serving.encoders.tokens import EncodingSettings, TextEncoder, TokenRoles, load_tokenizer
from trident_serving.errors import InvalidRequest
from trident_serving.schema.fields import Aggregation
from trident_serving.schema.reading import read_parameters
from trident_serving.text import decode_texts, encode_texts

Floats = NDArray[np.float32]

OUTSIDE = "O"


@dataclass(frozen=True)
class Entity:
    """A span of the text, [start, end) in characters, with its label."""

    label: str
    score: float
    word: str
    start: int
    end: int


@dataclass(frozen=True)
class _Token:
    word: str
    scores: Floats
    start: int
    end: int
    continues: bool


class EntityFinder:
    """Finds entities with a model's tokenizer and labels."""

    def __init__(self, tokenizer: Tokenizer, labels: Sequence[str], unk_token_id: int | None) -> None:
        self._tokenizer = tokenizer
        self._labels = list(labels)
        self._unk_token_id = unk_token_id
        # A tokenizer that marks continuations tells where words begin; elsewhere it is guessed from spaces.
        self._marks_continuations = bool(getattr(tokenizer.model, "continuing_subword_prefix", None))

    def find(
        self,
        text: str,
        input_ids: NDArray[np.int64],
        logits: Floats,
        spans: NDArray[np.int32],
        aggregation: Aggregation,
    ) -> list[Entity]:
        """The entities of one text, in its order; what is outside of any is left out.

        Args:
            input_ids: int64 [tokens].
            logits: float32 [tokens, labels].
            spans: characters of each token, int32 [tokens, 2]; -1 for special tokens and padding.
        """
        kept = np.flatnonzero(spans[:, 0] >= 0)
        scores = softmax(logits[kept])
        tokens = [
            self._token(text, int(input_ids[position]), row, int(spans[position, 0]), int(spans[position, 1]))
            for position, row in zip(kept, scores, strict=True)
        ]
        if aggregation in (Aggregation.NONE, Aggregation.SIMPLE):
            entities = [self._entity([token], token.word, token.scores) for token in tokens]
        else:
            entities = [self._word(group, aggregation) for group in _words(tokens)]
        if aggregation is not Aggregation.NONE:
            entities = [self._joined(group) for group in _neighbours(entities)]
        return [entity for entity in entities if entity.label != OUTSIDE]

    def _token(self, text: str, token_id: int, scores: Floats, start: int, end: int) -> _Token:
        original = text[start:end]
        if token_id == self._unk_token_id:
            return _Token(original, scores, start, end, continues=False)
        word = self._tokenizer.id_to_token(token_id) or ""
        if self._marks_continuations:
            continues = len(word) != len(original)
        else:
            continues = start > 0 and " " not in text[start - 1 : start + 1]
        return _Token(word, scores, start, end, continues)

    def _entity(self, tokens: Sequence[_Token], word: str, scores: Floats) -> Entity:
        best = int(scores.argmax())
        return Entity(self._labels[best], float(scores[best]), word, tokens[0].start, tokens[-1].end)

    def _word(self, tokens: Sequence[_Token], aggregation: Aggregation) -> Entity:
        if aggregation is Aggregation.FIRST:
            scores = tokens[0].scores
        elif aggregation is Aggregation.MAX:
            scores = max(tokens, key=lambda token: float(token.scores.max())).scores
        else:
            scores = np.mean([token.scores for token in tokens], axis=0)
        return self._entity(tokens, self._text(token.word for token in tokens), scores)

    def _joined(self, entities: Sequence[Entity]) -> Entity:
        return Entity(
            entities[0].label.split("-", 1)[-1],
            float(np.mean([entity.score for entity in entities])),
            self._text(entity.word for entity in entities),
            entities[0].start,
            entities[-1].end,
        )

    def _text(self, words: Iterable[str]) -> str:
        decoder = self._tokenizer.decoder
        tokens = list(words)
        text: str = decoder.decode(tokens) if decoder is not None else " ".join(tokens)
        return text


def kinds(labels: Iterable[str], aggregation: Aggregation) -> list[str]:
    """What entities can be, by the labels of a model's logits: `B-PER` and `I-PER` are `PER` where they are joined."""
    inside = [label for label in labels if label != OUTSIDE]
    joined = aggregation is not Aggregation.NONE
    return [*dict.fromkeys(label.split("-", 1)[-1] if joined else label for label in inside)]


def _words(tokens: Sequence[_Token]) -> list[list[_Token]]:
    words: list[list[_Token]] = []
    for token in tokens:
        if words and token.continues:
            words[-1].append(token)
        else:
            words.append([token])
    return words


def _neighbours(entities: Sequence[Entity]) -> list[list[Entity]]:
    """Runs of entities with the same label, where none but the first begins one (B-)."""
    groups: list[list[Entity]] = []
    for entity in entities:
        prefix, label = _parts(entity.label)
        if groups and _parts(groups[-1][-1].label)[1] == label and prefix != "B":
            groups[-1].append(entity)
        else:
            groups.append([entity])
    return groups


def _parts(label: str) -> tuple[str, str]:
    """B or I, and the kind of entity; a label with neither counts as I."""
    if label[:2] in ("B-", "I-"):
        return label[0], label[2:]
    return "I", label


def _load(folder: Path, parameters: Mapping[str, str]) -> Stage:
    finder = EntityFinder(
        load_tokenizer(folder), LabelSettings.load(folder).labels, TokenRoles.load(folder).unk_token_id
    )
    default = Aggregation(parameters["aggregation"])

    def postprocess(tensors: Tensors) -> Tensors:
        aggregation = _aggregation(tensors, default)
        texts = decode_texts(tensors["text_input"], "text_input")
        owners = tensors["window_text"]
        found = []
        for row, text in enumerate(texts):  # its windows one after another: no token is shown twice
            ids, logits, spans = (
                np.concatenate(tensors[name][owners == row]) for name in ("input_ids", "logits", "token_spans")
            )
            found.append(finder.find(text, ids, logits, spans, aggregation))
        return padded_spans(found)

    return postprocess


def _read(folder: Path, parameters: Mapping[str, str]) -> Stage:
    settings = read_parameters(EncodingSettings, parameters)
    encoder = TextEncoder.load(folder, settings)
    most = int(parameters["max_windows"])

    def preprocess(tensors: Tensors) -> Tensors:
        texts = decode_texts(tensors["text_input"], "text_input", settings.max_bytes)
        return encoder.windows(texts, most, truncate=flag(tensors, "truncate"))

    return preprocess


def _aggregation(tensors: Tensors, default: Aggregation) -> Aggregation:
    if "aggregation_strategy" not in tensors:
        return default
    names = decode_texts(tensors["aggregation_strategy"][:1], "aggregation_strategy")
    if not names:
        raise InvalidRequest("aggregation_strategy is empty: it must hold a text, or be left out")
    (name,) = names
    if name not in list(Aggregation):
        raise InvalidRequest(f"aggregation_strategy must be one of {', '.join(Aggregation)}, found {name[:80]!r}")
    return Aggregation(name)


def padded_spans(found: Sequence[Sequence[Entity]]) -> Tensors:
    """[texts, spans] each; shorter rows are filled with empty spans, whose start is -1."""
    width = max(map(len, found), default=0)
    nothing = Entity("", 0.0, "", -1, -1)
    rows = [[*entities, *[nothing] * (width - len(entities))] for entities in found]
    shape = (len(rows), width)
    flat = [entity for row in rows for entity in row]
    return {
        "entity": encode_texts(entity.label for entity in flat).reshape(shape),
        "score": np.array([entity.score for entity in flat], np.float32).reshape(shape),
        "word": encode_texts(entity.word for entity in flat).reshape(shape),
        "start": np.array([entity.start for entity in flat], np.int32).reshape(shape),
        "end": np.array([entity.end for entity in flat], np.int32).reshape(shape),
    }


# A request's texts are its batch, and those of the graph are windows: the shapes are those of tasks that batch.
TASK = EncoderTask(
    name="token-classification",
    texts=(TEXT.rows,),
    options=(TRUNCATE.rows,),
    model_inputs=SINGLE,
    model_outputs=(Tensor("logits", "FP32", (-1, "labels")),),
    extra=(Tensor("token_spans", "INT32", (-1, -1, 2)), Tensor("window_text", "INT32", (-1,))),
    read=("text_input", "input_ids", "logits", "token_spans", "window_text"),
    answer_options=(Tensor("aggregation_strategy", "STRING", (-1, 1)),),
    answers=(
        Tensor("entity", "STRING", (-1, -1)),
        SCORE.rows,
        Tensor("word", "STRING", (-1, -1)),
        Tensor("start", "INT32", (-1, -1)),
        Tensor("end", "INT32", (-1, -1)),
    ),
    batched=False,
    parameters={**ENCODING, "max_windows": "max_batch_size"},
    answer_parameters={"aggregation": "aggregation"},
    preprocess=_read,
    postprocess=_load,
)
