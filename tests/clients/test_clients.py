"""Other people's clients against the default models' server: their answers are those of our own client.

`make clients` runs these. They install LiteLLM, LlamaIndex and aiperf into environments of their own and download
perf_analyzer, which takes minutes the first time.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import perf_analyzer
from tests.clients.environments import environment
from tests.conftest import ROOT
from trident_client import Client
from trident_serving.launcher.admin_key import HEADER
from trident_serving.launcher.local import LocalServer

pytestmark = [pytest.mark.clients, pytest.mark.timeout(1800)]

PROMPT = "The capital of France is"
TEXTS = ["a cat", "The dog lay under the tree.", "rain"]
# A turn of SmolLM2, whose answer ends before the limit: LlamaIndex leaves out the last of as many responses as tokens.
TURN = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
REQUESTS = 12


def run(command: Sequence[str | Path], seconds: float = 300) -> str:
    """What a command prints; LiteLLM would ask the network for a list of prices."""
    environ = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, env=environ, timeout=seconds
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def program(client: str, *arguments: str) -> Any:
    """The JSON that a program of an environment prints last."""
    script = ROOT / "tests" / "clients" / "programs" / f"use_{client.replace('-', '_')}.py"
    return json.loads(run([environment(client) / "python", script, *arguments]).splitlines()[-1])


def test_litellm(server: LocalServer, client: Client) -> None:
    found = program("litellm", server.http_url, PROMPT, *TEXTS)
    text = client.generate(PROMPT, model="smollm2", max_tokens=12).text
    assert found["completion"] == text
    assert "".join(found["chunks"]) == text
    assert len([chunk for chunk in found["chunks"] if chunk]) > 1
    sampled = client.generate(PROMPT, model="smollm2", max_tokens=12, temperature=1.5, top_k=50, random_seed=7).text
    assert found["sampled"] == sampled != text
    np.testing.assert_array_equal(np.array(found["vectors"], np.float32), client.embed(TEXTS))
    assert "max_tokens must be at least 0, found -1" in found["refusal"]


def test_llama_index(server: LocalServer, client: Client) -> None:
    found = program("llama-index", server.grpc_url, TURN)
    text = client.generate(TURN, model="smollm2", max_tokens=32).text
    assert text == "The capital of France is Paris."
    assert found["complete"] == text
    assert "".join(found["deltas"]) == text
    assert found["chat"]


@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
def test_aiperf(server: LocalServer, client: Client, smollm2_folder: Path, tmp_path: Path, endpoint: str) -> None:
    command: list[str | Path] = [environment("aiperf") / "aiperf", "profile", "--endpoint-type", "template"]
    command += ["--model", "smollm2", "--url", server.http_url, "--custom-endpoint", f"/v2/models/smollm2/{endpoint}"]
    command += ["--extra-inputs", 'payload_template:{"text_input": {{ text|tojson }}}']
    command += ["--extra-inputs", "response_field:text_output", "--extra-inputs", "max_tokens:16"]
    command += ["--streaming", "--extra-inputs", "stream:true"] if endpoint == "generate_stream" else []
    command += ["--tokenizer", smollm2_folder, "--isl", "40", "--request-count", "6", "--concurrency", "2"]
    command += ["--ui", "none", "--no-gpu-telemetry", "--no-server-metrics", "--export-outputs-json"]
    run([*command, "--artifact-dir", tmp_path])
    metrics = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert metrics["request_count"]["avg"] == 6
    assert "error_request_count" not in metrics or not metrics["error_request_count"]["avg"]
    assert 15 <= metrics["output_sequence_length"]["avg"] <= 16  # of the text, tokenized again
    assert ("time_to_first_token" in metrics) == (endpoint == "generate_stream")
    inputs, outputs = (
        json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))["data"] for name in ("inputs", "outputs")
    )
    prompts = [each["payloads"][0]["text_input"] for each in inputs]
    texts = [client.generate(prompt, model="smollm2", max_tokens=16).text for prompt in prompts]
    assert sorted(each["response_text"] for each in outputs) == sorted(texts)


def test_the_quickstart_of_tensorrt_llm(server: LocalServer, client: Client) -> None:
    body = {"text_input": "What is machine learning?", "max_tokens": 20, "bad_words": "", "stop_words": ""}
    for more in ({}, {"pad_id": 2, "end_id": 2}):
        url = f"{server.http_url}/v2/models/smollm2/generate"
        answer = json.loads(run(["curl", "-s", "-X", "POST", url, "-d", json.dumps(body | more)]))
        assert answer["text_output"] == client.generate(body["text_input"], model="smollm2", max_tokens=20).text


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--shape", "text_input:1"],
        ["--string-data", "the cat sat", "-b", "4"],
        ["--shared-memory", "system"],
    ],
    ids=["bare", "shape", "string-data", "shared-memory"],
)
def test_perf_analyzer(server: LocalServer, tmp_path: Path, protocol: str, options: list[str]) -> None:
    url = server.grpc_url if protocol == "grpc" else f"127.0.0.1:{server.http_port}"
    command = [*perf_analyzer.command(ROOT / ".cache"), "-m", "minilm", "-i", protocol, "-u", url, *options]
    if "--shared-memory" in options:
        refused = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert "restricted, expecting header" in refused.stdout + refused.stderr
        # No space before the key: perf_analyzer would send it, and gRPC compares it.
        name = HEADER if protocol == "http" else f"triton-grpc-protocol-{HEADER}"
        command += ["-H", f"{name}:{server.admin_headers[HEADER]}"]
    profile = tmp_path / "profile.json"
    run([*command, "--request-count", str(REQUESTS), "--profile-export-file", profile], 120)
    (experiment,) = json.loads(profile.read_text())["experiments"]
    assert len(experiment["requests"]) >= REQUESTS


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_perf_analyzer_compares_answers(server: LocalServer, client: Client, tmp_path: Path, protocol: str) -> None:
    """It does so where answers are not in shared memory."""
    url = server.grpc_url if protocol == "grpc" else f"127.0.0.1:{server.http_port}"
    command = [*perf_analyzer.command(ROOT / ".cache"), "-m", "minilm", "-i", protocol, "-u", url]
    command += ["--input-data", str(tmp_path / "data.json"), "--request-count", "6"]
    vectors = np.stack([client.embed(text) for text in TEXTS])
    for factor in (1, 2):
        expected = [{"embedding": (vector * factor).tolist()} for vector in vectors]
        data = {"data": [{"text_input": [text]} for text in TEXTS], "validation_data": expected}
        (tmp_path / "data.json").write_text(json.dumps(data))
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert (done.returncode == 0) == (factor == 1), (factor, done.stdout + done.stderr)
