"""CTranslate2 with int8 weights, the prompts as one batch."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
from transformers import AutoTokenizer

from benchmarks.peers.interface import THREADS, Floats, Prompts, Times
from benchmarks.peers.programs.folders import converted, for_transformers_4


class CTranslate2:
    """Its generator of one converted folder."""

    name = "CTranslate2 int8"

    def __init__(self, source: Path, work: Path) -> None:
        older = for_transformers_4(source, work)

        def convert(folder: Path) -> None:
            program = str(Path(sys.executable).parent / "ct2-transformers-converter")
            command = [program, "--model", str(older), "--output_dir", str(folder), "--quantization", "int8"]
            subprocess.run(command, check=True)

        self.weights = converted(work / "int8", convert)
        self._tokenizer = AutoTokenizer.from_pretrained(older)
        self._generator = ctranslate2.Generator(str(self.weights), device="cpu", intra_threads=THREADS)

    def generate(self, prompts: Prompts, tokens: int) -> Times:
        """See `Peer.generate`."""
        times: Times = [[] for _ in prompts]
        started = time.perf_counter()

        def note(step: Any) -> bool:
            times[step.batch_id].append(time.perf_counter() - started)
            return False

        self._generator.generate_batch(
            [self._tokenizer.convert_ids_to_tokens(list(prompt)) for prompt in prompts],
            max_length=tokens,
            min_length=tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=note,
        )
        return times

    def logits(self, ids: Sequence[int]) -> Floats:
        """See `Peer.logits`."""
        tokens = self._tokenizer.convert_ids_to_tokens(list(ids))
        found: Floats = np.array(self._generator.forward_batch([tokens], return_log_probs=True))[0]
        return found
