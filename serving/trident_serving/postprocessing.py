"""The last stage of an ensemble: what a task makes of its model's output tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trident_serving import question_answering
from trident_serving.classification import Activation, activate, best
from trident_serving.encoding import TokenRoles, load_tokenizer
from trident_serving.entities import Entity, EntityFinder
from trident_serving.errors import InvalidRequest
from trident_serving.pooling import PoolingSettings, normalize
from trident_serving.schema.fields import Aggregation
from trident_serving.text import decode_texts, encode_texts

Tensors = Mapping[str, NDArray[Any]]
Postprocess = Callable[[Tensors], Tensors]

_LABELS = "labels.json"
DEFAULT_FILL_TOP_K = 5
MAX_ANSWERS = 100


def create(parameters: Mapping[str, str], folder: Path) -> Postprocess:
    """The postprocess that a config's `parameters` name, with its settings from the version folder.

    Raises:
        ValueError: the task is unknown, or a setting is malformed.
    """
    task = parameters.get("task")
    if task not in _TASKS:
        raise ValueError(f"parameter 'task' must be one of {', '.join(_TASKS)}, found {task!r}")
    return _TASKS[task](folder, parameters)


@dataclass(frozen=True)
class LabelSettings:
    """A classifier's labels, in the order of its logits, and what makes scores; `labels.json`."""

    labels: tuple[str, ...]
    activation: Activation

    @classmethod
    def load(cls, folder: Path) -> LabelSettings:
        """Read `folder/labels.json`."""
        settings = json.loads((folder / _LABELS).read_text(encoding="utf-8"))
        return cls(tuple(settings["labels"]), Activation(settings["activation"]))

    def save(self, folder: Path) -> None:
        """Write `folder/labels.json`."""
        (folder / _LABELS).write_text(json.dumps(asdict(self), ensure_ascii=False) + "\n", encoding="utf-8")


def _embedding(folder: Path, parameters: Mapping[str, str]) -> Postprocess:
    settings = PoolingSettings.load(folder)

    def postprocess(tensors: Tensors) -> Tensors:
        vectors = tensors["pooled"]
        return {"embedding": normalize(vectors) if settings.normalize else vectors}

    return postprocess


def _classification(folder: Path, parameters: Mapping[str, str]) -> Postprocess:
    settings = LabelSettings.load(folder)
    labels = np.array([label.encode() for label in settings.labels], np.object_)

    def postprocess(tensors: Tensors) -> Tensors:
        top_k = _count(tensors, "top_k", 1, len(labels), "the model's labels")
        places, scores = best(activate(tensors["logits"], settings.activation), top_k)
        return {"label": labels[places], "score": scores}

    return postprocess


def _ranking(folder: Path, parameters: Mapping[str, str]) -> Postprocess:
    settings = LabelSettings.load(folder)

    def postprocess(tensors: Tensors) -> Tensors:
        return {"score": activate(tensors["logits"], settings.activation)}

    return postprocess


def _entities(folder: Path, parameters: Mapping[str, str]) -> Postprocess:
    finder = EntityFinder(
        load_tokenizer(folder), LabelSettings.load(folder).labels, TokenRoles.load(folder).unk_token_id
    )
    default = Aggregation(parameters["aggregation"])

    def postprocess(tensors: Tensors) -> Tensors:
        aggregation = _aggregation(tensors, default)
        texts = decode_texts(tensors["text_input"], "text_input")
        rows = zip(texts, tensors["input_ids"], tensors["logits"], tensors["token_spans"], strict=True)
        found = [finder.find(text, ids, logits, spans, aggregation) for text, ids, logits, spans in rows]
        return _entity_tensors(found)

    return postprocess


def _aggregation(tensors: Tensors, default: Aggregation) -> Aggregation:
    if "aggregation_strategy" not in tensors:
        return default
    name = decode_texts(tensors["aggregation_strategy"][:1], "aggregation_strategy")[0]
    if name not in list(Aggregation):
        raise InvalidRequest(f"aggregation_strategy must be one of {', '.join(Aggregation)}, found {name[:80]!r}")
    return Aggregation(name)


