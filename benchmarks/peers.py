"""Generators of text for the benchmark, behind one interface: Trident's engine, Trident's server, and their peers.

Each gets the same prompts as token ids and makes the same number of tokens for each, greedily and past any end of the
answer. It reports the time of each token, in seconds from the start.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, StoppingCriteria

from trident_client import Client
from trident_serving.generation.answer import FinishReason, Job
from trident_serving.generation.batch import SlotTokens
from trident_serving.generation.decoder import OnnxDecoder
from trident_serving.generation.drafting import MAX_DRAFT
from trident_serving.generation.engine import Engine, EngineSettings
from trident_serving.runtime.log_probabilities import TokenLogProbs
from trident_serving.runtime.sampling.params import SamplingParams

Prompts = Sequence[Sequence[int]]
Times = list[list[float]]
Logits = list[NDArray[np.float32]]
THREADS = 2
SLOTS = 32
CONTEXT = 2048


class Peer(Protocol):
    """One way to generate."""

    name: str
    weights: Path  # file or folder whose bytes are read for every token

    def generate(self, prompts: Prompts, tokens: int) -> Times:
        """Answer all prompts at once; returns the time of each token of each answer, in seconds from the start."""
        ...


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


class TridentServer:
    """The real server over gRPC with streaming, a thread of this process for each caller."""

    def __init__(
        self, client: Client, model: str, variant: str, folder: Path, texts: dict[tuple[int, ...], str]
    ) -> None:
        self.name = f"Trident server {variant}"
        self.weights = folder
        self._client = client
        self.model = model
        self._texts = texts

    def generate(self, prompts: Prompts, tokens: int) -> Times:
        """See `Peer.generate`."""
        started = time.perf_counter()

        def one(prompt: Sequence[int]) -> list[float]:
            times: list[float] = []
            # A different beginning each time: the server would reuse the prefix, and its peers have none.
            text = f"{next(_NUMBERS)} " + self._texts[tuple(prompt)]
            stream = self._client.stream(
                text, model=self.model, max_tokens=tokens, min_tokens=tokens, prompt_lookup=False
            )
            for chunk in stream:
                now = time.perf_counter() - started
                times += [now] * (chunk.num_output_tokens - len(times))
            return times

        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(one, prompts))


class _Numbers:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._value = 0

    def __next__(self) -> int:
        with self._lock:
            self._value += 7
            return self._value


_NUMBERS = _Numbers()


class Transformers:
    """Hugging Face `generate` in float32, the prompts as one padded batch."""

    name = "transformers fp32"

    def __init__(self, folder: Path, pad: int) -> None:
        self.weights = folder
        self._pad = pad
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

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


class Genai:
    """onnxruntime-genai with the int4 graph of its own model builder, the prompts as one padded batch."""

    name = "onnxruntime-genai int4"

    def __init__(self, folder: Path) -> None:
        import onnxruntime_genai as genai

        self.weights = folder
        self._genai = genai
        self._model = genai.Model(str(folder))
        self._tokenizer = genai.Tokenizer(self._model)

    def generate(self, prompts: Prompts, tokens: int) -> Times:
        """See `Peer.generate`."""
        # It pads on the left with prompts of one length; shorter ones are repeated to that, which costs the same.
        longest = max(map(len, prompts))
        ids = np.array([(list(prompt) * (longest // len(prompt) + 1))[:longest] for prompt in prompts], np.int32)
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(
            max_length=longest + tokens, min_length=longest + tokens, batch_size=len(prompts), do_sample=False
        )
        generator = self._genai.Generator(self._model, parameters)
        times = []
        started = time.perf_counter()
        generator.append_tokens(ids)
        for _ in range(tokens):
            generator.generate_next_token()
            times.append(time.perf_counter() - started)
        return [times] * len(prompts)


class LlamaCpp:
    """llama.cpp on the file that the weights come from: prompts one after another, then batched decoding."""

    name = "llama.cpp Q4_1"

    def __init__(self, file: Path) -> None:
        import llama_cpp

        self.weights = file
        self._lib = llama_cpp
        # It prints hundreds of lines otherwise.
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = SLOTS * 640, SLOTS
        parameters.n_batch = parameters.n_ubatch = 512
        parameters.n_threads = parameters.n_threads_batch = THREADS
        parameters.kv_unified = False
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def generate(self, prompts: Prompts, tokens: int) -> Times:
        """See `Peer.generate`."""
        lib = self._lib
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
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

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Of every position of a text, [tokens, vocabulary]."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        return np.array(self._run([(0, 0, ids)], every=True))

    def _run(self, items: list[tuple[int, int, Sequence[int]]], every: bool = False) -> list[NDArray[np.float32]]:
        lib = self._lib
        count = sum(len(ids) for _, _, ids in items)
        batch = lib.llama_batch_init(count, 0, 1)
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
        if lib.llama_decode(self._context, batch):
            raise RuntimeError("llama.cpp could not decode")
        lib.llama_batch_free(batch)
        rows = [lib.llama_get_logits_ith(self._context, index) for index in wanted]
        return [np.ctypeslib.as_array(row, (self._vocabulary,)) for row in rows]


def installed(package: str) -> bool:
    """Whether an optional peer can be imported."""
    return importlib.util.find_spec(package) is not None


def trident_logits(decoder: OnnxDecoder) -> Callable[[Sequence[int]], NDArray[np.float32]]:
    """A function from a text's ids to its logits."""
    return lambda ids: decoder.run([SlotTokens(0, 0, ids, len(ids))]).copy()


def genai_logits(folder: Path) -> Callable[[Sequence[int]], NDArray[np.float32]]:
    """The same for a graph of onnxruntime-genai's model builder, run by ONNX Runtime itself."""
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    past = [node for node in session.get_inputs() if node.name.startswith("past")]

    def logits(ids: Sequence[int]) -> NDArray[np.float32]:
        feeds: dict[str, NDArray[Any]] = {
            node.name: np.zeros((1, node.shape[1], 0, node.shape[3]), np.float32) for node in past
        }
        feeds |= {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}
        result: NDArray[np.float32] = session.run(["logits"], feeds)[0][0]
        return result

    return logits
