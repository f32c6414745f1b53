"""Everything that serves one causal model from its artefact folder; the Triton adapter only carries tensors."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from pathlib import Path

from trident_serving.artefacts import DRAFT, read_draft
from trident_serving.errors import DeadlineExceeded, DoesNotFit, InvalidRequest, Overloaded
from trident_serving.generation import draft_model
from trident_serving.generation.answer import FinishReason, Job
from trident_serving.generation.batch import SlotTokens
from trident_serving.generation.chat import Chat
from trident_serving.generation.decoder import OnnxDecoder
from trident_serving.generation.drafting import MAX_DRAFT
from trident_serving.generation.engine import Engine, EngineSettings
from trident_serving.generation.group import AnswerGroup
from trident_serving.generation.parts import AnswerParts
from trident_serving.generation.request import GenerationRequest, RequestParser
from trident_serving.generation.stream import ResponseChannel, TextStream
from trident_serving.memory import MEBIBYTE, available_bytes
from trident_serving.runtime.metrics import Recorder
from trident_serving.runtime.outbox import Outbox
from trident_serving.runtime.sampling.defaults import GenerationDefaults, read_config, token_ids
from trident_serving.runtime.sampling.grammars import Grammars, Guide
from trident_serving.runtime.tokenizer import TextTokenizer
from trident_serving.schema.fields import Inputs
from trident_serving.schema.limits import GenerationLimits

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemoryNeeds:
    """What a model takes at most, in bytes.

    Attributes:
        weights: the files of the graph, and of the draft's.
        cache_tokens: tokens that the KV cache may hold.
        bytes_per_token: of the KV cache, and of the draft's.
        logits: the buffer for the logits, and the draft's.
        states: of all slots, beside the KV cache; 0 for most models.
    """

    weights: int
    cache_tokens: int
    bytes_per_token: int
    logits: int
    states: int = 0

    @property
    def cache(self) -> int:
        """Bytes of the KV cache, if it is full."""
        return self.cache_tokens * self.bytes_per_token

    def __str__(self) -> str:
        parts = (self.weights, self.cache, self.logits, self.states)
        weights, cache, logits, states, total = (f"{part / MEBIBYTE:.0f}" for part in (*parts, sum(parts)))
        return (
            f"{weights} MiB of weights + {cache} MiB of KV cache ({self.cache_tokens} tokens of "
            f"{self.bytes_per_token} bytes) + {f'{states} MiB of states + ' if self.states else ''}"
            f"{logits} MiB of logits = {total} MiB"
        )


def plan_memory(
    limits: GenerationLimits, decoder: OnnxDecoder, weights: int, available: int, draft: OnnxDecoder | None = None
) -> MemoryNeeds:
    """What the settings take on this machine, once the weights are loaded.

    Args:
        draft: the decoder that drafts, whose slots hold what those of the model hold.

    Raises:
        DoesNotFit: the cache can't hold a single context, or the memory that is available can't hold the cache.
    """
    decoders = [decoder] if draft is None else [decoder, draft]
    each = sum(one.cache.bytes_per_token for one in decoders)
    tokens = limits.slots * limits.context
    if limits.kv_cache_mib and each:
        tokens = min(tokens, limits.kv_cache_mib * MEBIBYTE // each)
    if tokens < limits.context:
        raise DoesNotFit(
            f"kv_cache_mib is {limits.kv_cache_mib}, but one context of {limits.context} tokens takes "
            f"{limits.context * each / MEBIBYTE:.0f} MiB: raise kv_cache_mib or lower context"
        )
    states = limits.slots * decoder.states.bytes_per_slot
    logits = limits.slots * sum(one.vocabulary_size for one in decoders) * 4
    needs = MemoryNeeds(weights, tokens, each, logits, states)
    if decoder.cache.device != "cpu":
        return needs  # a GPU's cache is taken when it is made, and fails there
    if needs.cache + needs.states + needs.logits > available:
        raise DoesNotFit(
            f"{needs}, of which all but the weights must fit into the {available / MEBIBYTE:.0f} MiB that are "
            "available: set kv_cache_mib, or lower slots or context"
        )
    return needs


def read_eos_token_ids(folder: Path) -> frozenset[int]:
    """`eos_token_id` of the model's generation_config.json: one id, a list, or none."""
    return frozenset(token_ids(read_config(folder), "eos_token_id"))


