"""The text side of one request: tokens in on the engine's thread, chunks of text out on the outbox's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from trident_serving.generation.answer import FinishReason
from trident_serving.generation.parts import AnswerParts
from trident_serving.generation.request import GenerationRequest
from trident_serving.generation.stopping import StopStrings
from trident_serving.runtime.detokenizer import Detokenizer
from trident_serving.runtime.log_probabilities import TokenLogProbs
from trident_serving.runtime.tokenizer import Codec


@dataclass
class Chunk:
    """What one response carries.

    Attributes:
        finish_reason: in the last chunk of an answer.
        prompt_log_probs: in the first chunk, where they were asked for.
        index: which of several answers this is.
        final: whether no response follows.
        others: the other answers, in a response that carries all.
        reasoning: the model's, where it was asked for.
        tool_calls: as JSON, where the request has tools.
        token_ids: the new tokens, where they were asked for.
        prompt_ids: in the first chunk, where they were asked for.
        spell: gives the bytes of a token; None: they were not asked for.
        findings: of a guard's rules, as JSON, in the last chunk of an answer; None: there is no guard, or more comes.
    """

    text: str = ""
    finish_reason: FinishReason | None = None
    num_input_tokens: int = 0
    num_output_tokens: int = 0
    log_probs: list[TokenLogProbs] = field(default_factory=list)
    prompt_log_probs: list[TokenLogProbs] = field(default_factory=list)
    index: int = 0
    final: bool = False
    others: list[Chunk] = field(default_factory=list)
    reasoning: str | None = None
    tool_calls: str | None = None
    token_ids: list[int] = field(default_factory=list)
    prompt_ids: Sequence[int] = ()
    spell: Callable[[int], bytes] | None = None
    findings: str | None = None


class ResponseChannel(Protocol):
    """Where responses go; called on the outbox's thread only."""

    def send(self, chunk: Chunk) -> None:
        """Send one response; the `final` one is the last."""
        ...

    def fail(self, error: Exception) -> None:
        """Send an error as the last response."""
        ...

    def is_cancelled(self) -> bool:
        """Whether the client has gone or has cancelled the request."""
        ...


class TextStream:
    """Implements the engine's `Consumer`; tokens that wait for the outbox go out together.

    Args:
        notify: called, on the engine's thread, when there is something to send.
        parts: part the answer into text, reasoning and calls; None: all of it is text.
    """

    def __init__(
        self,
        request: GenerationRequest,
        codec: Codec,
        eos_token_ids: frozenset[int],
        channel: ResponseChannel,
        notify: Callable[[TextStream], None],
        parts: AnswerParts | None = None,
    ) -> None:
        self.channel = channel
        self.cancelled = False
        # The outbox's: when it sent last, and whether this stream waits for its next time.
        self.last_sent = 0.0
        self.pending = False
        self._streaming = request.stream
        self._num_input_tokens = len(request.prompt_ids)
        # The end token that a grammar allows is its end, whatever the request ignores.
        ends = frozenset() if request.ignore_eos and request.grammar is None else eos_token_ids
        self._ends = request.stop_token_ids | ends
        self._detokenizer = Detokenizer(codec, request.prompt_ids, skip_special_tokens=request.skip_special_tokens)
        self._counts_chunks = request.counts_chunks
        self._min_tokens = request.sampling.min_tokens
        self._stop_strings = StopStrings(request.stop_words)
        self._parts = parts
        self._notify = notify
        self._lock = threading.Lock()
        self._text = request.prompt if request.include_prompt else ""
        self._prompt_ids = request.prompt_ids if request.return_prompt_token_ids else ()
        self._spell = codec.token_bytes if request.return_tokens else None
        self._token_ids: list[int] = []
        self._log_probs: list[TokenLogProbs] = []
        self._scoring = request.prompt_log_probs is not None  # until there is a token: the first response has them
        self._prompt_log_probs: list[TokenLogProbs] = []
        self._num_output_tokens = self._counted = 0
        self._reason: FinishReason | None = None
        self._error: Exception | None = None
        self._closed = False

    @property
    def urgent(self) -> bool:
        """Whether what there is to send should not wait: the beginning of the answer, or its end."""
        return self.last_sent == 0.0 or self._reason is not None or self._error is not None

    def accept(self, token: int, log_probs: TokenLogProbs | None) -> bool:
        """See `Consumer.accept`."""
        ended = token in self._ends
        new = "" if ended else self._detokenizer.push(token)
        if self._parts is not None and not ended:
            new += self._parts.marks.get(token, "")
        text, stopped = self._stop_strings.push(new, counts=self._num_output_tokens + 1 >= self._min_tokens)
        with self._lock:
            self._text += self._parts.push(text) if self._parts is not None else text
            self._num_output_tokens += 1
            self._scoring = False
            if self._spell is not None:
                self._token_ids.append(token)
            if log_probs is not None:
                self._log_probs.append(log_probs)
            ready = self._streaming and self._waiting and not stopped
        if ready and not self.pending:  # else the outbox sends it anyway
            self._notify(self)
        return stopped

    def accept_prompt(self, log_probs: list[TokenLogProbs]) -> None:
        """See `Consumer.accept_prompt`."""
        with self._lock:
            self._prompt_log_probs += log_probs

    def finish(self, reason: FinishReason) -> None:
        """See `Consumer.finish`."""
        text, stopped = self._stop_strings.push(self._detokenizer.flush())
        rest = text if stopped else text + self._stop_strings.flush()
        with self._lock:
            self._text += self._parts.push(rest) + self._parts.finish() if self._parts is not None else rest
            self._reason = FinishReason.STOP if stopped else reason
        self._notify(self)

    def fail(self, error: Exception) -> None:
        """See `Consumer.fail`."""
        with self._lock:
            self._error = error
        self._notify(self)

    def send_pending(self) -> bool:
        """Send what waits, on the outbox's thread; True when that was the last response."""
        with self._lock:
            ended = self._error is not None or self._reason is not None
            if self._closed or not (ended or (self._streaming and self._waiting)):
                return False  # nothing yet, or an earlier notification has sent it
            self._closed = ended
            error, chunk = self._error, self._take()
        if error is not None:
            self.channel.fail(error)
            return True
        self.channel.send(chunk)
        return chunk.finish_reason is not None

    @property
    def _waiting(self) -> bool:
        return not self._scoring and (bool(self._text) or (self._parts is not None and self._parts.waiting))

    def _take(self) -> Chunk:
        chunk = Chunk(
            self._text,
            self._reason,
            self._num_input_tokens,
            self._num_output_tokens,
            self._log_probs,
            self._prompt_log_probs,
            final=self._reason is not None,
            token_ids=self._token_ids,
            prompt_ids=self._prompt_ids,
            spell=self._spell,
        )
        if self._parts is not None:
            chunk.reasoning, chunk.tool_calls = self._parts.take()
        self._text, self._log_probs, self._prompt_log_probs = "", [], []
        self._token_ids, self._prompt_ids = [], ()
        if self._counts_chunks:
            chunk.num_output_tokens -= self._counted
            self._counted = self._num_output_tokens
        return chunk
