"""A generator's service with a guard around it: its callers can reach the engine through the rules only.

Requests are filtered before the engine sees them, and answers on their way to the client. Without rules that ask
models, a request is filtered on the thread that brings it and an answer on the outbox's; otherwise both wait in an
event loop on a thread of its own. The engine and its numbers are those of a generator without a guard.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from trident_serving.chat.template import Joint
from trident_serving.errors import InvalidRequest, Overloaded
from trident_serving.generation.answer import FinishReason
from trident_serving.generation.request import GenerationRequest
from trident_serving.generation.stream import Chunk, ResponseChannel
from trident_serving.guard import prompts
from trident_serving.guard.asking import Models
from trident_serving.guard.filtering import Findings, Passed, TextFilter, at_once, filter_all, read_apart
from trident_serving.guard.rules import Action, Guard, Stage
from trident_serving.guard.structured import JsonFilter
from trident_serving.runtime.metrics import Recorder
from trident_serving.runtime.sampling.grammars import GrammarKind
from trident_serving.runtime.tokenizer import TextTokenizer
from trident_serving.schema.fields import Inputs
from trident_serving.text import encode_texts

logger = logging.getLogger(__name__)
TOKENS = ("return_tokens", "top_logprobs")
_OTHERS = ("reasoning", "tool_calls")  # texts of a chunk, where they are asked for
_NO_CALLS = "[]"
_JSON = (GrammarKind.JSON, GrammarKind.JSON_SCHEMA)
WATCH_SECONDS = 0.2  # between two questions whether the model is being unloaded


class Service(Protocol):
    """A generator's service; see `trident_serving.generation.service.GenerationService`."""

    memory: Any
    draft_name: str
    recorder: Recorder
    tokenizer: TextTokenizer
    joint: Joint

    def parse(self, inputs: Inputs, timeout: object = None) -> GenerationRequest:
        """Check a request."""
        ...

    def submit(self, request: GenerationRequest, channel: ResponseChannel) -> None:
        """Start it."""
        ...

    def steps(self) -> int:
        """Steps of the engine so far."""
        ...

    def busy(self) -> bool:
        """Whether the engine has work."""
        ...

    def stop(self) -> None:
        """End the threads."""
        ...


@dataclass(frozen=True)
class GuardedRequest:
    """A checked request, with what it was read from."""

    inputs: Inputs
    timeout: object
    request: GenerationRequest


