"""`make bench`: compares Trident's server with its peers, in one run on one machine.

All get the same prompts and texts. Figures are medians over interleaved rounds, so that a slow minute of the machine
affects all of them. Writes reports/bench.json, reports/bench.md and a plot, reports/bench.svg.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path

from benchmarks import generation, processor, tasks
from benchmarks.peers.environments import PeerError, selected
from benchmarks.peers.process import started
from benchmarks.tasks import Peers
from trident_client import Client
from trident_export import models_file
from trident_export.huggingface import sources
from trident_serving.launcher import local

Rates = dict[str, dict[str, float]]  # of each peer


def main() -> int:
    """Measure and write the reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--models-file", type=Path, default=Path("models.toml"))
    parser.add_argument("--reports", type=Path, default=Path("reports"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("generation", "tasks"), help="measure only this")
    parser.add_argument("--peers", nargs="*", default=[], metavar="NAME", help="of environments.toml (default: all)")
    options = parser.parse_args()
    try:
        environments = selected(options.peers)
    except PeerError as error:
        parser.error(str(error))
    options.reports.mkdir(exist_ok=True)
    cache = options.models_file.resolve().parent / ".cache"
    minilm, smollm2 = (_folder(options.models_file, name) for name in ("minilm", "smollm2"))
    texts: dict[str, Rates] = {}
    cosines: dict[str, float] = {}
    failed: dict[str, str] = {}
    tokens: generation.Figures = {}
    with (
        local.running(options.repository, options.reports / "bench-server.log") as server,
        Client(server.grpc_url, timeout=600) as client,
    ):
        if options.only != "generation":
            with contextlib.ExitStack() as stack:
                others = stack.enter_context(tasks.served(cache, minilm, smollm2))
                embedders = []
                for process in started(environments, "embedders", lambda _: minilm, cache, options.reports, failed):
                    stack.callback(process.close)
                    embedders.append(process)
                cosines = tasks.cosines(client, minilm, embedders, failed)
                peers = tasks.embeddings(client, minilm, [each for each in embedders if each.name not in failed])
                peers |= tasks.classification(others, cache) | tasks.translation(others, cache)
                texts = measure(peers, options.rounds, failed)
        if options.only != "tasks":
            tokens = generation.measure(
                client, options.models_file, options.repository, options.reports, options.rounds, environments
            )
    figures = {"tasks": texts, "cosines": cosines, "failed": failed, "generation": tokens}
    table = as_table(texts, cosines, failed) if texts else ""
    if tokens:
        table = generation.as_table(tokens) + "\n" + table
        generation.plot(tokens, options.reports / "bench.svg")
    (options.reports / "bench.json").write_text(json.dumps(figures, indent=2) + "\n")
    (options.reports / "bench.md").write_text(table)
    print(table)
    return 0


def measure(peers: Peers, rounds: int, failed: dict[str, str]) -> dict[str, Rates]:
    """Median, lowest and highest rate of each peer, by group; after one round to warm up.

    Args:
        failed: reasons by peer, which this adds to; who fails is left out.
    """
    rates: dict[str, list[float]] = {name: [] for name in peers}
    for number in range(rounds + 1):
        print(f"bench: round {number} of {rounds}", file=sys.stderr)
        for name, work in peers.items():
            peer = name.split(" | ")[1]
            if any(peer.startswith(each) for each in failed):
                continue
            started_at = time.perf_counter()
            try:
                units = work()
            except PeerError as error:
                failed[peer] = str(error)
                continue
            if number:
                rates[name].append(units / (time.perf_counter() - started_at))
    figures: dict[str, Rates] = {}
    for name, values in rates.items():
        group, peer = name.split(" | ")
        if values:
            median = statistics.median(values)
            figures.setdefault(group, {})[peer] = {"median": median, "lowest": min(values), "highest": max(values)}
    return figures


def as_table(figures: dict[str, Rates], cosines: dict[str, float], failed: dict[str, str]) -> str:
    """The figures as a Markdown table; ratios are to the fastest way of transformers in the same group.

    Args:
        cosines: the worst of each embedder against Hugging Face in float32, by the beginning of a peer's name.
    """
    lines = [
        f"{processor.sentence()}. Cosines are the worst of 64 texts against Hugging Face in float32.",
        "",
        "| | peer | median | range | ratio | cosine |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for group, peers in figures.items():
        base = max(rate["median"] for peer, rate in peers.items() if peer.startswith("transformers"))
        for peer, rate in peers.items():
            known = [value for name, value in cosines.items() if peer.startswith(name)]
            cosine = f"{known[0]:.5f}" if known and group.startswith("embeddings") else ""
            lines.append(
                f"| {group} | {peer} | {rate['median']:.1f} | {rate['lowest']:.0f} to {rate['highest']:.0f} "
                f"| {rate['median'] / base:.2f} | {cosine} |"
            )
    lines += [f"| | {name} | failed: {why} | | | |" for name, why in failed.items()]
    return "\n".join(lines) + "\n"


def _folder(path: Path, name: str) -> Path:
    spec = models_file.select(models_file.load(path), name)[0]
    base = path.resolve().parent
    return sources.fetch(spec, base, base / ".cache", lambda message: print(message, file=sys.stderr)).path


if __name__ == "__main__":
    sys.exit(main())
