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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trident_export import configs
from trident_export.models_file import ModelSpec
from trident_serving.artefacts import VERSION, WEIGHTS

if TYPE_CHECKING:
    from trident_serving.seq2seq.decoder import Seq2SeqDecoder, Source

MEBIBYTE = 2**20
ROUNDS = 5
# Rows that decode at once, texts in a batch, tokens of each.
BATCH = 8
TOKENS = 64

ROWS_SPEED = f"tokens_s_{BATCH}_rows"
TEXTS_SPEED = f"texts_s_{TOKENS}_tokens"
IMAGES_SPEED = "images_s"
SPEEDS = {
    ROWS_SPEED: f"tokens/s, {BATCH} rows",
    TEXTS_SPEED: f"texts/s, {TOKENS} tokens each",
    IMAGES_SPEED: f"images/s, {BATCH} at once",
}

Measures = dict[str, dict[str, float]]
# The name of a speed, the units of one piece of work, and the work.
Probe = tuple[str, int, Callable[[], object]]


def cost(spec: ModelSpec, variant: str, repository: Path) -> dict[str, float]:
    """Size in MiB, resident memory in MiB, and speed: tokens/s of `BATCH` decoding rows, or texts/s in batches.

    Of a model that vLLM computes, the size only.
    """
    if spec.template:
        return {}
    folders = [repository / name / VERSION for name in graph_folders(spec, variant)]
    folder = folders[0]
    if spec.vllm_limits:  # vLLM's own process runs it, with a start of its own
        weights = (file for file in (folder / WEIGHTS).rglob("*") if file.suffix in (".safetensors", ".bin"))
        return {"size_mib": sum(file.stat().st_size for file in weights) / MEBIBYTE}
    size = sum(file.stat().st_size for each in folders for file in each.glob("*.onnx*")) / MEBIBYTE
    command = [
        sys.executable,
        "-m",
        "trident_export.measure.quality",
        str(folder),
        _kind(spec),
        str(getattr(spec.limits, "threads", 0)),
    ]
    if spec.images:
        command += [str(spec.images.height), str(spec.images.width)]
    if spec.seq2seq:
        command.append(str(spec.seq2seq.max_target_tokens))
    if spec.speech:
        command.append(str(spec.speech.max_target_tokens))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{folder} could not be run, status {done.returncode}: {done.stderr.strip()}")
    measured: dict[str, float] = json.loads(done.stdout)
    return {"size_mib": size, **measured}


def graph_folders(spec: ModelSpec, variant: str) -> list[str]:
    """The Triton models that hold a variant's graphs; the one that is timed first."""
    return configs.model_parts(spec, variant) if spec.encoder or spec.images else [spec.public_name(variant)]


