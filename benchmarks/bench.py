"""`make bench`: Trident's server beside its peers, in one run on one machine.

The same prompts and texts for all, medians over interleaved rounds, so that a slow minute of the machine hits
everyone. Writes reports/bench.json, reports/bench.md and a plot, reports/bench.svg.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from benchmarks import generation
from trident_client import Client
from trident_export import fidelity, models_file, sources
from trident_serving.launcher import local

TEXTS = fidelity.texts()[:16]


def main() -> int:
    """Measure and write the reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--models-file", type=Path, default=Path("models.toml"))
    parser.add_argument("--reports", type=Path, default=Path("reports"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("generation", "embeddings"), help="one part")
    options = parser.parse_args()
    options.reports.mkdir(exist_ok=True)
    folder = _folder(options.models_file, "minilm")
    with (
        local.running(options.repository, options.reports / "bench-server.log") as server,
        Client(server.grpc_url, timeout=600) as client,
    ):
        texts = {} if options.only == "generation" else measure(embeddings(client, folder), options.rounds)
        tokens = {}
        if options.only != "embeddings":
            tokens = generation.measure(
                client,
                options.models_file,
                options.repository,
                options.models_file.resolve().parent / ".cache",
                options.rounds,
            )
    figures = {"embeddings": texts, "generation": tokens}
    table = as_table(texts) if texts else ""
    if tokens:
        table = generation.as_table(tokens) + "\n" + table
        generation.plot(tokens, options.reports / "bench.svg")
    (options.reports / "bench.json").write_text(json.dumps(figures, indent=2) + "\n")
    (options.reports / "bench.md").write_text(table)
    print(table)
    return 0


# What is measured: a name "group | peer", and a function that returns units of work done in one round.
Peers = dict[str, Callable[[], int]]


def embeddings(client: Client, folder: Path) -> Peers:
    """Texts embedded one by one and sixteen at once."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def hugging_face(batches: list[list[str]]) -> int:
        with torch.inference_mode():
            for texts in batches:
                batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
                mask = batch["attention_mask"][:, :, None]
                (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        return sum(map(len, batches))

    def trident(name: str, callers: int) -> int:
        with ThreadPoolExecutor(callers) as pool:
            return len(list(pool.map(lambda text: client.embed(text, model=name, truncate=True), TEXTS * 2)))

    peers: Peers = {}
    one, many = "embeddings, 1 caller, texts/s", "embeddings, 16 callers, texts/s"
    peers[f"{one} | transformers fp32"] = lambda: hugging_face([[text] for text in TEXTS])
    peers[f"{many} | transformers fp32"] = lambda: hugging_face([TEXTS, TEXTS])
    for group, callers in ((one, 1), (many, 16)):
        peers[f"{group} | Trident fp32"] = lambda callers=callers: trident("minilm", callers)
        peers[f"{group} | Trident int8"] = lambda callers=callers: trident("minilm_int8", callers)
    return peers


def measure(peers: Peers, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Median, lowest and highest rate of each peer, by group; after one round to warm up."""
    rates: dict[str, list[float]] = {name: [] for name in peers}
    for number in range(rounds + 1):
        print(f"bench: round {number} of {rounds}", file=sys.stderr)
        for name, work in peers.items():
            started = time.perf_counter()
            units = work()
            if number:
                rates[name].append(units / (time.perf_counter() - started))
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for name, values in rates.items():
        group, peer = name.split(" | ")
        median = statistics.median(values)
        figures.setdefault(group, {})[peer] = {"median": median, "lowest": min(values), "highest": max(values)}
    return figures


def as_table(figures: dict[str, dict[str, dict[str, float]]]) -> str:
    """The figures as a Markdown table; ratios are to transformers in the same group."""
    lines = ["| | peer | median | range | ratio |", "|---|---|---:|---:|---:|"]
    for group, peers in figures.items():
        base = peers["transformers fp32"]["median"]
        for peer, rate in peers.items():
            lines.append(
                f"| {group} | {peer} | {rate['median']:.1f} | {rate['lowest']:.0f} to {rate['highest']:.0f} "
                f"| {rate['median'] / base:.2f} |"
            )
    return "\n".join(lines) + "\n"


def _folder(path: Path, name: str) -> Path:
    spec = models_file.select(models_file.load(path), name)[0]
    base = path.resolve().parent
    return sources.fetch(spec, base, base / ".cache", lambda message: print(message, file=sys.stderr))


if __name__ == "__main__":
    sys.exit(main())
