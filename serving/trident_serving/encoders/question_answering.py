"""Extractive question answering: contexts to windows, and the windows' logits to answers.

The algorithm is that of the transformers pipeline: a long context is read in windows that overlap, probabilities are
normalized within a window over the context's tokens and the first token, a span's score is the product of its start and
its end, spans grow to whole words, and answers of the same text add up.
Reference: transformers, `QuestionAnsweringPipeline`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from trident_serving.encoders.entities import Entity, padded_spans
from trident_serving.encoders.task import ENCODING, PAIR, TOP_K, EncoderTask, Stage, Tensor, Tensors, count, flag
from trident_serving.encoders.tokens import Batcher, EncodingSettings, TokenRoles, load_tokenizer
from trident_serving.errors import InvalidRequest
from trident_serving.schema.reading import read_parameters
from trident_serving.text import decode_texts

Floats = NDArray[np.float32]

DEFAULT_MAX_ANSWER_LEN = 15
LONGEST_ANSWER = 512
MAX_ANSWERS = 100
_MASKED = -10000.0


@dataclass(frozen=True)
class WindowSettings:
    """How a long context is read.

    Attributes:
        stride: tokens that a window repeats of the one before.
        max_windows: of one request; more are refused.
    """

    stride: int
    max_windows: int

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> WindowSettings:
        """Read the settings from a config's parameters."""
        return cls(int(parameters["stride"]), int(parameters["max_windows"]))


class QuestionEncoder:
    """Questions and contexts to windows."""

    def __init__(
        self, tokenizer: Tokenizer, settings: EncodingSettings, windows: WindowSettings, roles: TokenRoles
    ) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._windows = windows
        self._roles = roles
        self._batcher = Batcher(tokenizer, settings)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._special = tokenizer.num_special_tokens_to_add(is_pair=True)

    @classmethod
    def load(cls, folder: Path, settings: EncodingSettings, windows: WindowSettings) -> QuestionEncoder:
        """Read `tokenizer.json` and `encoding.json`."""
        return cls(load_tokenizer(folder), settings, windows, TokenRoles.load(folder))

    def encode(self, questions: Sequence[str], contexts: Sequence[str]) -> Tensors:
        """The windows of every question over its context; one context serves all questions.

        Returns:
            `input_ids`, `attention_mask` and `token_type_ids`, int64 [windows, bucket]; `window_question`, int32
            [windows]; `token_spans`, int32 [windows, bucket, 4]: characters from start to end of the token and of
            its word in the context, -1 where a token can't be part of an answer.

        Raises:
            InvalidRequest: a question or context is empty, a question leaves no room in a window, the windows are
                too many, or the numbers of questions and contexts differ.
        """
        if len(contexts) == 1:
            contexts = list(contexts) * len(questions)
        if len(contexts) != len(questions) or not questions:
            raise InvalidRequest(
                f"there are {len(questions)} questions and {len(contexts)} contexts: give one context, or one each"
            )
        windows: list[Encoding] = []
        owners: list[int] = []
        for row, (question, context) in enumerate(zip(questions, contexts, strict=True)):
            found = self._cut(question, context, f"[{row}]" if len(questions) > 1 else "")
            windows += found
            owners += [row] * len(found)
        if len(windows) > self._windows.max_windows:
            raise InvalidRequest(
                f"question and context take {len(windows)} windows of {self._settings.max_tokens} tokens, the limit is "
                f"{self._windows.max_windows}: shorten the context, or ask fewer questions at once"
            )
        tensors = self._batcher.tensors(windows)
        spans = np.full((*tensors["input_ids"].shape, 4), -1, np.int32)
        for row, window in enumerate(windows):
            spans[row, : len(window.ids)] = _spans(window, self._roles.cls_token_id)
        return tensors | {"token_spans": spans, "window_question": np.array(owners, np.int32)}

    def _cut(self, question: str, context: str, row: str) -> list[Encoding]:
        length = len(self._tokenizer.encode(question, add_special_tokens=False).ids)
        room = self._settings.max_tokens - self._special - length
        if not length:
            raise InvalidRequest(f"question{row} is empty: {question[:80]!r} holds no token")
        if room <= self._windows.stride:
            most = self._settings.max_tokens - self._special - self._windows.stride - 1
            raise InvalidRequest(
                f"question{row} has {length} tokens, the limit is {most}: a window of {self._settings.max_tokens} "
                "tokens must hold it and a part of the context"
            )
        self._tokenizer.enable_truncation(
            self._settings.max_tokens, stride=self._windows.stride, strategy="only_second"
        )
        try:
            first: Encoding = self._tokenizer.encode(question, context)
        finally:
            self._tokenizer.no_truncation()
        if 1 not in first.sequence_ids:
            raise InvalidRequest(f"context{row} is empty: {context[:80]!r} holds no token")
        return [first, *first.overflowing]