def _entity_tensors(found: Sequence[Sequence[Entity]]) -> Tensors:
    """[texts, entities] each; shorter rows are filled with empty entities, whose start is -1."""
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


def _answers(folder: Path, parameters: Mapping[str, str]) -> Postprocess:
    def postprocess(tensors: Tensors) -> Tensors:
        top_k = _count(tensors, "top_k", 1, MAX_ANSWERS, "answers")
        longest = _count(tensors, "max_answer_len", question_answering.DEFAULT_MAX_ANSWER_LEN, 512, "tokens")
        impossible = bool(tensors["handle_impossible_answer"].any()) if "handle_impossible_answer" in tensors else False
        contexts = decode_texts(tensors["context"], "context")
        owners = tensors["window_question"]
        count = int(owners.max()) + 1
        if len(contexts) == 1:
            contexts = contexts * count
        found, no_answer = [], []
        for row, context in enumerate(contexts):
            windows = [tensors[name][owners == row] for name in ("start_logits", "end_logits", "token_spans")]
            answers, score = question_answering.find_answers(
                context, *windows, top_k=top_k, max_answer_len=longest, handle_impossible_answer=impossible
            )
            found.append([Entity("", answer.score, answer.text, answer.start, answer.end) for answer in answers])
            no_answer.append(score)
        rows = dict(_entity_tensors(found))
        del rows["entity"]
        return {"answer": rows.pop("word"), **rows, "no_answer_score": np.array(no_answer, np.float32)}

    return postprocess


def _fill_mask(folder: Path, parameters: Mapping[str, str]) -> Postprocess:
    tokenizer = load_tokenizer(folder)
    roles = TokenRoles.load(folder)

    def postprocess(tensors: Tensors) -> Tensors:
        if len(tensors["input_ids"]) > 1:  # texts may have different numbers of gaps
            raise InvalidRequest(f"text_input must be one text a request, found {len(tensors['input_ids'])}")
        input_ids, mask = tensors["input_ids"][0], tensors["attention_mask"][0]
        ids = input_ids[mask > 0]
        gaps = np.flatnonzero(ids == roles.mask_token_id)
        if not gaps.size:
            token = tokenizer.id_to_token(roles.mask_token_id)
            raise InvalidRequest(f"text_input has no gap to fill: write {token} in its place")
        top_k = _count(tensors, "top_k", DEFAULT_FILL_TOP_K, tensors["top_scores"].shape[-1], "tokens")
        tokens = tensors["top_ids"][0, gaps, :top_k]
        scores = np.exp(tensors["top_scores"][0, gaps, :top_k] - tensors["log_normalizer"][0, gaps, None])
        sequences = []
        for gap, row in zip(gaps, tokens, strict=True):
            for token in row:
                filled = ids.copy()
                filled[gap] = token
                # With several gaps the others must show.
                sequences.append(tokenizer.decode(filled.tolist(), skip_special_tokens=len(gaps) == 1))
        shape = (1, gaps.size, top_k)
        words = [tokenizer.decode([token], skip_special_tokens=False) for token in tokens.reshape(-1).tolist()]
        return {
            "token_str": encode_texts(words).reshape(shape),
            "score": scores.astype(np.float32).reshape(shape),
            "token": tokens.astype(np.int32).reshape(shape),
            "sequence": encode_texts(sequences).reshape(shape),
        }

    return postprocess


def _count(tensors: Tensors, name: str, default: int, most: int, what: str) -> int:
    """An optional whole number of a request, from 1 to `most`."""
    if name not in tensors:
        return default
    value = int(tensors[name].reshape(-1)[0])
    if not 1 <= value <= most:
        raise InvalidRequest(f"{name} must be between 1 and {most} ({what}), found {value}")
    return value


_TASKS: dict[str, Callable[[Path, Mapping[str, str]], Postprocess]] = {
    "feature-extraction": _embedding,
    "text-classification": _classification,
    "text-ranking": _ranking,
    "token-classification": _entities,
    "question-answering": _answers,
    "fill-mask": _fill_mask,
}
