"""`make load`: runs perf_analyzer against minilm over gRPC and HTTP, and against smollm2 without streaming.

Starts its own server; writes reports/load.json and reports/load.md. perf_analyzer rounds the throughput of a fixed
number of requests, so it is computed here from the requests' timestamps. Answers are not checked here: the tests do it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import perf_analyzer
from trident_serving.launcher import local
from trident_serving.launcher.local import LocalServer

SENTENCE = "the server answers many short and long questions about models that it holds in memory every day"
WORDS = SENTENCE.split()
OUTPUT_TOKENS = 32


@dataclass(frozen=True)
class Case:
    """One run of perf_analyzer."""

    model: str
    protocol: str
    concurrency: int
    requests: int
    streaming: bool = False


CASES = [
    *(Case("minilm", protocol, callers, 40 * callers) for protocol in ("grpc", "http") for callers in (1, 4, 16)),
    # A decoupled model is called over a stream; stream=false makes it answer once.
    *(Case("smollm2", "grpc", callers, 6 * callers, streaming=True) for callers in (1, 8)),
]


@dataclass(frozen=True)
class Result:
    """What one run measured; latencies in milliseconds."""

    model: str
    protocol: str
    concurrency: int
    requests: int
    requests_per_second: float
    p50_ms: float
    p99_ms: float


def main() -> int:
    """Run every case and write the reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--reports", type=Path, default=Path("reports"))
    options = parser.parse_args()
    try:
        prefix = perf_analyzer.command(options.cache.resolve())
    except perf_analyzer.SetupError as error:
        print(f"load: {error}", file=sys.stderr)
        return 1
    options.reports.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as scratch,
        local.running(options.repository, options.reports / "load-server.log") as server,
    ):
        results = []
        for case in CASES:
            print(f"load: {case.model} over {case.protocol}, {case.concurrency} callers", file=sys.stderr)
            results.append(measure(prefix, server, case, Path(scratch)))
    (options.reports / "load.json").write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    table = as_table(results)
    (options.reports / "load.md").write_text(table)
    print(table)
    return 0


def measure(prefix: list[str], server: LocalServer, case: Case, scratch: Path) -> Result:
    """Run perf_analyzer once and read its profile."""
    data, profile = scratch / "input.json", scratch / "profile.json"
    data.write_text(json.dumps({"data": inputs(case)}))
    url = server.grpc_url if case.protocol == "grpc" else f"127.0.0.1:{server.http_port}"
    command = [*prefix, "-m", case.model, "-i", case.protocol, "-u", url]
    command += ["--input-data", str(data), "--concurrency-range", str(case.concurrency)]
    command += ["--request-count", str(case.requests), "--warmup-request-count", str(2 * case.concurrency)]
    command += ["--profile-export-file", str(profile)]
    command += ["--streaming"] if case.streaming else ["--async"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if run.returncode or not profile.exists():
        raise RuntimeError(f"perf_analyzer failed: {(run.stdout + run.stderr)[-2000:]}")
    requests = json.loads(profile.read_text())["experiments"][0]["requests"]
    profile.unlink()
    return summarize(case, requests)


def inputs(case: Case) -> list[dict[str, Any]]:
    """Texts of different lengths, the same in each run."""
    if case.model == "smollm2":
        prompts = [" ".join(WORDS[: 4 + row]) for row in range(8)]
        return [
            {"text_input": [prompt], "max_tokens": [OUTPUT_TOKENS], "min_tokens": [OUTPUT_TOKENS]} for prompt in prompts
        ]
    return [{"text_input": [" ".join((WORDS * 5)[: 4 + 5 * row])]} for row in range(14)]


def summarize(case: Case, requests: list[dict[str, Any]]) -> Result:
    """Throughput and latencies from the requests' timestamps, which are in nanoseconds."""
    starts = np.array([request["timestamp"] for request in requests])
    ends = np.array([request["response_timestamps"][-1] for request in requests])
    latencies = (ends - starts) / 1e6
    return Result(
        case.model,
        case.protocol,
        case.concurrency,
        len(requests),
        len(requests) / ((ends.max() - starts.min()) / 1e9),
        float(np.percentile(latencies, 50)),
        float(np.percentile(latencies, 99)),
    )


def as_table(results: list[Result]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| model | protocol | callers | requests/s | p50 ms | p99 ms | |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for result in results:
        note = f"{result.requests_per_second * OUTPUT_TOKENS:.0f} tokens/s" if result.model == "smollm2" else ""
        lines.append(
            f"| {result.model} | {result.protocol} | {result.concurrency} | {result.requests_per_second:.1f} "
            f"| {result.p50_ms:.1f} | {result.p99_ms:.1f} | {note} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
