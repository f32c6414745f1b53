"""Trident's engine in the benchmark's process, and Trident's server."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

from benchmarks.peers.interface import CONTEXT, SLOTS, THREADS, Floats, Prompts, Times
from trident_client import Client
from trident_serving.generation.answer import FinishReason, Job
from trident_serving.generation.batch import SlotTokens
from trident_serving.generation.decoder import OnnxDecoder
from trident_serving.generation.drafting import MAX_DRAFT
from trident_serving.generation.engine import Engine, EngineSettings
from trident_serving.runtime.log_probabilities import TokenLogProbs
from trident_serving.runtime.sampling.params import SamplingParams


class _Timed:
    """A consumer of the engine that records only times."""

    cancelled = False

    def __init__(self, started: float) -> None:
        self._started = started
        self.times: list[float] = []
        self.done = threading.Event()

    def accept(self, token: int, log_probs: TokenLogProbs | None) -> bool:
        """See `Consumer.accept`."""
        self.times.append(time.perf_counter() - self._started)
        return False

    def finish(self, reason: FinishReason) -> None:
        """See `Consumer.finish`."""
        self.done.set()

    def fail(self, error: Exception) -> None:
        """See `Consumer.fail`."""
        raise error


class TridentEngine:
    """The engine in this process, without a server."""

    def __init__(self, folder: Path, variant: str) -> None:
        self.name = f"Trident engine {variant}"
        self.weights = folder
        self.decoder = OnnxDecoder(
            folder / "model.onnx", slots=SLOTS, context=CONTEXT, longest_run=max(128, MAX_DRAFT + 1), threads=THREADS
        )
        settings = EngineSettings(SLOTS, SLOTS * CONTEXT, prefill_chunk=128, max_waiting=SLOTS, prefix_reuse=False)
        self._engine = Engine(self.decoder, settings, eos_token_ids=frozenset())

    def generate(self, prompts: Prompts, tokens: int, adapters: Sequence[int] = ()) -> Times:
        """See `Peer.generate`.

        Args:
            adapters: of each prompt; (): none.
        """
        started = time.perf_counter()
        consumers = [_Timed(started) for _ in prompts]
        for index, (prompt, consumer) in enumerate(zip(prompts, consumers, strict=True)):
            adapter = adapters[index] if adapters else 0
            sampling = SamplingParams(max_tokens=tokens)
            self._engine.submit(Job(prompt, sampling, consumer, prompt_lookup=False, adapter=adapter))
        for consumer in consumers:
            consumer.done.wait()
        return [consumer.times for consumer in consumers]

    def logits(self, ids: Sequence[int]) -> Floats:
        """See `Peer.logits`."""
        return self.decoder.run([SlotTokens(0, 0, ids, len(ids))]).copy()


class TridentServer:
    """The real server over gRPC with streaming, a thread of this process for each caller.

    Args:
        texts: of each prompt's ids.
        engine: of the same variant: it computes the same logits; None: nobody asks for them.
    """

    def __init__(
        self,
        client: Client,
        model: str,
        variant: str,
        texts: dict[tuple[int, ...], str],
        engine: TridentEngine | None = None,
    ) -> None:
        self.name = f"Trident server {variant}"
        if engine is not None:
            self.weights = engine.weights
            self.logits = engine.logits
        self._client = client
        self.model = model
        self._texts = texts
        self._numbers = count(7, 7)

    def generate(self, prompts: Prompts, tokens: int) -> Times:
        """See `Peer.generate`."""
        # A different beginning each time: the server would reuse the prefix, and its peers have none.
        texts = [f"{next(self._numbers)} {self._texts[tuple(prompt)]}" for prompt in prompts]
        started = time.perf_counter()

        def one(text: str) -> list[float]:
            times: list[float] = []
            stream = self._client.stream(
                text, model=self.model, max_tokens=tokens, min_tokens=tokens, prompt_lookup=False
            )
            for chunk in stream:
                now = time.perf_counter() - started
                times += [now] * (chunk.num_output_tokens - len(times))
            return times

        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(one, texts))
