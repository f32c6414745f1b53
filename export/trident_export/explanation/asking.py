"""From a model and texts to explanations, whatever the task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trident_client import Client
from trident_export.errors import UsageError
from trident_export.explanation import generators, scores
from trident_export.explanation.encoders import EncoderStages, in_process, on_server
from trident_export.explanation.units import Attribution, By, Explanation, units
from trident_export.models_file import ModelSpec
from trident_export.progress import track

# What a command may say besides the text, by task; what of it must be said.
_TAKEN: Mapping[str, Sequence[str]] = {
    "text-classification": ("label", "pair"),
    "token-classification": ("label",),
    "text-ranking": ("query",),
    "question-answering": ("question",),
    "text-generation": ("answer", "chat", "max_tokens"),
}
_NEEDED = ("query", "question")
TASKS = tuple(_TAKEN)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is asked besides the texts; see `trident-export explain`. "" or 0: not said."""

    by: By = By.WORD
    query: str = ""
    question: str = ""
    pair: str = ""
    label: str = ""
    answer: str = ""
    chat: bool = False
    max_tokens: int = 0


def check(spec: ModelSpec, texts: Sequence[str], options: Options) -> None:
    """Refuse what a model can't be asked.

    Raises:
        UsageError: the message says what.
    """
    if spec.template:
        raise UsageError(f"{spec.name} is a template: ask for its generator, {spec.template.generator}")
    if spec.task not in _TAKEN:
        raise UsageError(f"{spec.task} models have no explanation; those of {', '.join(TASKS)} have one")
    for name in ("query", "question", "pair", "label", "answer", "chat", "max_tokens"):
        flag, said = f"--{name.replace('_', '-')}", bool(getattr(options, name))
        if said and name not in _TAKEN[spec.task]:
            raise UsageError(f"{flag} is not for {spec.task}")
        if not said and name in _TAKEN[spec.task] and name in _NEEDED:
            raise UsageError(f"{spec.task} needs a {name}: give {flag}")
    if options.max_tokens < 0:
        raise UsageError(f"--max-tokens must be 1 or more, found {options.max_tokens}")
    for text in (*texts, options.query, options.question, options.pair, options.answer):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"a text is not UTF-8, at character {error.start}: {text[:40]!r}") from None


def explain(
    spec: ModelSpec, variant: str, repository: Path, texts: Sequence[str], options: Options, client: Client | None
) -> list[Explanation]:
    """What each statement of a model about each of the texts rests on.

    Args:
        repository: of an encoder's stages, and of its graph where no server runs it.
        client: of the server that runs the graph; None: this process does. A generator needs one.

    Raises:
        TextError: a text can't be read, or the server refuses it.
        UsageError: the model has no such class.
    """
    model = spec.public_name(variant)
    if spec.generation:
        assert client is not None
        return [
            generators.explain(
                client,
                model,
                text,
                by=options.by,
                answer=options.answer,
                chat=options.chat,
                max_tokens=options.max_tokens or generators.TOKENS,
            )
            for text in texts
        ]
    graph = in_process(spec, variant, repository) if client is None else on_server(spec, variant, client)
    stages = EncoderStages(spec, repository, graph)
    return [
        found
        for text in texts
        for found in of_encoder(
            stages, model, _request(spec.task, text, options), options.by, options.label, client=client
        )
    ]


def _request(task: str, text: str, options: Options) -> dict[str, str]:
    if task == "question-answering":
        return {"question": options.question, "context": text}
    if task == "text-ranking":
        return {"query": options.query, "text_input": text}
    return {"text_input": text} | ({"text_pair": options.pair} if options.pair else {})


def of_encoder(
    stages: EncoderStages,
    model: str,
    texts: Mapping[str, str],
    by: By,
    label: str = "",
    *,
    client: Client | None = None,
) -> list[Explanation]:
    """What each statement of an encoder about a text rests on.

    Args:
        model: the variant's public name.
        texts: of a request, by name.
        label: see `scores.targets`.
        client: of the server whose whole answer must be the one that is explained; None: no server is asked.
    """
    reading = stages.read(texts)
    whole = stages.outputs(reading)
    if client is not None:
        stages.compare(client, model, reading, whole)
    targets = scores.targets(stages, reading, whole, label)
    tokens = [span for window in reading.tokens for span in window if span is not None]
    chosen = [unit for part, text in texts.items() for unit in units(part, text, by, tokens)]
    before = [target.score(whole) for target in targets]
    found: list[list[Attribution]] = [[] for _ in targets]
    if targets:
        for unit, outputs in zip(track(chosen, "hiding"), stages.without(reading, chosen, whole), strict=True):
            text = texts[unit.part][unit.start : unit.end]
            for row, target in enumerate(targets):
                found[row].append(Attribution(text, *unit, before[row] - target.score(outputs)))
    hidden = "masked" if stages.masks else "removed"
    return [
        Explanation(
            model, stages.task.name, target.of, score, target.measure, by, hidden, dict(texts), tuple(attributions)
        )
        for target, score, attributions in zip(targets, before, found, strict=True)
    ]
