"""What serving costs: python -m benchmarks.served [--model smollm2] [--streams 1,4,8,16,32] [--rounds 5].

The engine in this process and the server with the same model run in turns, with the same texts. First the time to the
first token of a lone request of 60 tokens: as a caller sees it, and by the server's own metrics from the request's
arrival in the engine to its token; what is left is the way there and back. Then the tokens a second of several streams,
and the processor seconds of each side. Figures are medians over rounds; shares are medians of the rounds' shares.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from benchmarks import processes
from benchmarks.first_token import PAUSE, PROMPT_TOKENS, first_tokens, prompts
from benchmarks.generation import TOKENS, summarize
from benchmarks.peers.trident import TridentEngine, TridentServer
from trident_client import Client
from trident_serving.launcher import local
from trident_serving.launcher.local import LocalServer
from trident_serving.runtime.tokenizer import TextTokenizer

STREAMS = (1, 4, 8, 16, 32)


def in_the_engine(server: LocalServer, model: str) -> tuple[float, float]:
    """By the server's metrics: seconds from requests' arrival in the engine to their first token, and how many."""
    time.sleep(0.6)  # they are published four times a second
    with urllib.request.urlopen(server.metrics_url, timeout=10) as response:
        text = response.read().decode()
    name = "trident_time_to_first_token_seconds"
    values = [
        re.search(rf'^{name}_{kind}{{[^}}]*model="{model}"[^}}]*}} (\S+)$', text, re.M) for kind in ("sum", "count")
    ]
    seconds, requests = (float(value[1]) if value is not None else 0.0 for value in values)
    return seconds, requests


def processor_seconds(root: int) -> float:
    """User and system time of a process and all that it has started, as far as they still run."""
    ticks = (fields[11:13] for fields in map(processes.stat, processes.descendants(root)))
    return sum(sum(map(int, used)) for used in ticks) / os.sysconf("SC_CLK_TCK")


def shares(
    server: LocalServer,
    peers: Sequence[TridentServer | TridentEngine],
    known: list[list[int]],
    streams: Sequence[int],
    rounds: int,
) -> dict[int, list[dict[str, float]]]:
    """Of each round and number of streams: tokens a second of both sides, and the processor seconds of each token."""
    found: dict[int, list[dict[str, float]]] = {number: [] for number in streams}
    for turn in range(rounds + 1):  # the first one warms up
        print(f"served: round {turn} of {rounds}", file=sys.stderr, flush=True)
        for number in streams:
            row: dict[str, float] = {}
            for peer in peers if turn % 2 else peers[::-1]:
                side = "served" if isinstance(peer, TridentServer) else "in process"
                time.sleep(PAUSE)
                before = processor_seconds(server.launcher.pid) + time.process_time()
                row[side] = summarize(peer.generate(known[:number], TOKENS)).decode
                spent = processor_seconds(server.launcher.pid) + time.process_time() - before
                row[f"{side}, cpu"] = 1e3 * spent / (number * TOKENS)
            if turn:
                found[number].append(row)
    return found


def main() -> int:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--streams", default=",".join(map(str, STREAMS)), help='"": none')
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--log", type=Path, default=Path("reports/served-server.log"))
    parser.add_argument("--json", type=Path, help="write every figure there, too")
    options = parser.parse_args()
    options.log.parent.mkdir(exist_ok=True)
    folder = options.repository / options.model / "1"
    tokenizer = TextTokenizer.load(folder)
    made = prompts(tokenizer)
    streams = [int(number) for number in options.streams.split(",") if number]
    with (
        local.running(options.repository, options.log) as server,
        Client(server.grpc_url, timeout=600) as client,
    ):
        engine = TridentEngine(folder, options.model)
        some = [next(made) for _ in range(max([1, *streams]))]
        known = {tuple(ids): text for text, ids in some}
        serving = TridentServer(client, options.model, options.model, known, engine)
        first_tokens(client, options.model, engine, made, 1)
        before = in_the_engine(server, options.model)
        waits = first_tokens(client, options.model, engine, made, options.rounds)
        after = in_the_engine(server, options.model)
        inside = 1e3 * (after[0] - before[0]) / max(after[1] - before[1], 1)
        print(f"first token of a lone request of {PROMPT_TOKENS} tokens, ms (median, p10, p90)")
        for name, values in waits.items():
            tenths = statistics.quantiles(values, n=10)
            print(f"  {name:12}{statistics.median(values):8.1f}{tenths[0]:8.1f}{tenths[-1]:8.1f}")
        apart = [one - other for one, other in zip(waits["served"], waits["in process"], strict=True)]
        print(f"  median of the differences {statistics.median(apart):.1f}")
        print(f"  means: served {statistics.mean(waits['served']):.1f}, of which in the engine {inside:.1f}")
        found = shares(server, (serving, engine), [ids for _, ids in some], streams, options.rounds) if streams else {}
    for number, rows in found.items():
        median = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        share = statistics.median(row["served"] / row["in process"] for row in rows)
        print(
            f"{number:3} streams: served {median['served']:.0f} tokens/s, in process {median['in process']:.0f}, "
            f"share {share:.3f}; processor ms a token {median['served, cpu']:.2f} and {median['in process, cpu']:.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps({"first token": waits, "streams": found}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