class GuardedService:
    """Has the methods of the service that it guards.

    Args:
        models: those that the guard's rules ask.
        max_open: requests that may be checked or answered at once, where a rule asks a model.
        unloading: asked while such requests are open; once it says yes, they fail.
    """

    def __init__(
        self,
        service: Service,
        guard: Guard,
        models: Models,
        max_open: int,
        unloading: Callable[[], bool] = lambda: False,
    ) -> None:
        self._unloading = unloading
        self._service = service
        self._guard = guard
        self._models = models
        self._max_open = max_open
        self.memory, self.draft_name, self.recorder = service.memory, service.draft_name, service.recorder
        self.tokenizer = service.tokenizer
        self.steps, self.busy = service.steps, service.busy
        self._input, self._output = guard.of(Stage.INPUT), guard.of(Stage.OUTPUT)
        self.loop: asyncio.AbstractEventLoop | None = None
        self._open: set[asyncio.Task[None]] = set()
        self._watching: asyncio.Task[None] | None = None
        if any(rule.model for rule in guard.rules):
            self.loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._run, name="guard", daemon=True)
            self._thread.start()

    def parse(self, inputs: Inputs, timeout: object = None) -> GuardedRequest:
        """See `RequestParser.parse`.

        Raises:
            InvalidRequest: also where it asks for tokens, which would tell what a rule keeps back.
        """
        request = self._service.parse(inputs, timeout)
        if self._guard.hides(Stage.OUTPUT) and request.sampling.max_tokens:
            for name, asked in zip(TOKENS, (request.return_tokens, request.top_log_probs), strict=True):
                if asked:
                    raise InvalidRequest(
                        f"{name} is not known to this model: its guard {self._guard.name} may hide text"
                    )
        if self._guard.hides(Stage.OUTPUT) and request.prompt_log_probs:
            # Whoever sends what the model has said so far would read the next token among the likeliest.
            raise InvalidRequest(
                f"prompt_logprobs must be 0, since this model's guard {self._guard.name} may hide text: with 0, "
                "log-probabilities are those of the prompt's own tokens"
            )
        return GuardedRequest(inputs, timeout, request)

    def submit(self, request: GuardedRequest, channel: ResponseChannel) -> None:
        """See `GenerationService.submit`.

        Raises:
            Overloaded: too many requests are open.
        """
        exchange = _Exchange(self, request.request, channel)
        if self.loop is None:
            at_once(self._begin(request, exchange))
        elif len(self._open) >= self._max_open:
            raise Overloaded(f"{self._max_open} requests are open already; try again later")
        else:
            self.loop.call_soon_threadsafe(self._start, request, exchange)

    def stop(self) -> None:
        """End the threads; unfinished requests fail."""
        self._service.stop()
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()

    def _run(self) -> None:
        assert self.loop is not None
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.run_until_complete(asyncio.sleep(0))  # what was submitted just now becomes a task
        left = [*self._open, *([] if self._watching is None else [self._watching])]
        for task in left:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self.loop.run_until_complete(self._models.close())
        self.loop.close()

    def _start(self, request: GuardedRequest, exchange: _Exchange) -> None:
        assert self.loop is not None
        task = self.loop.create_task(self._serve(request, exchange))
        self._open.add(task)
        task.add_done_callback(self._open.discard)
        if self._watching is None:
            self._watching = self.loop.create_task(self._watch())

    async def _watch(self) -> None:
        """End what is open once the model is being unloaded, also what waits only for a rule's model."""
        while self._open:
            await asyncio.sleep(WATCH_SECONDS)
            if self._unloading():
                for task in list(self._open):
                    task.cancel()
        self._watching = None

    async def _serve(self, request: GuardedRequest, exchange: _Exchange) -> None:
        """One request from its first check to its last response."""
        queue: asyncio.Queue[Chunk | Exception] = asyncio.Queue()
        exchange.queue = queue
        try:
            await self._begin(request, exchange)
            while not exchange.complete:
                await exchange.handle(await queue.get())
        except asyncio.CancelledError:
            exchange.abandon(Overloaded("the model was unloaded before the answer was complete"))
        except Exception as error:
            exchange.abandon(error)

    async def _begin(self, given: GuardedRequest, exchange: _Exchange) -> None:
        """Check what a request says, and start it."""
        checked: GuardedRequest | None = given
        if self._input and given.request.needs_model:
            checked = await self._checked(given, exchange)
        if checked is None:
            exchange.refuse()
            self.recorder.count("guard_blocks")
            return
        exchange.said = prompts.said(checked.inputs, checked.request.prompt)
        if exchange.is_cancelled():
            exchange.refuse(FinishReason.CANCELLED)
            return
        request = replace(checked.request, timeout_seconds=max(exchange.deadline - time.monotonic(), 1e-3))
        exchange.request = request
        self._service.submit(request, exchange)

    async def _checked(self, given: GuardedRequest, exchange: _Exchange) -> GuardedRequest | None:
        """The request as its rules leave it; None where one blocks it."""
        asked = self._models.about(exchange.deadline)
        tokens = prompts.runs(given.request.prompt_ids, self.tokenizer) if "input_ids" in given.inputs else []

        async def every(texts: Sequence[str]) -> Sequence[Passed]:
            return await filter_all(texts, self._input, Stage.INPUT, exchange.findings, asked)

        patterns = [rule for rule in self._input if rule.pattern]
        hiding = [rule for rule in patterns if rule.action is not Action.ANNOTATE]
        blocking = [rule for rule in patterns if rule.action is Action.BLOCK]

        def spread(inputs: Inputs) -> bool:
            """Whether a pattern blocks what stands together in a prompt and is several texts in a request."""
            read = read_apart(prompts.joined(inputs), blocking, Stage.INPUT, exchange.findings) if blocking else []
            return any(each.blocked for each in read)

        if spread(given.inputs):  # as it came: a model may redact a part of what a pattern blocks
            return None

        async def apart(texts: Sequence[str]) -> Sequence[Passed]:
            return read_apart(texts, hiding, Stage.INPUT, exchange.findings)

        try:
            changed = await prompts.filtered(given.inputs, tokens, self.tokenizer, every, self._service.joint)
            left = given.inputs if changed is None else changed
            if hiding and prompts.in_parts(left):  # a template may put those of another role together otherwise
                left_apart = await prompts.filtered(left, tokens, self.tokenizer, apart)
                changed = changed if left_apart is None else left_apart
        except prompts.Blocked:
            return None
        if changed is not None:
            given = self._again(changed, given)
            if spread(given.inputs):  # what redactions have made
                return None
        if len(tokens) > 1:  # what lies on both sides of a special token
            text = self.tokenizer.decode(given.request.prompt_ids)
            (passed,) = await filter_all([text], hiding, Stage.INPUT, exchange.findings, asked)
            if passed.blocked:
                return None
            if passed.text != text:
                others = {name: tensor for name, tensor in given.inputs.items() if name != "input_ids"}
                given = self._again({**others, "text_input": encode_texts([passed.text])[None]}, given)
        return given

    def _again(self, inputs: Inputs, given: GuardedRequest) -> GuardedRequest:
        return GuardedRequest(inputs, given.timeout, self._service.parse(inputs, given.timeout))

    def output(self, exchange: _Exchange, findings: Findings, *, as_json: bool = False) -> TextFilter | JsonFilter:
        """What filters one text of an answer.

        Args:
            as_json: whether it is JSON.
        """
        asked = self._models.about(exchange.deadline, exchange.said, answer=True)
        return (JsonFilter if as_json else TextFilter)(self._output, Stage.OUTPUT, findings, asked)