def _spans(window: Encoding, cls_token_id: int | None) -> NDArray[np.int32]:
    spans = np.full((len(window.ids), 4), -1, np.int32)
    context = np.array([sequence == 1 for sequence in window.sequence_ids])
    spans[context, :2] = np.array(window.offsets, np.int32)[context]
    words = np.array([-1 if word is None else word for word in window.word_ids])
    for word in np.unique(words[context]):
        if word >= 0:
            tokens = np.flatnonzero(context & (words == word))
            spans[tokens, 2], spans[tokens, 3] = spans[tokens[0], 0], spans[tokens[-1], 1]
    # The first token takes part in the softmax: it stands for "no answer".
    spans[np.array(window.ids) == cls_token_id, :2] = 0
    return spans


@dataclass(frozen=True)
class Answer:
    """A span of a context, [start, end) in characters; the empty span is "no answer"."""

    text: str
    score: float
    start: int
    end: int


def find_answers(
    context: str,
    start_logits: Floats,
    end_logits: Floats,
    spans: NDArray[np.int32],
    *,
    top_k: int = 1,
    max_answer_len: int = DEFAULT_MAX_ANSWER_LEN,
    handle_impossible_answer: bool = False,
) -> tuple[list[Answer], float]:
    """The answers to one question, the best first, and the score of there being none.

    Args:
        context: the text that the spans count characters of.
        start_logits: and `end_logits`, float32 [windows, tokens].
        spans: of the windows' tokens, see `QuestionEncoder.encode`.
        max_answer_len: tokens of an answer.
        handle_impossible_answer: whether "no answer" is among the answers.
    """
    found: dict[str, list[Any]] = {}  # text in lower case -> text, score, start, end
    no_answer = 1e6
    for start_row, end_row, window_spans in zip(start_logits, end_logits, spans, strict=True):
        allowed = window_spans[:, 0] >= 0
        start, end = _probabilities(start_row, allowed), _probabilities(end_row, allowed)
        no_answer = min(no_answer, float(start[0] * end[0]))
        start[0] = end[0] = 0.0
        for first, last, score in _best_spans(start, end, allowed, 2 * top_k + 10, max_answer_len):
            begin, stop = _characters(window_spans[first], window_spans[last])
            text = context[begin:stop]
            known = found.setdefault(text.lower(), [text, 0.0, begin, stop])
            known[1] += score
    answers = [Answer(text, score, begin, stop) for text, score, begin, stop in found.values()]
    if handle_impossible_answer:
        answers.append(Answer("", no_answer, 0, 0))
    return sorted(answers, key=lambda answer: answer.score, reverse=True)[:top_k], no_answer


def _probabilities(logits: Floats, allowed: NDArray[np.bool_]) -> Floats:
    masked = np.where(allowed, logits, np.float32(_MASKED))
    powers = np.exp(masked - masked.max())
    result: Floats = powers / powers.sum()
    return result


