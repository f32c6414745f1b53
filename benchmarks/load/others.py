"""Other people's drivers beside ours: Triton's perf_analyzer over gRPC and HTTP, and aiperf at the gateway.

They do not compare answers. A driver that can't be set up on a machine is left out, which the report says.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import perf_analyzer
from benchmarks.load.arrivals import Timed
from benchmarks.load.doors import GATEWAY, GRPC, HTTP
from benchmarks.load.figures import PERCENTILES, Figures, Limits, Percentiles, Run, summarize
from benchmarks.load.workloads import GENERATION, Generation, Workload

PERF_ANALYZER, AIPERF = "perf_analyzer", "aiperf"
WARM_UP = 2  # requests for each one at a time
TIMEOUT = 600.0


class DriverError(RuntimeError):
    """A driver can't be set up, or failed; the message says why."""


def run(command: Sequence[str | Path], seconds: float = TIMEOUT) -> None:
    """Run a driver.

    Raises:
        DriverError: it failed, or took longer than `seconds`.
    """
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=seconds, env=environ)
    except subprocess.TimeoutExpired:
        raise DriverError(f"it did not end within {seconds:g} s") from None
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())
        raise DriverError(f"it ended with {done.returncode}: ... {said[-400:]}")


class PerfAnalyzer:
    """Triton's own driver.

    Args:
        cache: where it is downloaded to.
        addresses: host and port by door, "grpc" and "http".
        scratch: a folder for its files.

    Raises:
        DriverError: it can't be set up.
    """

    name = PERF_ANALYZER

    def __init__(self, cache: Path, addresses: dict[str, str], scratch: Path) -> None:
        self._addresses = addresses
        self._scratch = scratch
        try:
            self._prefix = perf_analyzer.command(cache)
        except perf_analyzer.SetupError as error:
            raise DriverError(str(error)) from None

    def doors(self, workload: Workload | Generation) -> list[str]:
        """Where it can ask: a generator answers a stream, which is gRPC's."""
        names = (GRPC,) if isinstance(workload, Generation) else (GRPC, HTTP)
        return [name for name in names if name in self._addresses]

    def measure(
        self, run_: Run, workload: Workload | Generation, seconds: float, count: int, limits: Limits
    ) -> Figures:
        """One measurement.

        Args:
            seconds: are told by `count` here.
            count: of the requests, which perf_analyzer takes in place of a time.

        Raises:
            DriverError: it failed.
        """
        profile, data = self._scratch / "profile.json", self._scratch / "input.json"
        profile.unlink(missing_ok=True)
        data.write_text(json.dumps({"data": [workload.tensors(item) for item in workload.items]}))
        command = [*self._prefix, "-m", run_.model, "-i", run_.door, "-u", self._addresses[run_.door]]
        command += ["--input-data", str(data), "--profile-export-file", str(profile)]
        command += ["--streaming"] if isinstance(workload, Generation) else ["--async"]
        if run_.streams is None:
            command += ["--request-rate-range", f"{run_.rate:g}", "--request-distribution", "poisson"]
            command += ["--request-count", str(max(count, math.ceil(run_.rate or 1)))]
        else:
            command += ["--concurrency-range", str(run_.streams), "--request-count", str(max(count, run_.streams))]
            command += ["--warmup-request-count", str(WARM_UP * run_.streams)]
        run(command)
        if not profile.exists():
            raise DriverError("it wrote no profile")
        requests = json.loads(profile.read_text())["experiments"][0]["requests"]
        tokens = workload.tokens if isinstance(workload, Generation) else 0
        return summarize(run_, [_timed(request, tokens) for request in requests], None, limits)


def _timed(request: dict[str, Any], tokens: int) -> Timed:
    """A request of perf_analyzer's profile, whose moments are in nanoseconds; several responses are a stream."""
    moments = [moment / 1e9 for moment in request["response_timestamps"]]
    timed = Timed(0, request["timestamp"] / 1e9, tokens=tokens, moments=moments if tokens else [])
    if moments:
        timed.end = moments[-1]
    else:
        timed.error, timed.end = "no response", timed.due
    return timed


