"""What a client sends, as data: the two clients run it, each in its own way. Nothing here does input or output."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from numpy.typing import NDArray

from trident_client._errors import InvalidRequestError

Tensors = Mapping[str, NDArray[Any]]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Batch(Generic[Result]):
    """Requests that have one response each, and how their responses become the answer of a call.

    Attributes:
        task: whose only model is asked where `model` is None.
        model: public name.
        requests: the tensors of each.
        join: makes the answer from the responses' tensors, in the order of the requests.
    """

    task: str
    model: str | None
    requests: Sequence[Tensors]
    join: Callable[[list[dict[str, NDArray[Any]]]], Result]

    def joined(self, model: str, responses: Sequence[Tensors]) -> Result:
        """The answer of the call.

        Args:
            model: which one was asked.
            responses: to the requests, in their order.

        Raises:
            InvalidRequestError: the model has another task, which takes the same tensors and gives others.
        """
        return self.join([_Outputs(response, model, self.task) for response in responses])


class _Outputs(dict[str, NDArray[Any]]):
    """A response's tensors by name; that one is missing is a sentence."""

    def __init__(self, tensors: Tensors, model: str, task: str) -> None:
        super().__init__(tensors)
        self._model, self._task = model, task

    def __missing__(self, name: str) -> NDArray[Any]:
        raise InvalidRequestError(
            f"{self._model} has another task than {self._task}: it gives {', '.join(sorted(self))}, and no {name}"
        )


@dataclass(frozen=True)
class Prompt(Generic[Result]):
    """One request of a model that answers in as many responses as it likes: of a generator, or of speech.

    Attributes:
        task: whose only model is asked where `model` is None.
        model: public name.
        inputs: its tensors.
        stream: whether the answer is wanted as it comes, so that only silence is limited by the client's own timeout.
        parse: the chunks of a response.
    """

    task: str
    model: str | None
    inputs: Tensors
    stream: bool
    parse: Callable[[dict[str, NDArray[Any]]], list[Result]]

    def chunks(self, model: str, response: Tensors) -> list[Result]:
        """The chunks of a response.

        Args:
            model: which one was asked.

        Raises:
            InvalidRequestError: the model has another task, which takes the same tensors and gives others.
        """
        return self.parse(_Outputs(response, model, self.task))


@dataclass(frozen=True)
class Ask:
    """A question to a server about itself, or an order.

    Attributes:
        what: the answer is, in this order: bool, bool, None (or NotFoundError), the parameters of the model's config
            as texts by name, the names of the loaded models, a `ModelStatus` for each model of the repository, None,
            None.
        model: which one, where it is about one.
        alone: whether it has the whole timeout of a call for itself, as the loading of a model has.
    """

    what: Literal["live", "ready", "metadata", "parameters", "served", "index", "load", "unload"]
    model: str = ""
    alone: bool = False


RESTRICTED = ("index", "load", "unload")  # what the server answers only with its admin key


@dataclass(frozen=True)
class Pause:
    """Wait so many seconds."""

    seconds: float


# Yields what is to be done, is sent the answer, or has its error raised in it; returns the answer of the call.
Steps = Generator[Ask | Pause, Any, Result]
