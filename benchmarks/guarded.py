"""What a guard costs: python -m benchmarks.guarded [--rounds 15] [--tokens 400] [--work .cache/guarded].

A tiny decoder of random weights, whose steps take less than a millisecond, is served three times by one server: without
a guard, behind the patterns of models.toml, and behind these and a tiny classifier, which is asked about each window of
the request and of the answer. Lone streams, then four at once, go to the three in turns: the time to the first text,
and tokens a second. Figures are medians over rounds; shares are medians of the rounds' shares of the bare decoder.
Against a model of real size, the guard's part is smaller: what it takes for a token does not grow with the model.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tests import gateways
from trident_client import Client
from trident_export import models_file
from trident_serving.guard.rules import Rule
from trident_serving.launcher import local

ROOT = Path(__file__).parents[1]
BARE, PATTERNS, BOTH = "talk", "patterned", "classified"
STREAMS = (1, 4)
# Its answers are never blocked, but held back until the classifier has said so.
CLASSIFIER = Rule("tiny", classifier="classify", labels=("none of them",), classes=3, batch=8, window=100)
PROMPT = "Tell me about the weather in the north. What will it be like tomorrow?"
Row = dict[str, float]


def prepared(work: Path) -> Path:
    """The repository with the three models, which is made once for the guards that there are."""
    repository = work / "repository"
    guard = models_file.load_guard(ROOT / "models.toml", "patterns")
    both = replace(guard, rules=(*guard.rules, CLASSIFIER))
    if (work / "made").exists() and (work / "made").read_text() == both.as_json():
        return repository
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    print("guarded: making the models, once", file=sys.stderr, flush=True)
    with warnings.catch_warnings(action="ignore"):  # peft's
        gateways.make_models(work)
        gateways.export_models(work)
    gateways.install_guarded(repository, PATTERNS, BARE, guard)
    gateways.install_guarded(repository, BOTH, BARE, both)
    (work / "made").write_text(both.as_json())
    return repository


def one(client: Client, model: str, text: str, tokens: int) -> tuple[float, float]:
    """Seconds to the first text of an answer, and to its end."""
    began, first = time.perf_counter(), 0.0
    for chunk in client.stream(text, model=model, max_tokens=tokens, min_tokens=tokens, prompt_lookup=False):
        first = first or (time.perf_counter() - began if chunk.text else 0.0)
        assert chunk.finish_reason in ("", "length"), chunk
    return first, time.perf_counter() - began


def measured(client: Client, streams: int, rounds: int, tokens: int) -> Mapping[str, list[Row]]:
    """Of each model and round: milliseconds to the first text, the median of the streams', and tokens a second."""
    models = (BARE, PATTERNS, BOTH)
    found: dict[str, list[Row]] = {model: [] for model in models}
    with ThreadPoolExecutor(streams) as pool:
        for turn in range(rounds + 1):  # the first one warms up
            for model in models if turn % 2 else models[::-1]:
                texts = [f"{turn}.{number} {PROMPT}" for number in range(streams)]
                began = time.perf_counter()
                times = list(pool.map(lambda text, model=model: one(client, model, text, tokens), texts))
                rate = streams * tokens / (time.perf_counter() - began)
                if turn:
                    found[model].append({"first": 1e3 * statistics.median(first for first, _ in times), "rate": rate})
    return found


def told(found: Mapping[str, Sequence[Row]], streams: int) -> str:
    """Lines for a person."""
    lines = []
    for model, rows in found.items():
        first, rate = (statistics.median(row[name] for row in rows) for name in ("first", "rate"))
        bare = found[BARE]
        share = statistics.median(row["rate"] / its["rate"] for row, its in zip(rows, bare, strict=True))
        later = statistics.median(row["first"] - its["first"] for row, its in zip(rows, bare, strict=True))
        lines.append(
            f"{streams} streams, {model:<11} first text after {first:6.1f} ms ({later:+.1f}), "
            f"{rate:5.0f} tokens/s (share {share:.3f})"
        )
    return "\n".join(lines)


def main() -> int:
    """Print a line for each model and number of streams."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=400, help="of each answer")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache/guarded", help="keeps the models")
    options = parser.parse_args()
    repository = prepared(options.work)
    load = os.getloadavg()[0]
    with (
        local.running(repository, options.work / "server.log") as server,
        Client(server.grpc_url, timeout=120) as client,
    ):
        for streams in STREAMS:
            print(told(measured(client, streams, options.rounds, options.tokens), streams), flush=True)
    print(f"processes that wanted a core before it began: {load:.1f}, on {os.cpu_count()} cores")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
