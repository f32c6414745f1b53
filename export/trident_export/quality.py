"""What each installed variant gets wrong and what it costs, in one table: `trident-export evaluate`, `make quality`.

The measures of the gate (see `fidelity`), the size of a variant's graphs, and, from a process of its own that runs them
as they are served, its resident memory and its speed.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from trident_export import configs
from trident_export.limits import EncoderLimits, GenerationLimits, Seq2SeqLimits, TemplateLimits
from trident_export.models_file import ModelSpec
from trident_serving.artefacts import VERSION

MEBIBYTE = 2**20
ROUNDS = 5
# Rows that decode at once, texts in a batch, tokens of each.
BATCH = 8
TOKENS = 64

Measures = dict[str, dict[str, float]]


def cost(spec: ModelSpec, variant: str, repository: Path) -> dict[str, float]:
    """Size in MiB, resident memory in MiB, and speed: tokens/s of `BATCH` decoding rows, or texts/s in batches."""
    if isinstance(spec.limits, TemplateLimits):
        return {}
    folder = repository / graph_folder(spec, variant) / VERSION
    size = sum(file.stat().st_size for file in folder.glob("*.onnx*")) / MEBIBYTE
    command = [sys.executable, "-m", "trident_export.quality", str(folder), _kind(spec), str(spec.limits.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{folder} could not be run: {done.stderr.strip().splitlines()[-1]}")
    measured: dict[str, float] = json.loads(done.stdout)
    return {"size_mib": size, **measured}


def graph_folder(spec: ModelSpec, variant: str) -> str:
    """The Triton model that holds a variant's graph."""
    return configs.model_part(spec, variant) if isinstance(spec.limits, EncoderLimits) else spec.public_name(variant)


def as_table(report: Mapping[str, Measures]) -> str:
    """A Markdown table for each model, a row for each variant."""
    blocks = []
    for model, variants in report.items():
        names = list(dict.fromkeys(name for measures in variants.values() for name in measures))
        lines = [f"## {model}", "", "| variant | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
        for variant, measures in variants.items():
            shown = [f"{measures[name]:.4g}" if name in measures else "" for name in names]
            lines.append(f"| {variant} | " + " | ".join(shown) + " |")
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def _kind(spec: ModelSpec) -> str:
    if isinstance(spec.limits, GenerationLimits):
        return "generation"
    return "seq2seq" if isinstance(spec.limits, Seq2SeqLimits) else "encoder"


def _run(folder: Path, kind: str, threads: int) -> dict[str, float]:
    """In the process of one variant."""
    probes: dict[str, Callable[[Path, int], dict[str, float]]] = {
        "generation": _generation,
        "seq2seq": _seq2seq,
        "encoder": _encoder,
    }
    speed = probes[kind](folder, threads)
    return {**speed, "resident_mib": _peak_mib()}


def _peak_mib() -> float:
    """The most that this process held; getrusage would give what its parent held, if that was more."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) / 1024


def _rate(work: Callable[[], None], units: int) -> float:
    """Units a second, the median of some rounds after one to warm up."""
    rates = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        work()
        rates.append(units / (time.perf_counter() - started))
    return statistics.median(rates[1:])


def _generation(folder: Path, threads: int) -> dict[str, float]:
    from trident_serving.generation.batch import RowTokens
    from trident_serving.generation.decoder import OnnxDecoder

    decoder = OnnxDecoder(folder / "model.onnx", rows=BATCH, context=2 * TOKENS, longest_run=TOKENS, threads=threads)
    ids = np.random.default_rng(0).integers(0, decoder.vocabulary_size, (BATCH, TOKENS)).tolist()
    for row in range(BATCH):
        decoder.run([RowTokens(row, 0, ids[row])])

    def step() -> None:
        for place in range(8):
            decoder.run([RowTokens(row, TOKENS + place, [ids[row][place]]) for row in range(BATCH)])

    return {f"tokens_s_{BATCH}_rows": _rate(step, 8 * BATCH)}


def _seq2seq(folder: Path, threads: int) -> dict[str, float]:
    from trident_serving.seq2seq.decoder import Row, Seq2SeqDecoder

    decoder = Seq2SeqDecoder(folder, rows=BATCH, capacity=16, threads=threads)
    ids = np.random.default_rng(0).integers(0, decoder.vocabulary_size, (BATCH, TOKENS)).tolist()
    for text in range(BATCH):
        decoder.encode(text, ids[text])

    def step() -> None:
        for place in range(8):
            decoder.run([Row(text, ids[text][place], place) for text in range(BATCH)])

    return {f"tokens_s_{BATCH}_rows": _rate(step, 8 * BATCH)}


def _encoder(folder: Path, threads: int) -> dict[str, float]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    shape = (BATCH, TOKENS)
    tensors = {"input_ids": np.full(shape, 5, np.int64), "attention_mask": np.ones(shape, np.int64)}
    tensors["token_type_ids"] = np.zeros(shape, np.int64)
    feeds = {name: tensors[name] for name in names}
    return {f"texts_s_{TOKENS}_tokens": _rate(lambda: session.run(None, feeds), BATCH)}


if __name__ == "__main__":
    print(json.dumps(_run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
