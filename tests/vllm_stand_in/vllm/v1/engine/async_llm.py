"""vLLM's engine: token after token of the prompt again, one every few milliseconds."""

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

from vllm import VOCABULARY, note
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import EngineDeadError
from vllm.sampling_params import RequestOutputKind, SamplingParams

SECONDS = 0.005
END = 0  # the tokenizer's
# A prompt that begins with one of these makes the engine fail, or end.
FAILS, ENDS = 500, 501


class AsyncLLM:
    """The engine."""

    def __init__(self, arguments: dict[str, Any], stats: Any) -> None:
        self.errored = False
        self._stats = stats
        self._running = 0
        cache = SimpleNamespace(num_gpu_blocks=64, block_size=16)
        model = SimpleNamespace(get_vocab_size=lambda: VOCABULARY)
        self.vllm_config = SimpleNamespace(model_config=model, cache_config=cache)
        note(arguments={name: value for name, value in arguments.items() if isinstance(value, str | int | float)})

    @classmethod
    def from_engine_args(cls, arguments: AsyncEngineArgs, stat_loggers: Sequence[Any]) -> "AsyncLLM":
        """Build it."""
        print("what a library prints is no message", flush=True)
        if arguments.given["model"] == "missing":
            raise ValueError("there is no model missing")
        if (marker := os.environ.get("VLLM_STAND_IN_REFUSES")) and os.path.exists(marker):
            raise RuntimeError("no memory")
        return cls(arguments.given, stat_loggers[0](None))

    def get_tokenizer(self) -> Any:
        """The model's tokenizer."""
        return SimpleNamespace(eos_token_id=END)

    async def generate(self, prompt: dict[str, list[int]], parameters: SamplingParams, name: str) -> AsyncIterator[Any]:
        """Answer."""
        ids = prompt["prompt_token_ids"]
        assert parameters.output_kind is RequestOutputKind.DELTA
        asked = dict(vars(parameters))
        grammar = asked.pop("structured_outputs")
        del asked["output_kind"]
        note(name=name, prompt=ids, asked=asked, grammar=grammar and vars(grammar))
        self._running += 1
        try:
            for index in range(parameters.max_tokens):
                await asyncio.sleep(SECONDS)
                if ids[0] == FAILS:
                    raise RuntimeError("a kernel failed")
                if ids[0] == ENDS:
                    self.errored = True
                    raise EngineDeadError("dead")
                self._tell()
                token = ids[index % len(ids)]
                reason = "stop" if token in parameters.stop_token_ids else None
                if index + 1 == parameters.max_tokens:
                    reason = reason or "length"
                yield self._output(ids, parameters, token, index, reason)
                if reason is not None:
                    break
        except asyncio.CancelledError:
            note(aborted=name)
            raise
        finally:
            self._running -= 1
            self._tell()

    def _tell(self) -> None:
        self._stats.record(
            SimpleNamespace(num_running_reqs=self._running, num_waiting_reqs=0, kv_cache_usage=0.5), None, engine_idx=0
        )

    def _output(self, ids: list[int], parameters: SamplingParams, token: int, index: int, reason: str | None) -> Any:
        def position(chosen: int, count: int) -> dict[int, Any]:
            ranked = [chosen, *(other for other in range(count + 1) if other != chosen)][: count or 1]
            return {each: SimpleNamespace(logprob=-0.5 - rank, rank=rank + 1) for rank, each in enumerate(ranked)}

        log_probs = None if parameters.logprobs is None else [position(token, parameters.logprobs)]
        told = None
        if parameters.prompt_logprobs is not None and index == 0:
            told = [None, *(position(each, parameters.prompt_logprobs) for each in ids[1:])]
        answer = SimpleNamespace(token_ids=[token], logprobs=log_probs, finish_reason=reason)
        return SimpleNamespace(
            outputs=[answer],
            prompt_token_ids=ids,
            prompt_logprobs=told,
            num_cached_tokens=2,
            metrics=SimpleNamespace(scheduled_ts=3.5, queued_ts=3.25),
        )