class _Answer:
    """One of a request's answers on its way out.

    Attributes:
        ended: whether its last chunk has gone.
        held: what waits for text to go with.
    """

    def __init__(self, exchange: _Exchange, service: GuardedService) -> None:
        self._exchange = exchange
        self._service = service
        self._findings = exchange.findings.copy()
        self._texts: dict[str, TextFilter | JsonFilter] = {}
        request = exchange.request
        self._known = frozenset(request.conversation.tool_names) if request.conversation is not None else frozenset()
        self._is_json = request.grammar is not None and request.grammar.kind in _JSON
        self._repeated = len(request.prompt) if self._is_json and request.include_prompt else 0
        self.ended = False
        self.held: Chunk | None = None

    async def take(self, chunk: Chunk) -> Chunk | None:
        """What goes out for a chunk, if anything does."""
        if self.ended:
            return None
        end = chunk.finish_reason is not None
        if chunk.finish_reason is FinishReason.CANCELLED:  # nobody reads it
            parts: dict[str, Any] = {"text": "", **{name: "" for name in _OTHERS if getattr(chunk, name) is not None}}
            blocked = False
        else:
            blocked, parts = await self._filtered(chunk, end=end)
        out = replace(chunk, **parts, others=[])
        if blocked:
            out.finish_reason = FinishReason.CONTENT_FILTER
            self._service.recorder.count("guard_blocks")
        self.ended = end or blocked
        if self.held is not None:
            out = _together(self.held, out, counts_chunks=self._exchange.request.counts_chunks)
            self.held = None
        if self.ended:
            out.findings = json.dumps(self._findings.told())
        elif not (out.text or out.reasoning or (out.tool_calls or _NO_CALLS) != _NO_CALLS):
            self.held = out
            return None
        return out

    async def _filtered(self, chunk: Chunk, *, end: bool) -> tuple[bool, dict[str, Any]]:
        """Whether the answer is blocked, and its texts: in the order in which a model writes them."""
        parts: dict[str, Any] = {}
        blocked = False
        if chunk.reasoning is not None:
            over = end or bool(chunk.text) or (chunk.tool_calls or _NO_CALLS) != _NO_CALLS
            passed = await self._push("reasoning", chunk.reasoning, end=over)
            parts["reasoning"], blocked = passed.text, passed.blocked
        text = "" if blocked else chunk.text
        parts["text"] = ""
        if self._repeated and text and not blocked:
            # All of it comes at once, before the JSON that answers it.
            passed = await self._push("prompt", text[: self._repeated], end=True)
            parts["text"], blocked = passed.text, passed.blocked
            text, self._repeated = text[self._repeated :], 0
        passed = await self._push("text", "" if blocked else text, end=end or blocked, as_json=self._is_json)
        parts["text"], blocked = parts["text"] + passed.text, blocked or passed.blocked
        if chunk.tool_calls is not None:
            calls = {} if blocked else {call["index"]: call for call in json.loads(chunk.tool_calls)}
            for index in sorted({*calls, *self._called()} if end and not blocked else calls):
                call = calls.get(index, {"index": index, "function": {"arguments": ""}})
                function = call["function"]
                if not blocked and function.get("name", "") not in ("", *self._known):
                    named = await self._service.output(self._exchange, self._findings).push(function["name"], end=True)
                    function, blocked = {**function, "name": named.text}, named.blocked
                given = "" if blocked else function["arguments"]
                passed = await self._push(f"call {index}", given, end=end or blocked, as_json=True)
                blocked = blocked or passed.blocked
                calls[index] = {**call, "function": {**function, "arguments": passed.text}}
            kept = [call for _, call in sorted(calls.items()) if "id" in call or call["function"]["arguments"]]
            parts["tool_calls"] = json.dumps(kept, ensure_ascii=False)
            if blocked and not end:
                parts["text"] += (await self._push("text", "", end=True)).text
        return blocked, parts

    def _called(self) -> list[int]:
        return [int(name.partition(" ")[2]) for name in self._texts if name.startswith("call ")]

    async def _push(self, name: str, text: str, *, end: bool, as_json: bool = False) -> Passed:
        if name not in self._texts:
            self._texts[name] = self._service.output(self._exchange, self._findings, as_json=as_json)
        return await self._texts[name].push(text, end=end)


