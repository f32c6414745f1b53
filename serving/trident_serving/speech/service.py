"""Everything that serves one speech model from its artefact folder; the adapter only carries tensors.

A recording of one window is one job of the engine. A longer one is a job after the other: where a window begins follows
from the timestamps of the one before. No window is told what was said before it, which is what transformers does where
`condition_on_prev_tokens` is not asked for. A request that asks for a stream is sent text as soon as no later token can
take it away again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from trident_serving.errors import Cancelled, DeadlineExceeded, DoesNotFit, Overloaded
from trident_serving.memory import MEBIBYTE, available_bytes
from trident_serving.runtime.detokenizer import Detokenizer
from trident_serving.runtime.metrics import Recorder
from trident_serving.runtime.outbox import Outbox
from trident_serving.runtime.tokenizer import TextTokenizer
from trident_serving.schema.fields import Inputs
from trident_serving.schema.limits import SpeechLimits
from trident_serving.seq2seq import search
from trident_serving.seq2seq.decoder import Seq2SeqDecoder
from trident_serving.seq2seq.engine import Engine, Job
from trident_serving.seq2seq.request import GenerationDefaults
from trident_serving.seq2seq.search import Found
from trident_serving.speech import audio, transcript
from trident_serving.speech.features import Floats, LogMel
from trident_serving.speech.request import RequestParser, SpeechRequest
from trident_serving.speech.search import SpokenSearch
from trident_serving.speech.settings import SpeechSettings
from trident_serving.speech.transcript import Clock, Segment, Stripped

_READERS = 2  # recordings that are decoded at once


@dataclass(frozen=True)
class Reply:
    """What a response carries: the whole answer, or, of a stream, what is new of it.

    Attributes:
        finish_reason: "stop", "length" where the answer to a window was cut off, or "cancelled"; "": more comes.
        duration: of the recording, in seconds.
        language: its code.
        tokens: of the answer, with timestamps where it has them; of a stream, those of complete windows.
        segments: of these, with their texts; none where they were not asked for.
        count: of the tokens of all responses so far.
    """

    text: str
    finish_reason: str
    language: str
    duration: float
    tokens: tuple[int, ...]
    segments: tuple[tuple[Segment, str], ...]
    count: int


class ReplyChannel(Protocol):
    """Where a request's responses go."""

    def is_cancelled(self) -> bool:
        """Whether the client has gone."""
        ...

    def send(self, reply: Reply) -> None:
        """Send one response; the one with a finish reason is the last."""
        ...

    def fail(self, error: Exception) -> None:
        """Send an error as the last response."""
        ...