def _best_spans(
    start: Floats, end: Floats, allowed: NDArray[np.bool_], count: int, longest: int
) -> list[tuple[int, int, float]]:
    """First and last token and score of the likeliest spans of at most `longest` tokens, the best first."""
    scores = np.tril(np.triu(np.outer(start, end)), longest - 1).reshape(-1)
    if count < scores.size:
        best = np.argpartition(-scores, count)[:count]
        best = best[np.argsort(-scores[best])]
    else:
        best = np.argsort(-scores)
    firsts, lasts = np.unravel_index(best, (start.size, end.size))
    kept = allowed[firsts] & allowed[lasts]
    return [
        (int(first), int(last), float(scores[index]))
        for first, last, index in zip(firsts[kept], lasts[kept], best[kept], strict=True)
    ]


def _characters(first: NDArray[np.int32], last: NDArray[np.int32]) -> tuple[int, int]:
    if first[2] >= 0 and last[3] >= 0:
        return int(first[2]), int(last[3])
    return int(first[0]), int(last[1])  # a tokenizer without words


def _read(folder: Path, parameters: Mapping[str, str]) -> Stage:
    settings = read_parameters(EncodingSettings, parameters)
    encoder = QuestionEncoder.load(folder, settings, WindowSettings.from_parameters(parameters))

    def preprocess(tensors: Tensors) -> Tensors:
        questions, contexts = (
            decode_texts(tensors[name], name, settings.max_bytes) for name in ("question", "context")
        )
        return encoder.encode(questions, contexts)

    return preprocess


def _load(folder: Path, parameters: Mapping[str, str]) -> Stage:
    def postprocess(tensors: Tensors) -> Tensors:
        top_k = count(tensors, "top_k", 1, MAX_ANSWERS, "answers")
        longest = count(tensors, "max_answer_len", DEFAULT_MAX_ANSWER_LEN, LONGEST_ANSWER, "tokens")
        impossible = bool(flag(tensors, "handle_impossible_answer"))
        contexts = decode_texts(tensors["context"], "context")
        owners = tensors["window_question"]
        if len(contexts) == 1:
            contexts = contexts * (int(owners.max()) + 1)
        found, no_answer = [], []
        for row, context in enumerate(contexts):
            windows = [tensors[name][owners == row] for name in ("start_logits", "end_logits", "token_spans")]
            answers, score = find_answers(
                context, *windows, top_k=top_k, max_answer_len=longest, handle_impossible_answer=impossible
            )
            found.append([Entity("", answer.score, answer.text, answer.start, answer.end) for answer in answers])
            no_answer.append(score)
        rows = dict(padded_spans(found))
        del rows["entity"]
        return {"answer": rows.pop("word"), **rows, "no_answer_score": np.array(no_answer, np.float32)}

    return postprocess


TASK = EncoderTask(
    name="question-answering",
    texts=(Tensor("question", "STRING", (-1,)), Tensor("context", "STRING", (-1,))),
    model_inputs=PAIR,
    model_outputs=(Tensor("start_logits", "FP32", (-1,)), Tensor("end_logits", "FP32", (-1,))),
    extra=(Tensor("token_spans", "INT32", (-1, -1, 4)), Tensor("window_question", "INT32", (-1,))),
    read=("context", "start_logits", "end_logits", "token_spans", "window_question"),
    answer_options=(TOP_K, Tensor("max_answer_len", "INT32", (1,)), Tensor("handle_impossible_answer", "BOOL", (1,))),
    answers=(
        Tensor("answer", "STRING", (-1, -1)),
        Tensor("score", "FP32", (-1, -1)),
        Tensor("start", "INT32", (-1, -1)),
        Tensor("end", "INT32", (-1, -1)),
        Tensor("no_answer_score", "FP32", (-1,)),
    ),
    batched=False,
    parameters={**ENCODING, "stride": "stride", "max_windows": "max_batch_size"},
    preprocess=_read,
    postprocess=_load,
)