def _together(first: Chunk, second: Chunk, *, counts_chunks: bool) -> Chunk:
    """Two chunks as one; the first has no text."""
    return replace(
        second,
        num_output_tokens=second.num_output_tokens + (first.num_output_tokens if counts_chunks else 0),
        log_probs=[*first.log_probs, *second.log_probs],
        prompt_log_probs=[*first.prompt_log_probs, *second.prompt_log_probs],
        token_ids=[*first.token_ids, *second.token_ids],
        prompt_ids=first.prompt_ids or second.prompt_ids,
    )


class _Exchange:
    """Implements `ResponseChannel` for the engine, and answers the client.

    Attributes:
        request: as it was submitted.
        findings: of what the request says.
        said: that, for a judge.
        deadline: when its time is over, by `time.monotonic`.
        queue: chunks on their way to the event loop; None: there is none.
    """

    def __init__(self, service: GuardedService, request: GenerationRequest, channel: ResponseChannel) -> None:
        self.request = request
        self.findings = Findings()
        self.said = request.prompt
        self.deadline = time.monotonic() + request.timeout_seconds
        self.queue: asyncio.Queue[Chunk | Exception] | None = None
        self._service = service
        self._channel = channel
        self._answers: list[_Answer] | None = None
        self._failed = False

    @property
    def complete(self) -> bool:
        """Whether nothing goes out any more."""
        return self._failed or (self._answers is not None and all(answer.ended for answer in self._answers))

    def send(self, chunk: Chunk) -> None:
        """See `ResponseChannel.send`."""
        self._put(chunk)

    def fail(self, error: Exception) -> None:
        """See `ResponseChannel.fail`."""
        self._put(error)

    def is_cancelled(self) -> bool:
        """Whether the client has gone, or has all that it gets."""
        return self.complete or self._channel.is_cancelled()

    def abandon(self, error: Exception) -> None:
        """Fail at once, whatever waits."""
        if not self.complete:
            self._failed = True
            self._channel.fail(error)

    def refuse(self, reason: FinishReason = FinishReason.CONTENT_FILTER) -> None:
        """Answer without the engine."""
        told = json.dumps(self.findings.told())
        size = len(self.request.prompt_ids)
        chunks = [Chunk("", reason, size, index=index, findings=told) for index in range(self.request.answers)]
        for chunk in chunks:
            chunk.reasoning = "" if self.request.return_reasoning else None
        chunks[-1].final = True
        self._failed = True  # whatever comes now comes too late
        if not self.request.stream:
            chunks[0].others, chunks[0].final = chunks[1:], True
            chunks = chunks[:1]
        for chunk in chunks:
            self._channel.send(chunk)

    async def handle(self, given: Chunk | Exception) -> None:
        """Send what of a chunk may go out."""
        if self.complete:
            return
        if isinstance(given, Exception):
            self.abandon(given)
            return
        if self._answers is None:
            self._answers = [_Answer(self, self._service) for _ in range(self.request.answers)]
        taken = [await self._answers[each.index].take(each) for each in (given, *given.others)]
        found = [chunk for chunk in taken if chunk is not None]
        if found:
            found[0].others = found[1:]
            found[0].final = self.complete
            self._channel.send(found[0])

    def _put(self, given: Chunk | Exception) -> None:
        if self.queue is None:
            at_once(self.handle(given))
            return
        assert self._service.loop is not None
        self._service.loop.call_soon_threadsafe(self.queue.put_nowait, given)