class _Transcription:
    """One request on its way: read, then window after window; what the outbox holds and the engine's consumer."""

    def __init__(self, service: SpeechService, request: SpeechRequest, channel: ReplyChannel) -> None:
        self.channel = channel
        self.cancelled = False
        self.pending = False
        self.last_sent = 0.0
        self._service = service
        self._request = request
        self._until = time.monotonic() + request.timeout_seconds
        self._features: Floats = np.zeros((0, 0), np.float32)
        self._frames = 0
        self._seek = 0
        self._duration = 0.0
        self._timestamps = request.timestamps
        self._prompt: list[int] = []
        self._search: SpokenSearch | None = None
        self._detokenizer = Detokenizer(service.tokenizer)
        self._stripped = Stripped()
        self._written = 0  # of the window's tokens, those whose text is in `_text`
        self._cut_off = False
        # What the engine's thread writes and the outbox's reads and empties.
        self._lock = threading.Lock()
        self._text = ""
        self._segments: list[Segment] = []
        self._count = 0
        self._reason = ""
        self._error: Exception | None = None
        self._closed = False

    @property
    def urgent(self) -> bool:
        """Whether what there is to send should not wait: the beginning of the answer, or its end."""
        return self.last_sent == 0.0 or bool(self._reason) or self._error is not None

    def read(self) -> None:
        """Decode the file and compute its features, on a reader's thread; then the first window waits."""
        service = self._service
        try:
            settings = service.log_mel.settings
            samples = audio.decode(self._request.audio, settings.rate, service.limits.max_seconds, self._check)
            self._check()
            self._request = replace(self._request, audio=b"")
            self._duration = len(samples) / settings.rate
            self._features = service.log_mel(samples)
            self._frames = max(service.log_mel.frames(len(samples)), 1)
            # The clock of the timestamps says where the next window begins.
            self._timestamps = self._timestamps or self._frames > settings.frames
            request = self._request
            self._prompt = service.settings.prompt(request.language, request.task, timestamps=self._timestamps)
            self._submit()
        except Cancelled:
            self.finish(None)
        except Exception as error:
            self.fail(error)

    def _check(self) -> None:
        """End the reading of a recording whose caller has gone, or whose time is over."""
        if self.cancelled:
            raise Cancelled
        if time.monotonic() >= self._until:
            raise DeadlineExceeded

    def _submit(self) -> None:
        service = self._service
        params = service.parser.params(self._request, len(self._prompt), timestamps=self._timestamps)
        settings = service.settings
        self._search = SpokenSearch(
            self._prompt,
            list(settings.languages.values()),
            settings.no_speech,
            partial(search.start, params=params),
            self._hear if self._request.stream else None,
        )
        frames = service.log_mel.settings.frames
        window = self._features[:, self._seek : self._seek + frames]
        window = np.pad(window, ((0, 0), (0, frames - window.shape[1])))
        left = self._until - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded
        job = Job(window, self._prompt, params, self, left, self._search)
        service.engine.submit([job], going_on=self._seek > 0)

    def _hear(self, tokens: Sequence[int]) -> None:
        """Note a window's answer so far, on the engine's thread."""
        assert self._search is not None
        self._prompt = self._search.prompt  # with the language that was heard
        self._write(tokens[: transcript.settled(tokens, self._service.clock.first)])
        if self._text and not self.pending:  # else the outbox sends it anyway
            self._service.outbox.notify(self)

    def _write(self, tokens: Sequence[int]) -> None:
        """Add to the text what is new of a window's tokens; those of timestamps have none."""
        first = self._service.settings.first_timestamp
        new = "".join(self._detokenizer.push(token) for token in tokens[self._written :] if token < first)
        self._written = len(tokens)
        with self._lock:
            self._text += self._stripped.push(new)

    def finish(self, found: Found | None) -> None:
        """A window is answered; None: the request was cancelled."""
        service = self._service
        if found is None or self._search is None:
            self._reason = "cancelled"
            service.outbox.notify(self)
            return
        self._prompt = self._search.prompt
        ends = found.stopped
        tokens = found.tokens[:-1] if ends else found.tokens
        self._cut_off = self._cut_off or not ends
        # The padding of a short recording is part of its first window, and of no other.
        left = min(service.log_mel.settings.frames, self._features.shape[1] - self._seek)
        segments, offset = transcript.cut(
            tokens, found.log_probs, service.clock, self._seek, left, self._search.no_speech_probability
        )
        self._write([token for segment in segments for token in segment.tokens])
        self._written = 0
        self._seek += offset
        last = not self._timestamps or self._seek >= self._frames
        with self._lock:
            self._segments += segments
            if last:
                self._text += self._stripped.push(self._detokenizer.flush())
                self._reason = "length" if self._cut_off else "stop"
        if last or self._request.stream:
            service.outbox.notify(self)
        if not last:
            self._submit()

    def fail(self, error: Exception) -> None:
        """The request can't be answered."""
        if isinstance(error, DeadlineExceeded):  # the engine knows windows
            done = self._seek * self._service.log_mel.settings.hop_length / self._service.log_mel.settings.rate
            came = f"after {done:.0f} of {self._duration:.0f} seconds of the recording"
            if not self._duration:
                came = "before the recording was read"
            error = DeadlineExceeded(f"the timeout of {self._request.timeout_seconds:g} s was over {came}")
        with self._lock:
            self._error = error
        self._service.outbox.notify(self)

    def send_pending(self) -> bool:
        """Send what there is, on the outbox's thread; returns whether all is said."""
        with self._lock:
            error, ended = self._error, self._error is not None or bool(self._reason)
            waiting = self._request.stream and (self._text or self._segments)
            if self._closed or not (ended or waiting):
                return False  # nothing yet, or an earlier notification has sent it
            self._closed = ended
            reply = self._take()
        if error is not None:
            self.channel.fail(error)
        else:
            self.channel.send(reply)
        return ended

    def _take(self) -> Reply:
        """What has come since the last response; the lock is held."""
        service, cancelled = self._service, self._reason == "cancelled"
        segments, text = ([], "") if cancelled else (self._segments, self._text)
        tokens = tuple(token for segment in segments for token in segment.tokens)
        self._count += len(tokens)
        self._segments, self._text = [], ""
        return Reply(
            text=text,
            finish_reason=self._reason,
            language=service.settings.language_of(self._prompt),
            duration=self._duration,
            tokens=tokens,
            segments=tuple(
                (self._within(each), service.text(each.tokens)) for each in segments if self._request.timestamps
            ),
            count=self._count,
        )

    def _within(self, segment: Segment) -> Segment:
        """A segment in the recording: a model may also hear something in the padding behind it."""
        start, end = (min(seconds, self._duration) for seconds in (segment.start, segment.end))
        return replace(segment, start=start, end=end)


