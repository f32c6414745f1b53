"""What served models say of a text: the entities in it, its classes, or a judge's verdict.

The models are called over the server's own gRPC port, as template tasks call their generators (decision 0025).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trident_serving.errors import DeadlineExceeded, InvalidRequest, Overloaded, ServingError
from trident_serving.guard.filtering import Span
from trident_serving.guard.labels import Labels, unknown
from trident_serving.guard.rules import Guard, OnFailure, Rule
from trident_serving.text import encode_texts

logger = logging.getLogger(__name__)
Tensors = Mapping[str, NDArray[Any]]
VERDICT_TOKENS = 16


class Model(Protocol):
    """A served model."""

    async def infer(self, tensors: Tensors, seconds: float) -> Tensors:
        """The response to a call.

        Raises:
            ServingError: the model refuses it, or can't be reached.
        """
        ...

    async def close(self) -> None:
        """Close the connection."""
        ...


class Models:
    """The models that a guard's rules name.

    Args:
        connect: gives the model of a name.
        repository: that has them, where that is known: rules of entities are compared with their models' labels.
    """

    def __init__(self, guard: Guard, connect: Callable[[str], Model], repository: Path | None = None) -> None:
        self._guard = guard
        self._labels = Labels(repository)
        self._models = {rule.model: connect(rule.model) for rule in guard.rules if rule.model}

    @classmethod
    def of_server(
        cls, guard: Guard, own_pass: str, address: str | None = None, repository: Path | None = None
    ) -> Models:
        """Those of a server.

        Args:
            own_pass: what the requests carry; see `GrpcModel`.
            address: of its gRPC port; None: this server's own.
            repository: that it serves; None: it is not on this machine.
        """
        from trident_serving.template_service import GrpcEncoder, GrpcModel  # a guard of patterns needs no gRPC

        judges = {rule.judge for rule in guard.rules}
        return cls(
            guard, lambda name: (GrpcModel if name in judges else GrpcEncoder)(name, own_pass, address), repository
        )

    def about(self, deadline: float, user: str = "", *, answer: bool = False) -> Question:
        """What asks about the texts of one request.

        Args:
            deadline: when the request's time is over, by `time.monotonic`.
            user: what the user says, for a judge.
            answer: whether the texts answer that; False: they are it.
        """
        return Question(self._guard, self._models, deadline, user, answer=answer, labels=self._labels)

    async def close(self) -> None:
        """Close the connections."""
        for model in self._models.values():
            await model.close()


# What encoders say of a text that has no words for them: there is nothing to find in it.
_NOTHING = ("holds no token", "is empty")


class Question:
    """Implements `Asked` for the texts of one request."""

    def __init__(
        self,
        guard: Guard,
        models: Mapping[str, Model],
        deadline: float,
        user: str,
        *,
        answer: bool,
        labels: Labels,
    ) -> None:
        self._guard = guard
        self._labels = labels
        self._models = models
        self._deadline = deadline
        self._user = user
        self._answer = answer

    async def spans(self, rule: Rule, texts: Sequence[str]) -> list[list[Span]] | None:
        """See `Asked.spans`."""
        found: list[list[Span]] = []
        try:
            self._labels.check(rule)
            for start in range(0, len(texts), rule.batch):
                found += await self._batch(rule, texts[start : start + rule.batch])
        except InvalidRequest:
            raise
        except Exception as error:
            if isinstance(error, DeadlineExceeded) and self._left() <= 0:
                raise
            if not isinstance(error, ServingError):
                logger.exception("the guard's rule %s could not be checked", rule.name)
            if self._guard.on_failure is OnFailure.OPEN:
                return None
            raise Overloaded(f"the guard's rule {rule.name} could not be checked: {error}") from error
        return found

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    async def _batch(self, rule: Rule, texts: Sequence[str]) -> list[list[Span]]:
        """What a model says of texts that it takes at once; of those that it refuses, by halves.

        Raises:
            InvalidRequest: it can't read one.
        """
        if self._left() <= 0:
            raise DeadlineExceeded(f"the timeout was over before the guard's rule {rule.name} was checked")
        try:
            seconds = min(self._left(), self._guard.timeout)
            return _found(rule, await self._models[rule.model].infer(self._inputs(rule, texts), seconds), texts)
        except InvalidRequest as error:
            if len(texts) > 1:
                middle = len(texts) // 2
                return [*await self._batch(rule, texts[:middle]), *await self._batch(rule, texts[middle:])]
            if any(words in str(error) for words in _NOTHING):
                return [[]]
            raise InvalidRequest(f"the guard's rule {rule.name} can't read this text: {error}") from error

    def _inputs(self, rule: Rule, texts: Sequence[str]) -> dict[str, NDArray[Any]]:
        if not rule.judge:
            inputs = {"text_input": encode_texts(texts)[:, None]}
            return inputs | ({"top_k": np.full((len(texts), 1), rule.classes, np.int32)} if rule.classifier else {})
        (text,) = texts
        user, assistant = (self._user, text) if self._answer else (text, "")
        prompt = rule.prompt_template.render(user=user, assistant=assistant, policy=rule.policy)
        return {
            "messages": encode_texts([json.dumps([{"role": "user", "content": prompt}])])[None],
            "guided_choice": encode_texts(rule.verdicts)[None],
            "max_tokens": np.array([[VERDICT_TOKENS]], np.int32),
            "temperature": np.zeros((1, 1), np.float32),
        }


def _found(rule: Rule, tensors: Tensors, texts: Sequence[str]) -> list[list[Span]]:
    """What the answer of a model says of each text.

    Raises:
        ServingError: a classifier, which names all of its classes, has none of a label's name: the rule would find
            nothing, ever.
    """
    if rule.judge:
        verdict = tensors["text_output"].reshape(-1)[0].decode("utf-8").strip()
        return [[] if verdict == rule.verdicts[0] else [Span(0, len(text), verdict)] for text in texts]
    names = ("entity", "score", "start", "end") if rule.entities else ("label", "score")
    columns = [tensors[name].reshape(len(texts), -1).tolist() for name in names]
    found = []
    for text, *rows in zip(texts, *columns, strict=True):
        classes = sorted(label.decode("utf-8") for label in rows[0])
        if rule.classifier and (said := unknown(rule, classes)):
            raise ServingError(said)
        spans = []
        for label, score, *place in zip(*rows, strict=True):
            name = label.decode("utf-8")
            if name and (not rule.labels or name in rule.labels) and score >= rule.threshold:
                start, end = place or (0, len(text))
                spans.append(Span(start, end, name))
        found.append(sorted(spans, key=lambda span: span.start))
    return found
