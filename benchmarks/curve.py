"""What one replica does, for `trident-plan`: python -m benchmarks.curve [--model smollm2] -> reports/curve.json.

It starts a server with all models of the repository, and callers on the same machine: a server whose callers are
elsewhere does a little more. Steps are medians over rounds of the time from one token of a stream to the next; a
prompt's are the time to its first token, less a step, over its tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

from benchmarks import generation, processes, processor
from benchmarks.peers.trident import TridentServer
from trident_client import Client
from trident_export import corpora, models_file
from trident_serving.launcher import local
from trident_serving.planning.curve import Curve
from trident_serving.runtime.tokenizer import TextTokenizer
from trident_serving.schema.limits import GenerationLimits

STREAMS = (1, 2, 4, 8, 16, 32)


def memory_of(root: int) -> int:
    """Bytes that a process and all that it has started take, what they share counted once."""
    total = 0
    for process in processes.descendants(root):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def main() -> int:
    """Measure, and write the curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--models-file", type=Path, default=Path("models.toml"))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reports", type=Path, default=Path("reports"))
    options = parser.parse_args()
    options.reports.mkdir(exist_ok=True)
    spec = models_file.as_installed(
        models_file.select(models_file.load(options.models_file), options.model)[0], options.repository
    )
    limits = spec.limits
    if not isinstance(limits, GenerationLimits):
        parser.error(f"{options.model} does not generate text")
    folder = options.repository / options.model / "1"
    tokenizer = TextTokenizer.load(folder)
    streams = [number for number in STREAMS if number <= limits.slots]
    texts = [text[:240] for text in corpora.held_out() if len(text) > 200]
    texts = [f"{index} {text}" for index, text in zip(range(max(streams)), texts * 8, strict=False)]
    known = {tuple(tokenizer.encode(text)): text for text in texts}
    long = (tokenizer.encode("\n".join(corpora.held_out())) * 2)[: min(512, limits.context - generation.TOKENS - 8)]
    known[tuple(long)] = tokenizer.decode(long)
    began = time.monotonic()
    with (
        local.running(options.repository, options.reports / "curve-server.log") as server,
        Client(server.grpc_url, timeout=600) as client,
    ):
        started = time.monotonic() - began
        peer = TridentServer(client, options.model, options.model, known)
        prompts = list(known)[:-1]
        steps: dict[int, list[float]] = {number: [] for number in streams}
        prefill: list[float] = []
        for turn in range(options.rounds + 1):  # the first one warms up
            print(f"curve: round {turn} of {options.rounds}", file=sys.stderr, flush=True)
            for number in streams:
                rate = generation.summarize(peer.generate(prompts[:number], generation.TOKENS)).decode
                if turn:
                    steps[number].append(number / rate)
            first = peer.generate([long], 2)[0][0]
            if turn:
                prefill.append((first - steps[1][-1]) / len(long))
        memory = memory_of(server.launcher.pid)
    curve = Curve(
        options.model,
        processor.sentence(),
        limits.slots,
        tuple((number, statistics.median(found)) for number, found in steps.items()),
        statistics.median(prefill),
        limits.prefill_chunk,
        memory,
        sum(file.stat().st_size for file in folder.glob("model.onnx*")),
        started,
    )
    curve.write(options.reports / "curve.json")
    for number, seconds in curve.steps:
        print(f"{number:3} answers: {seconds * 1e3:.1f} ms a token")
    print(f"prompts: {1 / curve.prefill_seconds:.0f} tokens a second")
    print(f"memory {memory / 2**30:.1f} GiB, ready after {started:.0f} s -> {options.reports / 'curve.json'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