class AiPerf:
    """NVIDIA's driver of OpenAI's and Cohere's APIs. Its prompts are random words of its own.

    Args:
        url: of the gateway.
        tokenizer_of: the file tokenizer.json of a model, with which aiperf makes prompts and counts tokens; None: it is
            not known here.
        scratch: a folder for its files.

    Raises:
        DriverError: it can't be installed.
    """

    name = AIPERF

    def __init__(self, url: str, tokenizer_of: Callable[[str], Path | None], scratch: Path) -> None:
        from tests.clients import environments  # those of the tests, so that its version stands once

        self._url = url
        self._tokenizer_of = tokenizer_of
        self._scratch = scratch
        try:
            self._command = environments.environment(AIPERF) / AIPERF
        except AssertionError as error:
            raise DriverError(f"it can't be installed: {error}") from None

    def doors(self, workload: Workload | Generation) -> list[str]:
        """The gateway, where aiperf knows the endpoint."""
        return [GATEWAY] if workload.task in _ENDPOINTS else []

    def measure(
        self, run_: Run, workload: Workload | Generation, seconds: float, count: int, limits: Limits
    ) -> Figures:
        """See `PerfAnalyzer.measure`; `seconds` are what counts here. A generator is asked for completions.

        Raises:
            DriverError: it failed.
        """
        return self._ask(run_, _ENDPOINTS[workload.task], workload, seconds, limits)

    def chats(self, run_: Run, workload: Generation, seconds: float, limits: Limits) -> Figures:
        """The same at /v1/chat/completions.

        Raises:
            DriverError: it failed; as with a model that has no chat template.
        """
        return self._ask(run_, "chat", workload, seconds, limits)

    def _ask(
        self, run_: Run, endpoint: str, workload: Workload | Generation, seconds: float, limits: Limits
    ) -> Figures:
        folder = self._scratch / "aiperf"
        tokenizer = self._tokenizer(run_.model)
        command: list[str | Path] = [self._command, "profile", "--model", run_.model, "--url", self._url]
        command += ["--endpoint-type", endpoint, "--tokenizer", tokenizer, "--isl", "24", "--random-seed", "1"]
        command += ["--ui", "none", "--no-gpu-telemetry", "--no-server-metrics", "--artifact-dir", folder]
        command += ["--benchmark-duration", f"{max(seconds, 1):g}"]
        if run_.streams is None:
            command += ["--request-rate", f"{run_.rate:g}", "--arrival-pattern", "poisson"]
        else:
            command += ["--concurrency", str(run_.streams)]
        if isinstance(workload, Generation):
            command += ["--streaming", "--osl", str(workload.tokens), "--extra-inputs", "ignore_eos:true"]
            command += ["--extra-inputs", "temperature:1.0", "--extra-inputs", "top_k:1"]
            goodput = f"time_to_first_token:{limits.first_token:g} inter_token_latency:{limits.inter_token:g}"
        else:
            goodput = f"request_latency:{limits.latency:g}"
        command += ["--goodput", goodput]
        if endpoint == "cohere_rankings":
            command += ["--rankings-passages-prompt-token-mean", "20", "--rankings-query-prompt-token-mean", "5"]
        run(command)
        return from_aiperf(run_, json.loads((folder / "profile_export_aiperf.json").read_text()))

    def _tokenizer(self, model: str) -> Path:
        """A Hugging Face folder that has nothing but the tokenizer, so that nothing else is looked for."""
        file = self._tokenizer_of(model)
        if file is None:
            raise DriverError(f"the tokenizer of {model} is not known: give --tokenizer")
        folder = self._scratch / f"tokenizer-{model}"
        folder.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / "tokenizer.json")
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        return folder


_ENDPOINTS = {
    GENERATION: "completions",
    "feature-extraction": "embeddings",
    "hybrid-embedding": "embeddings",
    "text-ranking": "cohere_rankings",
}


def from_aiperf(run_: Run, metrics: dict[str, Any]) -> Figures:
    """The figures in aiperf's export. Metrics that an endpoint does not have are left out of it."""

    def average(name: str) -> float | None:
        found = metrics.get(name)
        return None if found is None or found.get("avg") is None else float(found["avg"])

    def spread(name: str) -> Percentiles | None:
        found = metrics.get(name)
        return None if found is None else {f"p{each}": float(found[f"p{each}"]) for each in PERCENTILES}

    answered, failed = int(average("request_count") or 0), int(average("error_request_count") or 0)
    good = average("good_request_count")
    return Figures(
        **vars(run_),
        requests=answered,
        wrong=None,
        full=0,
        failed=failed,
        requests_per_second=average("request_throughput") or 0.0,
        tokens_per_second=average("output_token_throughput"),
        latency=spread("request_latency") or {},
        first_token=spread("time_to_first_token"),
        inter_token=spread("inter_token_latency"),
        goodput=None if good is None or not answered + failed else good / (answered + failed),
    )