@dataclass(eq=False)
class _Waiting:
    """A request whose grammar is being compiled, or waits for that."""

    request: GenerationRequest
    streams: Sequence[TextStream]
    grammar: Future[Guide]
    since: float = field(default_factory=time.monotonic)

    @property
    def cancelled(self) -> bool:
        """Whether no answer is wanted any more."""
        return all(stream.cancelled for stream in self.streams)

    @property
    def overdue(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() - self.since >= self.request.timeout_seconds


class GenerationService:
    """Parser, engine and sender of one model.

    Args:
        folder: the model's artefacts.
        unloading: asked while requests run; once it says yes, they fail.
        device_id: which GPU, where the device is one.

    Attributes:
        memory: what it takes.
        recorder: of its metrics.
        draft_name: the model that drafts; "": none does.

    Raises:
        DoesNotFit: the settings take more memory than there is.
    """

    def __init__(
        self,
        folder: Path,
        limits: GenerationLimits,
        unloading: Callable[[], bool] = lambda: False,
        device_id: int = 0,
    ) -> None:
        tokenizer = TextTokenizer.load(folder)
        self._tokenizer = tokenizer
        self._unloading = unloading
        self._chat = Chat.load(folder, tokenizer, limits)
        decoder = OnnxDecoder(
            folder / "model.onnx",
            slots=limits.slots,
            context=limits.context,
            longest_run=max(limits.prefill_chunk, MAX_DRAFT + 1),
            threads=limits.threads,
            device=limits.device,
            device_id=device_id,
        )
        size = decoder.vocabulary_size
        self._eos_token_ids = frozenset(token for token in read_eos_token_ids(folder) if 0 <= token < size)
        defaults = GenerationDefaults.load(folder, size)
        self._parser = RequestParser(tokenizer, self._chat, limits, defaults, size, decoder.adapters)
        self._grammars = Grammars(folder / "tokenizer.json", size, self._eos_token_ids)
        settings = read_draft(folder)
        drafting = None if settings is None else draft_model.open_decoder(folder, settings, limits, device_id)
        graphs = [*folder.glob("model.onnx*"), *folder.glob(f"{DRAFT}/model.onnx*")]
        weights = sum(file.stat().st_size for file in graphs)
        self.memory = plan_memory(limits, decoder, weights, available_bytes(), drafting)
        for each in (decoder,) if drafting is None else (decoder, drafting):
            each.run([SlotTokens(0, 0, [0])])  # a graph that can't run is not served
            each.release(0, 0)
        draft = None
        if settings is not None and drafting is not None:
            draft = draft_model.over_decoder(drafting, settings, limits, decoder.vocabulary_size)
        self.draft_name = "" if settings is None else settings.name
        self.recorder = Recorder()
        self._compiling: set[_Waiting] = set()
        self._compiling_lock = threading.Lock()
        self._outbox = Outbox(self._watch)
        self._engine = Engine(
            decoder,
            EngineSettings(
                slots=limits.slots,
                cache_tokens=self.memory.cache_tokens,
                prefill_chunk=limits.prefill_chunk,
                max_waiting=limits.max_waiting,
                prefix_reuse=limits.prefix_reuse,
                # A draft that is refused can't be taken back from a state.
                prompt_lookup=limits.prompt_lookup and not decoder.states,
                ngram_pool=limits.ngram_pool,
                whole_prefixes=bool(decoder.states),
                original_context=decoder.original_context,
            ),
            eos_token_ids=self._eos_token_ids,
            recorder=self.recorder,
            draft=draft,
        )

    def parse(self, inputs: Inputs, timeout: object = None) -> GenerationRequest:
        """See `RequestParser.parse`."""
        return self._parser.parse(inputs, timeout)

    def submit(self, request: GenerationRequest, channel: ResponseChannel) -> None:
        """Start a request; its responses go to the channel, and so does an error where the queue is full."""
        group = AnswerGroup(channel, request.answers, streaming=request.stream)
        members = [channel] if request.answers == 1 else [group.member(index) for index in range(request.answers)]
        notify = self._outbox.notify
        streams = [
            TextStream(request, self._tokenizer, self._eos_token_ids, member, notify, self._parts(request))
            for member in members
        ]
        for stream in streams:
            self._outbox.add(stream)
        if not request.needs_model:
            for stream in streams:
                stream.finish(FinishReason.LENGTH)
        elif request.grammar is None:
            self._start(request, streams)
        else:
            waiting = _Waiting(request, streams, self._grammars.guide(request.grammar))
            with self._compiling_lock:
                self._compiling.add(waiting)
            waiting.grammar.add_done_callback(lambda done: self._compiled(waiting))

    def _compiled(self, waiting: _Waiting) -> None:
        """Go on with a request, unless it has ended meanwhile."""
        with self._compiling_lock:
            ended = waiting not in self._compiling
            self._compiling.discard(waiting)
        if not ended:
            self._start(waiting.request, waiting.streams, waiting.grammar, waiting.since)

    def _start(
        self,
        request: GenerationRequest,
        streams: Sequence[TextStream],
        compiled: Future[Guide] | None = None,
        since: float | None = None,
    ) -> None:
        """Queue the answers of a request, once its grammar is compiled, or fail them."""
        try:
            guide = None if compiled is None else compiled.result()
            self._engine.submit(*(_job(request, index, each, guide, since) for index, each in enumerate(streams)))
        except CancelledError:
            error: Exception = Overloaded("the model is being unloaded")
        except (InvalidRequest, Overloaded) as refusal:
            error = refusal
            if isinstance(refusal, Overloaded):
                self.recorder.count("requests_rejected")
        except Exception as defect:
            logger.exception("a grammar could not be compiled")
            error = defect
        else:
            return
        for stream in streams:
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

    def _watch(self) -> None:
        if self._unloading():
            self._engine.stop()
        with self._compiling_lock:
            ended = [waiting for waiting in self._compiling if waiting.cancelled or waiting.overdue]
            self._compiling.difference_update(ended)
        for waiting in ended:
            waiting.grammar.cancel()  # is not compiled, if that has not begun
            self.recorder.count("requests_cancelled" if waiting.cancelled else "requests_failed")
            for stream in waiting.streams:
                if waiting.cancelled:
                    stream.finish(FinishReason.CANCELLED)
                else:
                    seconds = waiting.request.timeout_seconds
                    stream.fail(DeadlineExceeded(f"the timeout of {seconds:g} s was over while its grammar waited"))


def _job(request: GenerationRequest, index: int, stream: TextStream, guide: Guide | None, since: float | None) -> Job:
    """The job of one of a request's answers."""
    sampling = request.sampling
    if sampling.seed is not None:
        sampling = replace(sampling, seed=(sampling.seed + index) % 2**64)
    return Job(
        request.prompt_ids,
        sampling,
        stream,
        log_probs=request.return_log_probs,
        top_log_probs=request.top_log_probs,
        prompt_lookup=request.prompt_lookup,
        seconds=request.timeout_seconds,
        stop_token_ids=request.stop_token_ids,
        ignore_eos=request.ignore_eos,
        prompt_log_probs=None if index else request.prompt_log_probs,
        guide=None if guide is None else guide.copy(),
        adapter=request.adapter,
        submitted=since,
    )