def as_table(report: Mapping[str, Measures]) -> str:
    """A Markdown table for each model, a row for each variant."""
    tables = []
    for model, variants in report.items():
        names = list(dict.fromkeys(name for measures in variants.values() for name in measures))
        lines = [f"## {model}", "", "| variant | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
        for variant, measures in variants.items():
            shown = [f"{measures[name]:.4g}" if name in measures else "" for name in names]
            lines.append(f"| {variant} | " + " | ".join(shown) + " |")
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


# What a plot shows of a variant: the first that it was measured by, and whether 0 or 1 is best.
_PLOTTED = {"kl": 0, "worst_cosine": 1, "score_error": 0}


def write(report: Mapping[str, Measures], folder: Path) -> str:
    """Write quality.json, quality.md and quality.svg into a folder; returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    table = as_table(report)
    (folder / "quality.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "quality.md").write_text(table, encoding="utf-8")
    _plot(report, folder / "quality.svg")
    return table


def _plot(report: Mapping[str, Measures], path: Path) -> None:
    """Error against speed, a panel for each model."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, max(1, len(report)), figsize=(5 * max(1, len(report)), 4), squeeze=False)
    for panel, (model, variants) in zip(panels[0], report.items(), strict=False):
        for variant, measures in variants.items():
            speed = next((value for name, value in measures.items() if name in SPEEDS), None)
            error = next((abs(best - measures[name]) for name, best in _PLOTTED.items() if name in measures), None)
            if speed is None or error is None:
                continue
            panel.plot(speed, max(error, 1e-7), "o")
            panel.annotate(variant, (speed, max(error, 1e-7)), textcoords="offset points", xytext=(6, 4))
        measured = next(iter(variants.values()), {})
        error_name = next((name for name in _PLOTTED if name in measured), "error")
        panel.set_yscale("log")
        panel.set_title(model)
        panel.set_xlabel(next((SPEEDS[name] for name in measured if name in SPEEDS), "speed"))
        panel.set_ylabel("1 - worst_cosine" if error_name == "worst_cosine" else error_name)
        panel.margins(0.25)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _kind(spec: ModelSpec) -> str:
    if spec.generation:
        return "generation"
    if spec.speech:
        return "speech"
    if spec.images:
        return "images"
    return "seq2seq" if spec.seq2seq else "encoder"


def _run(folder: Path, kind: str, *numbers: int) -> dict[str, float]:
    """In the process of one variant."""
    probes: dict[str, Callable[..., Probe]] = {
        "generation": _generation,
        "seq2seq": _seq2seq,
        "speech": _speech,
        "encoder": _encoder,
        "images": _images,
    }
    name, units, work = probes[kind](folder, *numbers)
    return {name: _rate(work, units), "resident_mib": _resident_mib()}


def _resident_mib() -> float:
    """What this process holds now, with the model that it has run."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS:"))) / 1024


def _rate(work: Callable[[], object], units: int) -> float:
    """Units a second, the median of some rounds after one to warm up."""
    rates = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        work()
        rates.append(units / (time.perf_counter() - started))
    return statistics.median(rates[1:])


def _generation(folder: Path, threads: int) -> Probe:
    from trident_serving.generation.batch import SlotTokens
    from trident_serving.generation.decoder import OnnxDecoder

    decoder = OnnxDecoder(folder / "model.onnx", slots=BATCH, context=2 * TOKENS, longest_run=TOKENS, threads=threads)
    ids = np.random.default_rng(0).integers(0, decoder.vocabulary_size, (BATCH, TOKENS)).tolist()
    for row in range(BATCH):
        decoder.run([SlotTokens(row, 0, ids[row])])

    def step() -> None:
        for place in range(8):
            decoder.run([SlotTokens(row, TOKENS + place, [ids[row][place]]) for row in range(BATCH)])

    return ROWS_SPEED, 8 * BATCH, step


def _seq2seq(folder: Path, threads: int, target_tokens: int) -> Probe:
    from trident_serving.seq2seq.decoder import Seq2SeqDecoder
    from trident_serving.seq2seq.request import GenerationDefaults, positions

    # The number of positions that the decoder was exported for.
    capacity = positions(target_tokens, GenerationDefaults.load(folder).prompt)
    decoder = Seq2SeqDecoder(folder, slots=BATCH, capacity=capacity, threads=threads)
    ids = np.random.default_rng(0).integers(0, decoder.vocabulary_size, (BATCH, TOKENS)).tolist()
    return _rows_of(decoder, ids)


def _speech(folder: Path, threads: int, target_tokens: int) -> Probe:
    from trident_serving.seq2seq.decoder import Seq2SeqDecoder
    from trident_serving.speech.features import LogMel

    decoder = Seq2SeqDecoder(folder, slots=BATCH, capacity=target_tokens, threads=threads)
    return _rows_of(decoder, [LogMel.load(folder)(np.zeros(1, np.float32))] * BATCH)


def _rows_of(decoder: Seq2SeqDecoder, sources: Sequence[Source]) -> Probe:
    """Steps of an encoder-decoder with `BATCH` sources."""
    from trident_serving.seq2seq.decoder import Row

    ids = np.random.default_rng(1).integers(0, decoder.vocabulary_size, (BATCH, 8)).tolist()
    for text, source in enumerate(sources):
        decoder.encode(text, source)

    def step() -> None:
        for place in range(8):
            decoder.run([Row(text, ids[text][place], place) for text in range(BATCH)])

    return ROWS_SPEED, 8 * BATCH, step


def _session(folder: Path, threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def _images(folder: Path, threads: int, height: int, width: int) -> Probe:
    session = _session(folder, threads)
    pixels = np.random.default_rng(0).standard_normal((BATCH, 3, height, width)).astype(np.float32)
    return IMAGES_SPEED, BATCH, lambda: session.run(None, {"pixel_values": pixels})


def _encoder(folder: Path, threads: int) -> Probe:
    session = _session(folder, threads)
    names = [node.name for node in session.get_inputs()]
    shape = (BATCH, TOKENS)
    tensors = {"input_ids": np.full(shape, 5, np.int64), "attention_mask": np.ones(shape, np.int64)}
    tensors["token_type_ids"] = np.zeros(shape, np.int64)
    feeds = {name: tensors[name] for name in names}
    return TEXTS_SPEED, BATCH, lambda: session.run(None, feeds)


if __name__ == "__main__":
    print(json.dumps(_run(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))))
