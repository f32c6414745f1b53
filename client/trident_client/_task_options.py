"""The options of calls that read texts or images, for overloads."""

from __future__ import annotations

from typing import Literal, TypedDict


class TextOptions(TypedDict, total=False):
    """Options of every call that sends texts in batches.

    Attributes:
        model: public name; None: the server's only model of the task.
        truncate: whether to cut texts that are longer than the model takes; None leaves it to the server, which
            refuses them unless its models.toml says otherwise.
        batch_size: texts in one request, at most the model's `max_batch_size`; 32.
        timeout: seconds.
    """

    model: str | None
    truncate: bool | None
    batch_size: int
    timeout: float | None


class ClassifyOptions(TextOptions, total=False):
    """Options of `classify`; `top_k` says how many classes of each text are given, at most the model's; 1."""

    top_k: int


class ZeroShotOptions(TextOptions, total=False):
    """Options of `classify_zero_shot`, whose `batch_size` is 1.

    Attributes:
        hypothesis_template: the sentence for a label, with {} in its place; None: "This example is {}."
        multi_label: whether each label is scored by itself, so that the scores need not add up to 1.
    """

    hypothesis_template: str | None
    multi_label: bool | None


class EntityOptions(TextOptions, total=False):
    """Options of `entities`; `aggregation_strategy` None leaves it to the server."""

    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] | None


class AnswerOptions(TypedDict, total=False):
    """Options of `answer`.

    Attributes:
        top_k: answers to a question; 1.
        model: public name; None: the server's only model of the task.
        max_answer_len: tokens of an answer; None: 15.
        handle_impossible_answer: whether "" may be an answer.
        timeout: seconds.
    """

    top_k: int
    model: str | None
    max_answer_len: int | None
    handle_impossible_answer: bool | None
    timeout: float | None


class ImageOptions(TypedDict, total=False):
    """Options of every call that sends images.

    Attributes:
        model: public name; None: the server's only model of the task.
        batch_size: images in one request, at most the model's `max_batch_size`; 8.
        timeout: seconds.
    """

    model: str | None
    batch_size: int
    timeout: float | None
