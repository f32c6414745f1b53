"""The text side of a causal model, whichever engine computes it: requests in, responses out, grammars between."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from trident_serving.chat.template import Joint
from trident_serving.errors import DeadlineExceeded, InvalidRequest, Overloaded
from trident_serving.generation.answer import FinishReason
from trident_serving.generation.batch import Embeds
from trident_serving.generation.chat import Chat
from trident_serving.generation.group import AnswerGroup
from trident_serving.generation.images import ImageReader, PromptImages
from trident_serving.generation.media import MediaTokens
from trident_serving.generation.parts import AnswerParts
from trident_serving.generation.request import GenerationRequest, RequestParser
from trident_serving.generation.stream import ResponseChannel, TextStream
from trident_serving.runtime.metrics import Recorder
from trident_serving.runtime.outbox import Outbox
from trident_serving.runtime.sampling.defaults import GenerationDefaults, read_config, token_ids
from trident_serving.runtime.sampling.grammars import Grammars, Guide
from trident_serving.runtime.tokenizer import TextTokenizer
from trident_serving.schema.fields import Inputs
from trident_serving.schema.limits import CausalLimits

logger = logging.getLogger(__name__)


class TextEngine(Protocol):
    """What computes the tokens."""

    @property
    def steps(self) -> int:
        """Steps so far; the count rises while there is work."""
        ...

    @property
    def busy(self) -> bool:
        """Whether there is work."""
        ...

    def stop(self) -> None:
        """End; what still runs fails."""
        ...


def read_eos_token_ids(folder: Path) -> frozenset[int]:
    """`eos_token_id` of the model's generation_config.json: one id, a list, or none."""
    return frozenset(token_ids(read_config(folder), "eos_token_id"))


