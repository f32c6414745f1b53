"""Answers requests for explanations of one model, by calls to that model over the server's own gRPC port.

A request is explained on a thread of its own, which has one call of the graph in flight, or a few of a generator, and
looks before each whether its client is still there. docs/decisions/0086 says why this is a model beside the other.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trident_serving.encoders import TASKS
from trident_serving.errors import Cancelled, DeadlineExceeded, InvalidRequest, Overloaded, ServingError
from trident_serving.explanation import asking, generators, report
from trident_serving.explanation.asking import Options
from trident_serving.explanation.encoders import EncoderStages
from trident_serving.explanation.generators import Answered
from trident_serving.explanation.units import By, Explanation
from trident_serving.schema.fields import EXPLANATION, Inputs, by_name, single_text
from trident_serving.schema.limits import LIMITS, EncoderLimits, ExplanationLimits
from trident_serving.schema.reading import read_parameters
from trident_serving.text import decode_texts, encode_texts

logger = logging.getLogger(__name__)
Tensors = Mapping[str, NDArray[Any]]

REQUESTS_AT_ONCE = 2
PROMPTS_AT_ONCE = 4  # of one request; more would crowd other requests out of the generator's queue
WATCH_SECONDS = 0.2  # between two looks, while a call runs, at whether its answer is still wanted
_FIELDS = by_name(EXPLANATION)
_TEXTS = ("query", "question", "text_pair", "label", "hypothesis_template", "answer")
_GENERATION = "text-generation"


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


class Channel(Protocol):
    """Takes the one response to a request; called from any thread."""

    def is_cancelled(self) -> bool:
        """Whether the client has gone."""
        ...

    def send(self, result: Tensors) -> None:
        """Send the answer."""
        ...

    def fail(self, error: Exception) -> None:
        """Send an error."""
        ...


@dataclass(frozen=True)
class Asked:
    """A checked request.

    Attributes:
        variant: "": the default one.
        page: whether the page is wanted, too.
    """

    text: str
    options: Options
    variant: str
    page: bool


@dataclass(frozen=True)
class Explained:
    """The model that is explained, from the parameters of the explanation's config.

    Attributes:
        name: its public name.
        variants: the public name of each variant, the default one first.
        folders: holds its stages: the repository, as the server sees it.
        version: of the model, whose files and graph are asked.
    """

    name: str
    task: str
    variants: Mapping[str, str]
    folders: Path
    version: str

    @classmethod
    def read(cls, parameters: Mapping[str, str], folders: Path, version: str) -> Explained:
        """Read the parameters `explains`, `task` and `variants`."""
        pairs = (each.partition("=") for each in parameters["variants"].split(","))
        variants = {variant: name for variant, _, name in pairs}
        return cls(parameters["explains"], parameters["task"], variants, folders, version)

    def public_name(self, variant: str) -> str:
        """The name under which clients call a variant; "": the default one.

        Raises:
            InvalidRequest: there is no such variant.
        """
        if variant and variant not in self.variants:
            raise InvalidRequest(f"variant must be one of {', '.join(self.variants)}, found {variant[:80]!r}")
        return self.variants[variant] if variant else next(iter(self.variants.values()))

    @property
    def stage_folders(self) -> tuple[Path, ...]:
        """The version folders of an encoder's tokenizer and postprocess stages; () of a generator."""
        if self.task == _GENERATION:
            return ()
        return tuple(self.folders / f"{self.name}_{stage}" / self.version for stage in ("tokenizer", "postprocess"))

    def graph(self, public_name: str) -> str:
        """The Triton model with the graph of a variant of an encoder."""
        return public_name.replace(self.name, f"{self.name}_model", 1)


