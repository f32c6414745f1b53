"""What calls take and return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict


class Message(TypedDict):
    """One turn of a conversation; roles are the chat template's, usually `system`, `user`, `assistant`."""

    role: str
    content: str


@dataclass(frozen=True)
class GenerationChunk:
    """A piece of an answer.

    Attributes:
        text: the text that is new.
        finish_reason: "stop", "length" or "cancelled" in the last chunk, "" before.
        num_input_tokens: tokens of the prompt.
        num_output_tokens: tokens generated so far.
        log_probs: log-probabilities of the new tokens, where they were asked for.
        top_log_probs: for each new token the likeliest tokens, as id and log-probability, where they were asked for.
    """

    text: str
    finish_reason: str
    num_input_tokens: int
    num_output_tokens: int
    log_probs: tuple[float, ...] = ()
    top_log_probs: tuple[tuple[tuple[int, float], ...], ...] = ()


@dataclass(frozen=True)
class Label:
    """A class of a text, with its score."""

    label: str
    score: float


@dataclass(frozen=True)
class Entity:
    """A piece of a text, [start, end) in characters, with its class; `word` is the tokenizer's form of it."""

    entity: str
    score: float
    word: str
    start: int
    end: int


@dataclass(frozen=True)
class Answer:
    """A piece of the context, [start, end) in characters.

    Attributes:
        answer: its text; "" where the context does not answer the question.
        no_answer_score: of the context not answering the question at all.
    """

    answer: str
    score: float
    start: int
    end: int
    no_answer_score: float


@dataclass(frozen=True)
class Filling:
    """A token for a gap, and the text with it."""

    token_str: str
    score: float
    token: int
    sequence: str


@dataclass(frozen=True)
class Translation:
    """The answer of a translation or summarization model.

    Attributes:
        text: the answer.
        finish_reason: "stop", "length" where it was cut off at `max_tokens`, or "cancelled".
        num_input_tokens: tokens of the source.
        num_output_tokens: tokens generated.
        log_probs: of each token.
        scores: of each window of the source: the sum of the log-probabilities by the length penalty.
    """

    text: str
    finish_reason: str
    num_input_tokens: int
    num_output_tokens: int
    log_probs: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()


@dataclass(frozen=True)
class Ranked:
    """A passage of a list, by its place in it, with its score."""

    index: int
    score: float


@dataclass(frozen=True)
class Generation(GenerationChunk):
    """A complete answer: one chunk that holds all of it."""


@dataclass(frozen=True)
class ModelStatus:
    """A model that the server knows.

    Attributes:
        state: Triton's word, "READY" when it answers.
        reason: why it does not, where it does not.
    """

    name: str
    version: str
    state: str
    reason: str


@dataclass(frozen=True)
class Health:
    """Whether the server is up, and whether every model is loaded."""

    live: bool
    ready: bool