@dataclass(eq=False)
class _Waiting:
    """A request whose grammar is being compiled or whose images are being read, or that waits for that.

    Attributes:
        grammar: None: it has none.
        images: the vectors of their tokens; None: it has none.
    """

    request: GenerationRequest
    streams: Sequence[TextStream]
    grammar: Future[Guide] | None = None
    images: Future[Embeds] | None = None
    since: float = field(default_factory=time.monotonic)

    @property
    def cancelled(self) -> bool:
        """Whether no answer is wanted any more."""
        return all(stream.cancelled for stream in self.streams)

    @property
    def overdue(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() - self.since >= self.request.timeout_seconds

    @property
    def parts(self) -> list[Future[Any]]:
        """What it waits for."""
        return [part for part in (self.grammar, self.images) if part is not None]

    @property
    def names(self) -> str:
        """The same in words."""
        named = (("its grammar", self.grammar), ("its images", self.images))
        return " and ".join(name for name, part in named if part is not None)


class TextService:
    """Parser, grammars and sender of one model; a subclass has the engine, as `_engine`.

    Args:
        folder: the model's artefacts.
        vocabulary_size: tokens of the model.
        adapters: names of the model's adapters.
        unloading: asked while requests run; once it says yes, they fail.
        recorder: of its metrics; None: one of its own.
        images: how the model reads images; None: it reads none.

    Attributes:
        memory: what it takes, in words or as numbers.
        recorder: of its metrics.
        tokenizer: the model's.
        draft_name: the model that drafts; "": none does.
        joint: how its chat template puts the parts of a message together.
    """

    memory: object
    draft_name: str = ""
    _engine: TextEngine

    def __init__(
        self,
        folder: Path,
        limits: CausalLimits,
        vocabulary_size: int,
        adapters: Sequence[str] = (),
        unloading: Callable[[], bool] = lambda: False,
        recorder: Recorder | None = None,
        images: ImageReader | None = None,
    ) -> None:
        self.tokenizer = TextTokenizer.load(folder)
        self._unloading = unloading
        media = MediaTokens.load(folder, self.tokenizer)
        literals = media.literals if images is None else f"{media.literals}\0{images.settings.literals}"
        self._chat = Chat.load(folder, self.tokenizer, limits, literals)
        self.joint = Joint() if self._chat is None else self._chat.template.joint
        ends = read_eos_token_ids(folder)
        self._eos_token_ids = frozenset(token for token in ends if 0 <= token < vocabulary_size)
        defaults = GenerationDefaults.load(folder, vocabulary_size)
        self._parser = RequestParser(
            self.tokenizer, self._chat, limits, defaults, vocabulary_size, adapters, images, media
        )
        self._grammars = Grammars(folder / "tokenizer.json", vocabulary_size, self._eos_token_ids)
        self.recorder = recorder or Recorder()
        self._preparing: set[_Waiting] = set()
        self._preparing_lock = threading.Lock()
        self._outbox = Outbox(self._watch)

    def parse(self, inputs: Inputs, timeout: object = None) -> GenerationRequest:
        """See `RequestParser.parse`."""
        return self._parser.parse(inputs, timeout)

    def submit(self, request: GenerationRequest, channel: ResponseChannel) -> None:
        """Start a request; its responses go to the channel, and so does an error where the queue is full."""
        group = AnswerGroup(channel, request.answers, streaming=request.stream)
        members = [channel] if request.answers == 1 else [group.member(index) for index in range(request.answers)]
        notify = self._outbox.notify
        streams = [
            TextStream(request, self.tokenizer, self._eos_token_ids, member, notify, self._parts(request))
            for member in members
        ]
        for stream in streams:
            self._outbox.add(stream)
        if not request.needs_model:
            for stream in streams:
                stream.finish(FinishReason.LENGTH)
        elif request.grammar is None and request.images is None:
            self._start(_Waiting(request, streams))
        else:
            self._prepare(_Waiting(request, streams))

    def steps(self) -> int:
        """Steps of the engine so far."""
        return self._engine.steps

    def busy(self) -> bool:
        """Whether the engine has work."""
        return self._engine.busy

    def stop(self) -> None:
        """End the threads; unfinished requests fail."""
        self._grammars.stop()
        self._engine.stop()
        self._outbox.stop()

    def _read_images(self, images: PromptImages) -> Future[Embeds]:
        """Begin to read the images of a request, of a model that reads some.

        Raises:
            Overloaded: too many requests wait for that.
        """
        raise NotImplementedError

    def _queue(
        self,
        request: GenerationRequest,
        streams: Sequence[TextStream],
        guide: Guide | None,
        embeds: Embeds | None,
        since: float | None,
    ) -> None:
        """Hand the answers of a request to the engine, all or none.

        Args:
            streams: of the answers; with several, of the same prompt.
            guide: at the beginning of the request's grammar; None: it has none.
            embeds: of the tokens of its images; None: it has none.
            since: when the request came, by `time.monotonic`; None: now.

        Raises:
            Overloaded: the queue is full, or the engine is stopping.
        """
        raise NotImplementedError

    def _prepare(self, waiting: _Waiting) -> None:
        """Compile the grammar of a request and read its images, beside each other."""
        request = waiting.request
        try:
            if request.images is not None:
                waiting.images = self._read_images(request.images)
            if request.grammar is not None:
                waiting.grammar = self._grammars.guide(request.grammar)
        except Overloaded as error:
            self._refuse(waiting, error)
            return
        with self._preparing_lock:
            self._preparing.add(waiting)
        for part in waiting.parts:
            part.add_done_callback(lambda done: self._prepared(waiting))

    def _prepared(self, waiting: _Waiting) -> None:
        """Go on with a request once nothing is missing, unless it has ended meanwhile."""
        with self._preparing_lock:
            ready = waiting in self._preparing and all(part.done() for part in waiting.parts)
            if ready:
                self._preparing.discard(waiting)
        if ready:
            self._start(waiting, since=waiting.since)

    def _start(self, waiting: _Waiting, since: float | None = None) -> None:
        """Queue the answers of a request, or fail them."""
        try:
            guide = None if waiting.grammar is None else waiting.grammar.result()
            embeds = None if waiting.images is None else waiting.images.result()
            self._queue(waiting.request, waiting.streams, guide, embeds, since)
        except CancelledError:
            self._refuse(waiting, Overloaded("the model is being unloaded"))
        except (InvalidRequest, Overloaded) as error:
            self._refuse(waiting, error)
        except Exception as error:
            logger.exception("a request could not be prepared")
            self._refuse(waiting, error)

    def _refuse(self, waiting: _Waiting, error: Exception) -> None:
        if isinstance(error, Overloaded):
            self.recorder.count("requests_rejected")
        for stream in waiting.streams:
            stream.fail(error)

    def _parts(self, request: GenerationRequest) -> AnswerParts | None:
        """What parts an answer into text, reasoning and calls, where the request wants that."""
        if self._chat is None or request.conversation is None:
            return None
        parser = self._chat.parser(request.conversation, request.prompt_end, reasoning=request.return_reasoning)
        if parser is None:
            return None
        tools = request.conversation.tools is not None
        # Where special tokens are shown, marks are in the text already.
        marks = self._chat.marks if request.skip_special_tokens else {}
        return AnswerParts(parser, marks, request.prompt_ids, calls=tools, reasoning=request.return_reasoning)

    def _watch(self) -> None:
        if self._unloading():
            self._engine.stop()
            with self._preparing_lock:
                unwanted = [part for waiting in self._preparing for part in waiting.parts]
            for part in unwanted:
                part.cancel()  # its request fails with it
        with self._preparing_lock:
            ended = [waiting for waiting in self._preparing if waiting.cancelled or waiting.overdue]
            self._preparing.difference_update(ended)
        for waiting in ended:
            for part in waiting.parts:
                part.cancel()  # is not done, if that has not begun
            self.recorder.count("requests_cancelled" if waiting.cancelled else "requests_failed")
            for stream in waiting.streams:
                if waiting.cancelled:
                    stream.finish(FinishReason.CANCELLED)
                else:
                    seconds = waiting.request.timeout_seconds
                    stream.fail(DeadlineExceeded(f"the timeout of {seconds:g} s was over while {waiting.names} waited"))