class ExplanationService:
    """Explains one model.

    Args:
        parameters: of the config: those of `Explained`, the limits, and those of the model's own limits.
        connect: gives a model of this server, by its name, in the version that is explained.
        unloading: asked while requests run; once it says yes, they fail.
    """

    def __init__(
        self,
        model: Explained,
        parameters: Mapping[str, str],
        connect: Callable[[str], Model],
        unloading: Callable[[], bool] = lambda: False,
    ) -> None:
        self._model = model
        self._unloading = unloading
        self.limits = read_parameters(ExplanationLimits, parameters)
        self._connect = connect
        self._models: dict[str, Model] = {}
        self._own = threading.local()  # of each thread: its stages, and the request that they are asked for
        self._encoder: tuple[EncoderLimits, Path, Path] | None = None
        if model.task != _GENERATION:
            limits = read_parameters(LIMITS[model.task], parameters)
            assert isinstance(limits, EncoderLimits)
            first, last = model.stage_folders
            self._encoder = limits, first, last
            self._stages()  # what is missing is said when the model is loaded
        self._lock = threading.Lock()
        self._open = 0
        self._stopping = False
        self._pool = ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="explain")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="calls", daemon=True)
        self._thread.start()

    def parse(self, inputs: Inputs) -> Asked:
        """Check the tensors of a request.

        Raises:
            InvalidRequest: a field is missing, malformed or not for the model's task.
        """
        given: dict[str, Any] = {name: _FIELDS[name].read(inputs) or "" for name in _TEXTS}
        given |= {name: _FIELDS[name].read(inputs) for name in ("multi_label", "chat")}
        given["max_tokens"] = _FIELDS["max_tokens"].read(inputs) or 0
        if "candidate_labels" in inputs:
            given["candidate_labels"] = tuple(decode_texts(inputs["candidate_labels"], "candidate_labels"))
        options = Options(by=By(_FIELDS["by"].read(inputs)), **given)
        asking.check(self._model.task, options)
        variant = _FIELDS["variant"].read(inputs) or ""
        self._model.public_name(variant)
        return Asked(single_text(inputs, "text_input"), options, variant, _FIELDS["page"].read(inputs))

    def submit(self, inputs: Inputs, seconds: float, channel: Channel) -> None:
        """Explain a request.

        Args:
            seconds: how long it may take.
            channel: gets the answer, or an error that comes later.

        Raises:
            InvalidRequest: see `parse`.
            Overloaded: too many requests are open, or the model is being unloaded.
        """
        asked, deadline = self.parse(inputs), time.monotonic() + seconds
        with self._lock:
            if self._stopping:
                raise Overloaded("the model is being unloaded")
            if self._open >= self.limits.max_waiting:
                raise Overloaded(f"{self.limits.max_waiting} requests are being answered already; try again later")
            self._open += 1

        def ended(work: Future[None]) -> None:
            with self._lock:
                self._open -= 1
            if work.cancelled():
                channel.fail(Overloaded("the model is being unloaded"))

        self._pool.submit(self._answer, asked, deadline, channel).add_done_callback(ended)

    def stop(self) -> None:
        """End the threads; requests that are open fail."""
        with self._lock:
            self._stopping = True
        self._pool.shutdown(cancel_futures=True)

        async def close() -> None:
            left = asyncio.all_tasks() - {asyncio.current_task()}  # given up, and not at their end yet
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            for model in self._models.values():
                await model.close()

        asyncio.run_coroutine_threadsafe(close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _answer(self, asked: Asked, deadline: float, channel: Channel) -> None:
        try:
            call = _Call(self, deadline, channel)
            call.check()
            found = self._explained(asked, call)
            tensors = {"explanation": encode_texts([report.as_json(found)])[None]}
            if asked.page:
                tensors["page"] = encode_texts([report.as_html(found)])[None]
            channel.send(tensors)
        except Exception as error:
            if not isinstance(error, ServingError):
                logger.exception("an answer could not be explained")
            channel.fail(error)

    def _explained(self, asked: Asked, call: _Call) -> list[Explanation]:
        name, options, most = self._model.public_name(asked.variant), asked.options, self.limits.max_runs
        if self._encoder is None:
            return [
                generators.explain(
                    lambda prompt, **given: _answered(call.infer(name, _prompt(prompt, given))),
                    name,
                    asked.text,
                    by=options.by,
                    answer=options.answer,
                    chat=options.chat,
                    max_tokens=options.max_tokens or generators.TOKENS,
                    most=most,
                    callers=PROMPTS_AT_ONCE,
                )
            ]
        graph = self._model.graph(name)
        self._own.run = lambda inputs: dict(call.infer(graph, inputs))
        return asking.of_encoder(self._stages(), name, asked.text, options, most=most)

    def _stages(self) -> EncoderStages:
        """This thread's: while one reads, its tokenizer cuts texts."""
        if not hasattr(self._own, "stages"):
            assert self._encoder is not None
            limits, first, last = self._encoder
            self._own.stages = EncoderStages(
                self._model.name, TASKS[self._model.task], limits, first, last, lambda inputs: self._own.run(inputs)
            )
        found: EncoderStages = self._own.stages
        return found

    @property
    def ending(self) -> bool:
        """Whether nothing is answered any more: Triton says so at the end, and itself waits for what runs."""
        return self._stopping or self._unloading()

    def begin(self, name: str, tensors: Tensors, seconds: float) -> Future[Tensors]:
        """Call a model of this server, from any thread."""

        async def ask() -> Tensors:
            if name not in self._models:
                self._models[name] = self._connect(name)
            return await self._models[name].infer(tensors, seconds)

        return asyncio.run_coroutine_threadsafe(ask(), self._loop)


class _Call:
    """The calls of one request: none begins or goes on when its time is over, or its client or its model goes."""

    def __init__(self, service: ExplanationService, deadline: float, channel: Channel) -> None:
        self._service, self._deadline, self._channel = service, deadline, channel

    def check(self) -> float:
        """The seconds that are left.

        Raises:
            ServingError: the answer is not wanted any more.
        """
        if self._channel.is_cancelled():
            raise Cancelled("the request was cancelled")
        if self._service.ending:
            raise Overloaded("the model is being unloaded")
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the timeout was over before all was answered")
        return left

    def infer(self, name: str, tensors: Tensors) -> Tensors:
        """The response of a model of this server."""
        answer = self._service.begin(name, tensors, self.check())
        try:
            while not wait((answer,), WATCH_SECONDS).done:
                self.check()
            return answer.result()
        finally:
            answer.cancel()  # is not done, if it has ended


_KINDS = {"max_tokens": np.int32, "prompt_logprobs": np.int32, "temperature": np.float32}


def _prompt(prompt: Any, options: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The tensors of a generator's request, [1, n] each."""
    if isinstance(prompt, str):
        tensors: dict[str, NDArray[Any]] = {"text_input": encode_texts([prompt])[None]}
    elif isinstance(prompt[0], Mapping):
        tensors = {"messages": encode_texts([json.dumps(prompt)])[None]}
    else:
        tensors = {"input_ids": np.array([prompt], np.int32)}
    return tensors | {name: np.array([[value]], _KINDS.get(name, np.bool_)) for name, value in options.items()}


def _answered(tensors: Tensors) -> Answered:
    def row(name: str) -> tuple[Any, ...]:
        return tuple(tensors[name].reshape(-1).tolist()) if name in tensors else ()

    (text,) = row("text_output")
    return Answered(
        text.decode("utf-8"),
        row("output_ids"),
        row("prompt_token_ids"),
        row("prompt_tokens"),
        row("prompt_log_probs"),
    )