class SpeechService:
    """Parser, readers, engine and sender of one model.

    Args:
        folder: the model's artefacts.
        unloading: asked while requests run; once it says yes, they fail.

    Raises:
        DoesNotFit: the caches take more memory than there is.
    """

    def __init__(self, folder: Path, limits: SpeechLimits, unloading: Callable[[], bool] = lambda: False) -> None:
        self._unloading = unloading
        self.limits = limits
        self.settings = SpeechSettings.load(folder)
        self.log_mel = LogMel.load(folder)
        self.parser = RequestParser(self.settings, GenerationDefaults.load(folder), limits)
        features = self.log_mel.settings
        frames = round(self.settings.seconds_per_step * features.rate / features.hop_length)
        self.clock = Clock(self.settings.first_timestamp, self.settings.seconds_per_step, frames)
        self.tokenizer = TextTokenizer.load(folder)
        decoder = Seq2SeqDecoder(folder, slots=limits.slots, capacity=limits.max_target_tokens, threads=limits.threads)
        own = limits.slots * limits.max_target_tokens * decoder.bytes_per_token
        cross = limits.slots * features.frames // frames * decoder.bytes_per_token
        self.memory = (
            f"{own / MEBIBYTE:.0f} MiB of decoder cache + {cross / MEBIBYTE:.0f} MiB of encoded windows "
            f"({decoder.bytes_per_token} bytes a token) at most"
        )
        available = available_bytes()
        if own + cross > available:
            raise DoesNotFit(f"{self.memory}, of which {available / MEBIBYTE:.0f} MiB are available: lower slots")
        self.recorder = Recorder()
        self.outbox = Outbox(self._check_unloading)
        self.engine = Engine(decoder, limits.max_waiting, self.recorder)
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="reader")
        self._unread: set[_Transcription] = set()

    def parse(self, inputs: Inputs, timeout: object = None) -> SpeechRequest:
        """See `RequestParser.parse`."""
        return self.parser.parse(inputs, timeout)

    def submit(self, request: SpeechRequest, channel: ReplyChannel) -> None:
        """Start a request; its responses go to the channel.

        An error where the queue is full goes to the channel too.
        """
        one = _Transcription(self, request, channel)
        self.outbox.add(one)
        if len(self._unread) >= self.limits.max_waiting:
            self.recorder.count("requests_rejected")
            one.fail(Overloaded(f"the queue is full: {len(self._unread)} recordings wait already"))
            return
        self._unread.add(one)

        def read(future: Future[None]) -> None:
            self._unread.discard(one)
            if future.cancelled():
                one.fail(Overloaded("the model is being unloaded"))

        self._readers.submit(one.read).add_done_callback(read)

    def text(self, tokens: tuple[int, ...]) -> str:
        """The text of tokens, without timestamps and special tokens."""
        return self.tokenizer.decode([token for token in tokens if token < self.settings.first_timestamp])

    def steps(self) -> int:
        """Steps of the engine so far."""
        return self.engine.steps

    def busy(self) -> bool:
        """Whether the engine has work."""
        return self.engine.busy

    def stop(self) -> None:
        """End all threads; unfinished requests fail."""
        self._readers.shutdown(cancel_futures=True)
        self.engine.stop()
        self.outbox.stop()

    def _check_unloading(self) -> None:
        if self._unloading():
            self.engine.stop()
