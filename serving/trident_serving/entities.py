"""Named entities from a token classifier's logits, with every aggregation strategy of the transformers pipeline.

Reference: transformers, `TokenClassificationPipeline`; the scheme of labels is B-, I- and O.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from trident_serving.classification import softmax
from trident_serving.schema.fields import Aggregation

Floats = NDArray[np.float32]

OUTSIDE = "O"


@dataclass(frozen=True)
class Entity:
    """A piece of the text, [start, end) in characters, with its label."""

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
            self._token(text, int(input_ids[place]), row, int(spans[place, 0]), int(spans[place, 1]))
            for place, row in zip(kept, scores, strict=True)
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
        word = self._tokenizer.id_to_token(token_id)
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
        pieces = list(words)
        text: str = decoder.decode(pieces) if decoder is not None else " ".join(pieces)
        return text


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
