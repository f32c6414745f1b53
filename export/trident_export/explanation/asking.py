"""From a model and texts to explanations, whatever the task."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

from trident_client import Client, TridentError
from trident_export.errors import TextError, UsageError
from trident_export.explanation import models
from trident_export.models_file import ModelSpec
from trident_export.progress import track
from trident_serving.errors import InvalidRequest
from trident_serving.explanation import asking, generators
from trident_serving.explanation.asking import Options
from trident_serving.explanation.encoders import Reading, Tensors
from trident_serving.explanation.units import Explanation, Span

# Flags that are shorter than what they stand for.
_FLAGS = {"text_pair": "--pair", "candidate_labels": "--candidate", "hypothesis_template": "--template"}


def check(spec: ModelSpec, texts: Sequence[str], options: Options) -> None:
    """Refuse what a model can't be asked.

    Raises:
        UsageError: the message says what.
    """
    if spec.template:
        raise UsageError(f"{spec.name} is a template: ask for its generator, {spec.template.generator}")
    try:
        asking.check(spec.task, options, lambda name: _FLAGS.get(name, f"--{name.replace('_', '-')}"))
    except InvalidRequest as error:
        raise UsageError(str(error)) from None
    said = [getattr(options, name) for name in asking.OPTIONS]
    for text in (*texts, *(each for each in said if isinstance(each, str)), *options.candidate_labels):
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
        TextError: a text can't be read, the server refuses it, or the model says no such thing of it.
    """
    model = spec.public_name(variant)
    try:
        if spec.generation:
            assert client is not None
            return [_of_generator(client, model, text, options) for text in texts]
        return _of_encoder(spec, variant, repository, texts, options, client)
    except InvalidRequest as error:
        raise TextError(str(error)) from error
    except TridentError as error:
        raise TextError(f"the server says: {error}") from error


def _of_generator(client: Client, model: str, text: str, options: Options) -> Explanation:
    return generators.explain(
        functools.partial(client.generate, model=model),
        model,
        text,
        by=options.by,
        answer=options.answer,
        chat=options.chat,
        max_tokens=options.max_tokens or generators.TOKENS,
    )


def _of_encoder(
    spec: ModelSpec, variant: str, repository: Path, texts: Sequence[str], options: Options, client: Client | None
) -> list[Explanation]:
    model = spec.public_name(variant)
    graph = models.in_process(spec, variant, repository) if client is None else models.on_server(spec, variant, client)
    stages = models.stages(spec, repository, graph)

    def look(reading: Reading, whole: Tensors) -> None:
        if client is not None:
            models.compare(stages, client, model, reading, whole)

    def watched(units: Sequence[Span]) -> Iterator[Span]:
        return track(units, "hiding")

    return [
        found for text in texts for found in asking.of_encoder(stages, model, text, options, look=look, watched=watched)
    ]
