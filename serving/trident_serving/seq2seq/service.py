"""Everything that serves one encoder-decoder model from its artefact folder; the adapter only carries tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from trident_serving.errors import DoesNotFit, Overloaded
from trident_serving.memory import MEBIBYTE, available_bytes
from trident_serving.runtime.metrics import Recorder
from trident_serving.runtime.outbox import Outbox
from trident_serving.schema.fields import Inputs
from trident_serving.schema.limits import Seq2SeqLimits
from trident_serving.seq2seq.decoder import Seq2SeqDecoder
from trident_serving.seq2seq.engine import Engine, Job
from trident_serving.seq2seq.request import GenerationDefaults, RequestParser, Seq2SeqRequest, positions
from trident_serving.seq2seq.search import Found
from trident_serving.seq2seq.source import SourceText


@dataclass(frozen=True)
class Reply:
    """What a request gets, once.

    Attributes:
        finish_reason: "stop", "length" where the answer to a window was cut off, or "cancelled".
        log_probs: of all tokens.
        scores: of each window's answer, see `Found`.
    """

    text: str
    finish_reason: str
    num_input_tokens: int
    num_output_tokens: int
    log_probs: tuple[float, ...]
    scores: tuple[float, ...]


class ReplyChannel(Protocol):
    """Where a request's one response goes."""

    def is_cancelled(self) -> bool:
        """Whether the client has gone."""
        ...

    def send(self, reply: Reply) -> None:
        """Send the answer."""
        ...

    def fail(self, error: Exception) -> None:
        """Send an error."""
        ...


class _PendingReply:
    """One request whose windows are being answered; the outbox sends when all are."""

    urgent = True
    pending = False
    last_sent = 0.0

    def __init__(
        self,
        request: Seq2SeqRequest,
        source: SourceText,
        channel: ReplyChannel,
        notify: Callable[[_PendingReply], None],
    ) -> None:
        self.channel = channel
        self.cancelled = False
        self._request = request
        self._source = source
        self._notify = notify
        self._found: dict[int, Found] = {}
        self._left = len(request.windows)
        self._error: Exception | None = None

    def window_done(self, index: int, found: Found | None, error: Exception | None) -> None:
        """One window is answered, or was cancelled, or failed."""
        self._left -= 1
        if found is not None:
            self._found[index] = found
        if error is not None:
            self._error = self._error or error
            self.cancelled = True  # the others need not go on
        if not self._left:
            self._notify(self)

    def refuse(self, error: Exception) -> None:
        """No window will be answered."""
        self._error, self._left = error, 0
        self._notify(self)

    def send_pending(self) -> bool:
        """Send the response, if it is time; returns whether all is said."""
        if self._left:
            return False
        if self._error is not None:
            self.channel.fail(self._error)
        else:
            self.channel.send(self._reply())
        return True

    def _reply(self) -> Reply:
        windows = self._request.windows
        found = [self._found[index] for index in sorted(self._found)]
        complete = len(found) == len(windows)
        text = "".join(
            ("" if not index else window.separator) + self._source.decode(self._found[index].tokens)
            for index, window in enumerate(windows)
            if index in self._found
        )
        reason = "cancelled" if not complete else "stop" if all(item.stopped for item in found) else "length"
        return Reply(
            text=text if complete else "",
            finish_reason=reason,
            num_input_tokens=sum(len(window.ids) for window in windows),
            num_output_tokens=sum(len(item.tokens) for item in found),
            log_probs=tuple(value for item in found for value in item.log_probs),
            scores=tuple(item.score for item in found),
        )


class _WindowConsumer:
    def __init__(self, pending: _PendingReply, index: int) -> None:
        self._pending = pending
        self._index = index

    @property
    def cancelled(self) -> bool:
        return self._pending.cancelled

    def finish(self, found: Found | None) -> None:
        self._pending.window_done(self._index, found, None)

    def fail(self, error: Exception) -> None:
        self._pending.window_done(self._index, None, error)


class Seq2SeqService:
    """Parser, engine and sender of one model.

    Args:
        folder: the model's artefacts.
        unloading: asked while requests run; once it says yes, they fail.

    Raises:
        DoesNotFit: the caches take more memory than there is.
    """

    def __init__(self, folder: Path, limits: Seq2SeqLimits, unloading: Callable[[], bool] = lambda: False) -> None:
        self._unloading = unloading
        self._source = SourceText.load(folder, limits.max_source_tokens)
        defaults = GenerationDefaults.load(folder)
        allowed = replace(
            limits,
            default_max_tokens=min(limits.default_max_tokens, limits.max_target_tokens),
            max_windows=min(limits.max_windows, limits.max_waiting),
        )
        self._parser = RequestParser(self._source, defaults, allowed)
        capacity = positions(limits.max_target_tokens, defaults.prompt)
        decoder = Seq2SeqDecoder(folder, slots=limits.slots, capacity=capacity, threads=limits.threads)
        own = limits.slots * capacity * decoder.bytes_per_token
        cross = limits.slots * limits.max_source_tokens * decoder.bytes_per_token
        self.memory = (
            f"{own / MEBIBYTE:.0f} MiB of decoder cache + {cross / MEBIBYTE:.0f} MiB of encoded texts "
            f"({decoder.bytes_per_token} bytes a token) at most"
        )
        available = available_bytes()
        if own + cross > available:
            raise DoesNotFit(
                f"{self.memory}, of which {available / MEBIBYTE:.0f} MiB are available: lower slots, "
                "max_source_tokens or max_target_tokens"
            )
        self.recorder = Recorder()
        self._outbox = Outbox(self._check_unloading)
        self._engine = Engine(decoder, limits.max_waiting, self.recorder)

    def parse(self, inputs: Inputs, timeout: object = None) -> Seq2SeqRequest:
        """See `RequestParser.parse`."""
        return self._parser.parse(inputs, timeout)

    def submit(self, request: Seq2SeqRequest, channel: ReplyChannel) -> None:
        """Start a request; its response goes to the channel.

        An error where the queue is full goes to the channel too.
        """
        pending = _PendingReply(request, self._source, channel, self._outbox.notify)
        jobs = [
            Job(window.ids, request.prompt, request.params, _WindowConsumer(pending, index), request.timeout_seconds)
            for index, window in enumerate(request.windows)
        ]
        self._outbox.add(pending)
        try:
            self._engine.submit(jobs)
        except Overloaded as error:
            self.recorder.count("requests_rejected")
            pending.refuse(error)

    def steps(self) -> int:
        """Steps of the engine so far."""
        return self._engine.steps

    def busy(self) -> bool:
        """Whether the engine has work."""
        return self._engine.busy

    def stop(self) -> None:
        """End both threads; unfinished requests fail."""
        self._engine.stop()
        self._outbox.stop()

    def _check_unloading(self) -> None:
        if self._unloading():
            self._engine.stop()
