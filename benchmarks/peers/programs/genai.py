"""onnxruntime-genai with the int4 graph of its own model builder, the prompts as one padded batch."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import onnxruntime_genai as genai
from numpy.typing import NDArray

from benchmarks.peers.interface import Floats, Prompts, Times
from benchmarks.peers.programs.folders import converted, for_transformers_4


class Genai:
    """Its generator, and ONNX Runtime itself for logits."""

    name = "onnxruntime-genai int4"

    def __init__(self, source: Path, work: Path) -> None:
        def build(folder: Path) -> None:
            command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i"]
            command += [str(for_transformers_4(source, work)), "-o", str(folder), "-p", "int4", "-e", "cpu"]
            subprocess.run([*command, "-c", str(work / "cache")], check=True)

        self.weights = converted(work / "int4", build)
        self._model = genai.Model(str(self.weights))

    def generate(self, prompts: Prompts, tokens: int) -> Times:
        """See `Peer.generate`."""
        # It pads on the left with prompts of one length; shorter ones are repeated to that, which costs the same.
        longest = max(map(len, prompts))
        ids = np.array([(list(prompt) * (longest // len(prompt) + 1))[:longest] for prompt in prompts], np.int32)
        parameters = genai.GeneratorParams(self._model)
        parameters.set_search_options(
            max_length=longest + tokens, min_length=longest + tokens, batch_size=len(prompts), do_sample=False
        )
        generator = genai.Generator(self._model, parameters)
        times = []
        started = time.perf_counter()
        generator.append_tokens(ids)
        for _ in range(tokens):
            generator.generate_next_token()
            times.append(time.perf_counter() - started)
        return [times] * len(prompts)

    def logits(self, ids: Sequence[int]) -> Floats:
        """See `Peer.logits`."""
        session = ort.InferenceSession(str(self.weights / "model.onnx"), providers=["CPUExecutionProvider"])
        past = [node for node in session.get_inputs() if node.name.startswith("past")]
        feeds: dict[str, NDArray[Any]] = {
            node.name: np.zeros((1, node.shape[1], 0, node.shape[3]), np.float32) for node in past
        }
        feeds |= {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}
        result: Floats = session.run(["logits"], feeds)[0][0]
        return result
