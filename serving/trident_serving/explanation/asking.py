"""From a text and what is asked of it to explanations, whatever the task; and what may be asked of which task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from trident_serving.errors import InvalidRequest
from trident_serving.explanation import scores
from trident_serving.explanation.encoders import EncoderStages, Reading, Tensors
from trident_serving.explanation.units import Attribution, By, Explanation, Span, check_work, units

# What a request may say besides the text, by task; what of it must be said.
_TAKEN: Mapping[str, Sequence[str]] = {
    "text-classification": ("label", "text_pair"),
    "token-classification": ("label",),
    "text-ranking": ("query",),
    "question-answering": ("question",),
    "zero-shot-classification": ("candidate_labels", "label", "hypothesis_template", "multi_label"),
    "fill-mask": ("label",),
    "text-generation": ("answer", "chat", "max_tokens"),
}
_NEEDED = ("query", "question", "candidate_labels")
TASKS = tuple(_TAKEN)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is asked besides the text. "" or 0: not said.

    Attributes:
        by: what is hidden at a time.
        query: of a ranker.
        question: of question answering, whose text is the context.
        text_pair: the second text of a classifier of pairs.
        label: the class that is explained; of a masked text the token; "": the likeliest.
        candidate_labels: of zero-shot classification.
        hypothesis_template: the sentence for one of them.
        multi_label: whether each of them has a score of its own.
        answer: of a generator; "": what it answers.
        chat: whether the text is a message.
        max_tokens: of an answer that the generator gives.
    """

    by: By = By.WORD
    query: str = ""
    question: str = ""
    text_pair: str = ""
    label: str = ""
    candidate_labels: tuple[str, ...] = ()
    hypothesis_template: str = ""
    multi_label: bool = False
    answer: str = ""
    chat: bool = False
    max_tokens: int = 0


OPTIONS = tuple(field.name for field in fields(Options) if field.name != "by")


def check(task: str, options: Options, shown: Callable[[str], str] = str) -> None:
    """Refuse what a model can't be asked.

    Args:
        shown: how an option is written where it is asked for.

    Raises:
        InvalidRequest: the message says what.
    """
    if task not in _TAKEN:
        raise InvalidRequest(f"{task} models have no explanation; those of {', '.join(TASKS)} have one")
    for name in OPTIONS:
        said = bool(getattr(options, name))
        if said and name not in _TAKEN[task]:
            raise InvalidRequest(f"{shown(name)} is not for {task}")
        if not said and name in _TAKEN[task] and name in _NEEDED:
            raise InvalidRequest(f"{task} needs {shown(name)}")
    if options.max_tokens < 0:
        raise InvalidRequest(f"{shown('max_tokens')} must be 1 or more, found {options.max_tokens}")


def of_encoder(
    stages: EncoderStages,
    model: str,
    text: str,
    options: Options,
    *,
    most: int | None = None,
    look: Callable[[Reading, Tensors], None] = lambda reading, whole: None,
    watched: Callable[[Sequence[Span]], Iterable[Span]] = iter,
) -> list[Explanation]:
    """What each statement of an encoder about a text rests on.

    Args:
        model: the variant's public name.
        most: texts that the graph may read for it; None: any.
        look: is shown what the graph gives for the whole text, before anything is hidden.
        watched: gives the units again, one by one, as they are hidden.

    Raises:
        InvalidRequest: the text can't be read, makes too much work, or the model says no such thing of it.
    """
    texts, asked = _request(stages.task.name, text, options)
    reading = stages.read(texts, asked)
    tokens = [span for window in reading.tokens for span in window if span is not None]
    chosen = [unit for part, each in texts.items() for unit in units(part, each, options.by, tokens)]
    check_work(stages.runs(reading, chosen), most)
    whole = stages.outputs(reading)
    look(reading, whole)
    targets = scores.targets(stages, reading, whole, options.label)
    before = [target.score(whole) for target in targets]
    found: list[list[Attribution]] = [[] for _ in targets]
    if targets:
        for unit, outputs in zip(watched(chosen), stages.without(reading, chosen, whole), strict=True):
            hidden_text = texts[unit.part][unit.start : unit.end]
            for row, target in enumerate(targets):
                found[row].append(Attribution(hidden_text, *unit, before[row] - target.score(outputs)))
    hidden = "masked" if stages.masks else "removed"
    return [
        Explanation(
            model, stages.task.name, target.of, score, target.measure, options.by, hidden, texts, tuple(attributions)
        )
        for target, score, attributions in zip(targets, before, found, strict=True)
    ]


def _request(task: str, text: str, options: Options) -> tuple[dict[str, str], dict[str, Any]]:
    """The texts whose units are hidden, by their names in a request, and what else it holds."""
    if task == "question-answering":
        return {"question": options.question, "context": text}, {}
    if task == "text-ranking":
        return {"query": options.query, "text_input": text}, {}
    if task == "zero-shot-classification":
        asked: dict[str, Any] = {"candidate_labels": options.candidate_labels}
        if options.hypothesis_template:
            asked["hypothesis_template"] = [options.hypothesis_template]
        if options.multi_label:
            asked["multi_label"] = True
        return {"text_input": text}, asked
    return {"text_input": text} | ({"text_pair": options.text_pair} if options.text_pair else {}), {}
