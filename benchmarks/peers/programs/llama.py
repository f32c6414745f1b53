"""llama.cpp on the file that the weights come from: prompts one after another, then batched decoding."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np

from benchmarks.peers.interface import SLOTS, THREADS, Floats, Prompts, Times


class LlamaCpp:
    """Its C interface, by ctypes.

    Args:
        source: the GGUF file.
    """

    name = "llama.cpp Q4_1"

    def __init__(self, source: Path, work: Path) -> None:
        self.weights = source
        # It prints hundreds of lines otherwise.
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(source).encode(), llama_cpp.llama_model_default_params())
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = SLOTS * 640, SLOTS
        parameters.n_batch = parameters.n_ubatch = 512
        parameters.n_threads = parameters.n_threads_batch = THREADS
        parameters.kv_unified = False
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def generate(self, prompts: Prompts, tokens: int) -> Times:
        """See `Peer.generate`."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        started = time.perf_counter()
        times: Times = [[] for _ in prompts]
        last: list[int] = []
        for row, prompt in enumerate(prompts):
            for begin in range(0, len(prompt), 512):
                logits = self._run([(row, begin, prompt[begin : begin + 512])])
            last.append(int(logits[-1].argmax()))
            times[row].append(time.perf_counter() - started)
        for step in range(1, tokens):
            logits = self._run([(row, len(prompt) + step - 1, [last[row]]) for row, prompt in enumerate(prompts)])
            last = [int(row.argmax()) for row in logits]
            for row_times in times:
                row_times.append(time.perf_counter() - started)
        return times

    def logits(self, ids: Sequence[int]) -> Floats:
        """See `Peer.logits`."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        return np.array(self._run([(0, 0, ids)], every=True))

    def _run(self, items: list[tuple[int, int, Sequence[int]]], every: bool = False) -> list[Floats]:
        count = sum(len(ids) for _, _, ids in items)
        batch = llama_cpp.llama_batch_init(count, 0, 1)
        wanted, index = [], 0
        for row, start, ids in items:
            for offset, token in enumerate(ids):
                batch.token[index], batch.pos[index] = token, start + offset
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
                batch.logits[index] = every or offset == len(ids) - 1
                if batch.logits[index]:
                    wanted.append(index)
                index += 1
        batch.n_tokens = count
        if llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError("llama.cpp could not decode")
        llama_cpp.llama_batch_free(batch)
        rows = [llama_cpp.llama_get_logits_ith(self._context, index) for index in wanted]
        return [np.ctypeslib.as_array(row, (self._vocabulary,)) for row in rows]
