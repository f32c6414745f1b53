"""What beams and the encoder cost: python -m benchmarks.beams [--work .cache/benchmark-beams] [--rounds 7].

A T5 of random weights, tiny and of t5-small's shape, is exported once (`--work` keeps the graphs) and runs in this
process. Greedy and beam search take turns with as many rows: 16 texts, or 4 texts with 4 beams, of 48 tokens, and 48
tokens of an answer. Then 32 texts of one length and of many are encoded, for an answer of one token. Figures are
medians over rounds; CPU is user and system time of this process.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import T5Config, T5ForConditionalGeneration

from trident_export import recipes
from trident_export.graphs import editing
from trident_export.graphs.seq2seq import export_decoder, export_encoder
from trident_export.recipes import Kind
from trident_serving.seq2seq.decoder import Seq2SeqDecoder
from trident_serving.seq2seq.engine import Engine, Job
from trident_serving.seq2seq.rules import Rules
from trident_serving.seq2seq.search import Found, SearchParams

ROWS, BEAMS, TOKENS, TEXTS = 16, 4, 48, 32
SHAPES = {
    "tiny": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 512},
    "small": {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "vocab_size": 32128},
}


def export(folder: Path, shape: str, variant: str) -> Path:
    """The folder of both graphs; they are made where they are not there."""
    target = folder / f"{shape}-{variant}"
    if not (target / "decoder.onnx").exists():
        print(f"beams: exporting {target.name}", file=sys.stderr, flush=True)
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(T5Config(**SHAPES[shape], decoder_start_token_id=0)).eval()
        export_encoder(model, folder / shape / "encoder.onnx")
        export_decoder(model, folder / shape / "decoder.onnx", TOKENS + 8)
        recipe = recipes.load()[variant] if variant != "fp32" else None
        for name in ("encoder.onnx", "decoder.onnx"):
            if recipe is None:
                editing.link(folder / shape / name, target / name)
            else:
                recipes.apply(recipe, Kind.SEQ2SEQ, folder / shape / name, target / name)
    return target


class _Waiting:
    """A consumer that only waits."""

    cancelled = False

    def __init__(self) -> None:
        self.done = threading.Event()

    def finish(self, found: Found | None) -> None:
        """See `Consumer.finish`."""
        self.done.set()

    def fail(self, error: Exception) -> None:
        """See `Consumer.fail`."""
        raise error


def run(engine: Engine, texts: Sequence[Sequence[int]], beams: int, tokens: int) -> tuple[float, float]:
    """Answer all texts with so many tokens each; wall and processor milliseconds."""
    rules = Rules(max_length=1 + tokens, min_new_tokens=tokens, eos_token_ids=(1,))
    waiting = [_Waiting() for _ in texts]
    params = SearchParams(rules, num_beams=beams)
    jobs = [Job(ids, (0,), params, consumer) for ids, consumer in zip(texts, waiting, strict=True)]
    started, used = time.perf_counter(), time.process_time()
    engine.submit(jobs)
    for consumer in waiting:
        consumer.done.wait()
    return 1e3 * (time.perf_counter() - started), 1e3 * (time.process_time() - used)


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".cache/benchmark-beams"), help="where graphs are kept")
    parser.add_argument("--shapes", default="tiny,small")
    parser.add_argument("--variants", default="fp32,int8")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    for shape in options.shapes.split(","):
        for variant in options.variants.split(","):
            folder = export(options.work, shape, variant)
            engine = Engine(Seq2SeqDecoder(folder, slots=TEXTS, capacity=TOKENS + 8, threads=2), TEXTS)
            random = np.random.default_rng(1)
            size = SHAPES[shape]["vocab_size"]

            def texts(
                lengths: Sequence[int], random: np.random.Generator = random, size: int = size
            ) -> list[list[int]]:
                return [random.integers(2, size, length).tolist() for length in lengths]

            kinds = {
                "greedy": (texts([TOKENS] * ROWS), 1, TOKENS),
                "beams": (texts([TOKENS] * (ROWS // BEAMS)), BEAMS, TOKENS),
                "one length": (texts([24] * TEXTS), 1, 1),
                "many lengths": (texts([16 + row % 16 for row in range(TEXTS)]), 1, 1),
            }
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
            for number in range(options.rounds + 1):  # the first one warms up
                for name, work in kinds.items():
                    measured = run(engine, *work)
                    if number:
                        found[name].append(measured)
            engine.stop()
            pairs = zip(found["beams"], found["greedy"], strict=True)
            ratios = [(one[0] / other[0], one[1] / other[1]) for one, other in pairs]
            wall, cpu = (statistics.median(ratio[side] for ratio in ratios) for side in (0, 1))
            print(f"{shape} {variant}: beams to greedy at {ROWS} rows {wall:.2f} (CPU {cpu:.2f})")
            for name, values in found.items():
                wall, cpu = (statistics.median(value[side] for value in values) for side in (0, 1))
                print(f"  {name:14}{wall:9.1f} ms, CPU {cpu:.1f} ms")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
