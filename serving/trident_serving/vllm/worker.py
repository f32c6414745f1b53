"""vLLM's engine behind two pipes: this program runs in vLLM's interpreter and imports nothing of Trident.

Lines of JSON come on standard input:

    {"arguments": {...}}                                         first: what vLLM's engine is built with
    {"call": "generate", "id": 7, "prompt": [...],
     "sampling": {...}, "grammar": {...}}                        the grammar is optional
    {"call": "cancel", "id": 7}

and go on standard output; what vLLM prints goes to standard error:

    {"ready": {"version": ..., "vocabulary": ..., "cache_tokens": ...}}, or {"failed": "why"}
    {"id": 7, "tokens": [...], "log_probs": [[of the token, [[token, of it], ...]], ...],
     "prompt_log_probs": [...], "cached": 0, "queued": 0.1, "end": "stop"}
    {"id": 7, "invalid": "why"}, or {"id": 7, "error": "why"}
    {"stats": {"steps": 12, "running": 3, "waiting": 0, "usage": 0.2, "batches": [3, 3]}}

`log_probs` come where `logprobs` is among the sampling parameters, `prompt_log_probs`, `cached` and `queued` with the
first tokens, `end` with the last. The likeliest tokens are sorted.

The end of standard input ends the program with all its processes; so does the end of vLLM's engine.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from typing import Any

STATS_SECONDS = 0.25
MOST_BATCHES = 256  # that are told at once


def top_of(position: dict[int, Any], chosen: int) -> list[Any]:
    """The log-probability of a token, and those of the likeliest, sorted."""
    ranked = sorted(position.items(), key=lambda entry: entry[1].rank)
    return [position[chosen].logprob, [[token, found.logprob] for token, found in ranked]]


class Worker:
    """The requests of one engine.

    Args:
        replies: where messages go.
    """

    def __init__(self, replies: Any) -> None:
        self._replies = replies
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._engines: dict[int, Any] = {}  # stats of each, by its index
        self._steps = self._told = 0
        self._batches: list[int] = []
        self._engine: Any = None
        self._size = 0
        self._end_token: int | None = None

    def send(self, **message: Any) -> None:
        """Send a message."""
        self._replies.write(json.dumps(message) + "\n")
        self._replies.flush()

    def start(self, arguments: dict[str, Any]) -> None:
        """Build the engine and say that it is ready."""
        import vllm
        from vllm.config import StructuredOutputsConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.metrics.loggers import StatLoggerBase

        worker = self

        class Stats(StatLoggerBase):  # type: ignore[misc]
            """Counts steps; vLLM's interface of it is not stable, so it takes what comes."""

            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                self._index = engine_index

            def record(self, scheduler_stats: Any = None, *_: Any, engine_idx: int = 0, **__: Any) -> None:
                if scheduler_stats is not None:
                    worker.note(engine_idx, scheduler_stats)

            def log_engine_initialized(self) -> None:
                pass

        # llguidance is what our own engine follows grammars with.
        structured = StructuredOutputsConfig(backend="guidance")
        engine_arguments = AsyncEngineArgs(**arguments, structured_outputs_config=structured)
        self._engine = AsyncLLM.from_engine_args(engine_arguments, stat_loggers=[Stats])
        config = self._engine.vllm_config
        self._size = config.model_config.get_vocab_size()
        tokenizer = self._engine.get_tokenizer()
        self._end_token = None if tokenizer is None else tokenizer.eos_token_id
        cache = config.cache_config
        self.send(
            ready={
                "version": vllm.__version__,
                "vocabulary": self._size,
                "cache_tokens": (cache.num_gpu_blocks or 0) * (cache.block_size or 0),
            }
        )

    def note(self, engine: int, stats: Any) -> None:
        """A step of an engine."""
        self._engines[engine] = stats
        self._steps += 1
        if stats.num_running_reqs and len(self._batches) < MOST_BATCHES:
            self._batches.append(stats.num_running_reqs)

    async def watch(self) -> None:
        """Tell the stats, and end with the engine."""
        while True:
            await asyncio.sleep(STATS_SECONDS)
            if self._engine.errored:
                end("vLLM's engine has ended")
            if self._steps != self._told:
                self._told = self._steps
                batches, self._batches = self._batches, []
                all_stats = list(self._engines.values())
                usage = [each.kv_cache_usage for each in all_stats]
                self.send(
                    stats={
                        "steps": self._steps,
                        "running": sum(each.num_running_reqs for each in all_stats),
                        "waiting": sum(each.num_waiting_reqs for each in all_stats),
                        "usage": sum(usage) / len(usage),
                        "batches": batches,
                    }
                )

    def handle(self, message: dict[str, Any]) -> None:
        """Do what a message says."""
        number = message["id"]
        if message["call"] == "cancel":
            if (task := self._tasks.get(number)) is not None:
                task.cancel()
            return
        task = asyncio.ensure_future(self._generate(number, message))
        self._tasks[number] = task
        task.add_done_callback(lambda _: self._tasks.pop(number, None))

    async def _generate(self, number: int, message: dict[str, Any]) -> None:
        try:
            parameters = self._parameters(message)
            prompt = {"prompt_token_ids": message["prompt"]}
            first = True
            async for output in self._engine.generate(prompt, parameters, str(number)):
                self._tell(number, output, first)
                first = False
        except asyncio.CancelledError:
            pass  # vLLM has aborted it
        except Exception as error:
            if self._engine.errored:
                end("vLLM's engine has ended")
            self.send(id=number, **{"invalid" if _is_the_callers(error) else "error": _sentence(error)})

    def _parameters(self, message: dict[str, Any]) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

        given = dict(message["sampling"])
        if "logit_bias" in given:
            given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"]}
        if "grammar" in message:
            given["structured_outputs"] = StructuredOutputsParams(**message["grammar"])
            if self._end_token is not None:  # the one that a grammar allows at its end
                given["stop_token_ids"] = sorted({*given.get("stop_token_ids", []), self._end_token})
        return SamplingParams(
            **given,
            ignore_eos=True,  # all ends are among stop_token_ids
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def _tell(self, number: int, output: Any, first: bool) -> None:
        (answer,) = output.outputs
        tokens = list(answer.token_ids)
        told: dict[str, Any] = {"tokens": tokens}
        if answer.logprobs is not None:
            told["log_probs"] = [
                top_of(position, token) for position, token in zip(answer.logprobs, tokens, strict=True)
            ]
        if first:
            told["cached"] = output.num_cached_tokens or 0
            times = output.metrics
            scheduled, queued = getattr(times, "scheduled_ts", 0.0), getattr(times, "queued_ts", 0.0)
            told["queued"] = max(0.0, scheduled - queued)
            if output.prompt_logprobs is not None:
                given = output.prompt_token_ids[1:]
                positions = output.prompt_logprobs[1:]  # the first token has none
                told["prompt_log_probs"] = [
                    top_of(position, token) for position, token in zip(positions, given, strict=True)
                ]
        if answer.finish_reason is not None:
            told["end"] = answer.finish_reason
        self.send(id=number, **told)


def _is_the_callers(error: BaseException) -> bool:
    """Whether the request is to blame; vLLM's classes for that are of this release, ValueError of earlier ones."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"ValueError", "VLLMClientError"})


def _sentence(error: BaseException) -> str:
    cause = error.__cause__ or error
    text = " ".join(str(cause).split())
    return text[:500] if _is_the_callers(error) else f"{type(cause).__name__}: {text[:500]}"


def end(why: str = "") -> None:
    """End this program and every process that vLLM has started: they are its group."""
    if why:
        print(f"trident: {why}", file=sys.stderr, flush=True)
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


async def serve(worker: Worker, lines: Any) -> None:
    """Serve until standard input ends."""
    loop = asyncio.get_running_loop()

    def read() -> None:
        for line in lines:
            loop.call_soon_threadsafe(worker.handle, json.loads(line))
        end()

    threading.Thread(target=read, name="requests", daemon=True).start()
    await worker.watch()


def main() -> None:
    """Build the engine and serve."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lines = os.fdopen(os.dup(0), encoding="utf-8")
    worker = Worker(replies)
    first = json.loads(lines.readline())
    try:
        worker.start(first["arguments"])
    except BaseException as error:
        worker.send(failed=f"{type(error).__name__}: {' '.join(str(error).split())[:1000]}")
        raise
    asyncio.run(serve(worker, lines))


if __name__ == "__main__":
    main()
