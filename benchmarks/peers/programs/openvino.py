"""openvino-genai: weights of int8 or int4, continuous batching over a paged cache."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino
import openvino_genai

from benchmarks.peers.interface import SLOTS, THREADS, Floats, Prompts, Times
from benchmarks.peers.programs.folders import converted, for_transformers_4


class OpenVino:
    """Its pipeline, and OpenVINO itself for logits, without the eight bits of the paged cache."""

    def __init__(self, source: Path, work: Path, weights: str) -> None:
        self.name = f"openvino-genai {weights}"
        programs = Path(sys.executable).parent

        def export(folder: Path) -> None:
            older = str(for_transformers_4(source, work))
            group = ["--group-size", "32", "--ratio", "1.0"] if weights == "int4" else []
            command = [str(programs / "optimum-cli"), "export", "openvino", "-m", older]
            command += ["--task", "text-generation-with-past", "--weight-format", weights, *group, str(folder)]
            subprocess.run(command, check=True)
            convert = [str(programs / "convert_tokenizer"), older, "--with-detokenizer", "-o", str(folder)]
            subprocess.run(convert, check=True)

        self.weights = converted(work / weights, export)
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 2  # GB
        scheduler.max_num_batched_tokens = 256
        scheduler.max_num_seqs = SLOTS
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": THREADS}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(str(self.weights), scheduler, "CPU", properties)
        self._model: openvino.CompiledModel | None = None

    def generate(self, prompts: Prompts, tokens: int) -> Times:
        """See `Peer.generate`."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = tokens
        config.ignore_eos = True
        config.do_sample = False
        times: Times = [[] for _ in prompts]
        started = time.perf_counter()
        handles = [
            self._pipeline.add_request(number, openvino.Tensor(np.array([prompt], np.int64)), config)
            for number, prompt in enumerate(prompts)
        ]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            now = time.perf_counter() - started
            for handle, row in zip(handles, times, strict=True):
                while handle.can_read():
                    for output in handle.read().values():
                        row += [now] * len(output.generated_ids)
        return times

    def logits(self, ids: Sequence[int]) -> Floats:
        """See `Peer.logits`."""
        if self._model is None:
            self._model = openvino.Core().compile_model(
                str(self.weights / "openvino_model.xml"), "CPU", {"INFERENCE_NUM_THREADS": THREADS}
            )
        request = self._model.create_infer_request()
        request.reset_state()
        count = len(ids)
        feeds = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, count), np.int64),
            "position_ids": np.arange(count, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        names = {name for port in self._model.inputs for name in port.get_names()}
        request.infer({name: value for name, value in feeds.items() if name in names})
        return np.array(request.get_tensor("logits").data[0])
