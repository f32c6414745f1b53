"""Hugging Face's transformers in float32: `generate` with one padded batch, and its continuous batching."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, StoppingCriteria

from benchmarks.peers.interface import SLOTS, THREADS, Floats, Prompts, Times


class Generate:
    """`generate`, the prompts as one padded batch."""

    name = "transformers fp32"

    def __init__(self, source: Path, work: Path) -> None:
        torch.set_num_threads(THREADS)
        self.weights = source
        self._pad = AutoTokenizer.from_pretrained(source).pad_token_id or 0
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()

    def generate(self, prompts: Prompts, tokens: int) -> Times:
        """See `Peer.generate`."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[self._pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        times: list[float] = []
        started = time.perf_counter()

        class Note(StoppingCriteria):
            def __call__(self, *_: Any, **__: Any) -> Any:
                times.append(time.perf_counter() - started)
                return torch.zeros(len(prompts), dtype=torch.bool)

        self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=self._pad,
            stopping_criteria=[Note()],
        )
        return [times] * len(prompts)

    def logits(self, ids: Sequence[int]) -> Floats:
        """See `Peer.logits`."""
        with torch.inference_mode():
            return self.model(torch.tensor([list(ids)])).logits[0].numpy()


class ContinuousBatching(Generate):
    """Its own continuous batching over a paged cache."""

    name = "transformers fp32, continuous batching"

    def generate(self, prompts: Prompts, tokens: int) -> Times:
        """See `Peer.generate`."""
        config = GenerationConfig(
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=self._pad,
            num_blocks=SLOTS * 20,
            max_batch_tokens=512,
        )
        manager = self.model.init_continuous_batching(generation_config=config)
        times: dict[str, list[float]] = {}
        started = time.perf_counter()
        manager.start()
        try:
            for number, prompt in enumerate(prompts):
                times[str(number)] = []
                manager.add_request(list(prompt), request_id=str(number), max_new_tokens=tokens, streaming=True)
            while any(len(row) < tokens for row in times.values()):
                output = manager.get_result(timeout=60)
                if output is None:
                    raise RuntimeError("no token within a minute")
                row = times[output.request_id]
                row += [time.perf_counter() - started] * (len(output.generated_tokens) - len(row))
        finally:
            manager.stop(block=True)
        return list(times.values())
