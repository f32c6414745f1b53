"""The engine behind the real server: deadlines, cancellation, unloading, metrics, reuse and drafts."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2_grpc

from tests import tiny_models
from tests.conftest import post, run_export, triton_request
from trident_client import Client, DeadlineExceededError, InvalidRequestError, UnavailableError
from trident_export import corpora
from trident_serving.launcher import local
from trident_serving.launcher.local import LocalServer

SYSTEM = "You are a careful assistant. " + " ".join(corpora.held_out())[:1400]


def metrics(server: LocalServer, model: str = "smollm2") -> dict[str, float]:
    """The engine's metrics of one model; histograms by their _count and _sum."""
    time.sleep(0.6)  # they are published a few times a second
    with urllib.request.urlopen(server.metrics_url, timeout=10) as response:
        lines = response.read().decode().splitlines()
    found = {}
    for line in lines:
        match = re.match(r'trident_(\w+)\{.*model="([^"]+)".*\} (\S+)', line)
        if match and match[2] == model and not match[1].endswith("_bucket"):
            found[match[1]] = float(match[3])
    return found


def eventually(check: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


@pytest.mark.parametrize("model", ["smollm2", pytest.param("smollm2_int8_cache", marks=pytest.mark.slow)])
def test_answers_do_not_depend_on_their_batch(client: Client, model: str) -> None:
    """Bit for bit: the log-probabilities of every token, greedy and sampled, with and without drafts."""
    source = random.Random(5)
    texts = corpora.held_out()
    requests = []
    for number in range(16):
        text = source.choice(texts)
        start = source.randrange(max(1, len(text) - 200))
        options: dict[str, Any] = {"model": model, "max_tokens": source.randint(1, 40), "return_log_probs": True}
        if number % 3 == 0:
            options |= {"temperature": 1.0, "top_p": 0.9, "random_seed": number}
        if number % 4 == 0:
            options |= {"repetition_penalty": 1.1}
        prompt = (SYSTEM[:600] if number % 2 else "") + text[start : start + source.randint(1, 600)]
        requests.append((prompt or "A", options))
    alone = [client.generate(prompt, **options) for prompt, options in requests]
    for _ in range(2):
        source.shuffle(order := list(range(len(requests))))
        with ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(lambda i: client.generate(requests[i][0], **requests[i][1]), order))
        together = dict(zip(order, answers, strict=True))
        assert [together[index] for index in range(len(requests))] == alone


def test_the_likeliest_tokens_with_their_log_probabilities(client: Client, server: LocalServer) -> None:
    answer = client.generate("The capital of France is", max_tokens=3, top_logprobs=4)
    assert len(answer.top_log_probs) == len(answer.log_probs) == 3
    for chosen, top in zip(answer.log_probs, answer.top_log_probs, strict=True):
        assert len(top) == 4
        assert top[0][1] == chosen  # greedy
        assert [value for _, value in top] == sorted((value for _, value in top), reverse=True)
    chunks = list(client.stream("The capital of France is", max_tokens=3, top_logprobs=4))
    assert tuple(row for chunk in chunks for row in chunk.top_log_probs) == answer.top_log_probs
    body = {"text_input": "The capital of France is", "max_tokens": 1, "top_logprobs": 2}
    status, text = post(f"{server.http_url}/v2/models/smollm2/generate", body)
    assert status == 200
    assert json.loads(text)["output_top_token_ids"] == [token for token, _ in answer.top_log_probs[0][:2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_logprobs": 21}, "top_logprobs must be between 0 and 20, found 21"),
        ({"top_logprobs": -1}, "top_logprobs must be between 0 and 20, found -1"),
        ({"min_p": 1.5}, "min_p must be between 0 and 1, found 1.5"),
    ],
)
def test_options_out_of_range(client: Client, options: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(message)):
        client.generate("Hello", **options)


def test_timeouts(server: LocalServer, client: Client) -> None:
    """The request parameter, in microseconds, over gRPC and HTTP; the client's own timeout sends it."""
    request = triton_request(
        "smollm2",
        {
            "text_input": np.array([[b"Once"]], np.object_),
            "max_tokens": np.array([[1800]], np.int32),
            "min_tokens": np.array([[1800]], np.int32),
        },
    )
    request.parameters["timeout"].int64_param = 300_000
    started = time.monotonic()
    with grpc.insecure_channel(server.grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        message = "".join(response.error_message for response in stub.ModelStreamInfer(iter([request]), timeout=60))
    assert re.match(r"DEADLINE_EXCEEDED: the timeout of 0.3 s was over after \d+ tokens", message)
    assert time.monotonic() - started < 5
    body = {"text_input": "Once", "max_tokens": 1800, "min_tokens": 1800, "timeout": 300_000}
    status, text = post(f"{server.http_url}/v2/models/smollm2/generate", body)
    assert status >= 400
    assert "DEADLINE_EXCEEDED: the timeout of 0.3 s" in text
    status, text = post(f"{server.http_url}/v2/models/smollm2/generate", body | {"timeout": "soon"})
    assert (status, "timeout must be a number of microseconds" in text) == (400, True)
    with pytest.raises(DeadlineExceededError):
        client.generate("Once", max_tokens=1800, min_tokens=1800, timeout=0.3)


def test_a_shared_beginning_is_not_run_again(server: LocalServer, client: Client) -> None:
    def first_token(question: str) -> float:
        started = time.monotonic()
        stream = client.stream(SYSTEM + question, max_tokens=2)
        next(stream)
        return time.monotonic() - started

    before = metrics(server)
    cold = first_token(" What is the capital of France?")
    warm = min(first_token(f" What is the capital of {country}?") for country in ("Spain", "Italy", "Peru"))
    after = metrics(server)
    hits = after["prefix_hit_tokens_total"] - before["prefix_hit_tokens_total"]
    prompts = after["prompt_tokens_total"] - before["prompt_tokens_total"]
    assert prompts > 1200
    assert hits > 0.7 * prompts
    assert warm < cold


def test_drafts_are_accepted_and_can_be_switched_off(server: LocalServer, client: Client) -> None:
    prompt = "Repeat the list.\n" + "apple, banana, cherry, damson, elderberry, fig\n" * 4
    before = metrics(server)
    plain = client.generate(prompt, max_tokens=60, prompt_lookup=False)
    between = metrics(server)
    drafted = client.generate(prompt, max_tokens=60)
    after = metrics(server)
    assert drafted.text == plain.text
    assert between["draft_tokens_total"] == before["draft_tokens_total"]
    accepted = after["draft_tokens_accepted_total"] - between["draft_tokens_accepted_total"]
    assert 20 < accepted <= after["draft_tokens_total"] - between["draft_tokens_total"]
    steps = after["batch_size_count"] - between["batch_size_count"]
    assert steps < (between["batch_size_count"] - before["batch_size_count"]) / 1.6


def test_an_answer_that_comes_again_is_drafted_from_the_first(server: LocalServer, client: Client) -> None:
    """Its own text has no draft for it; a request without drafts leaves nothing for others."""
    question = [{"role": "user", "content": "Explain how a rainbow forms over a waterfall."}]
    found, before = [], metrics(server)
    for lookup in (False, True, True):
        text = client.chat(question, max_tokens=40, temperature=0.0, prompt_lookup=lookup).text
        after = metrics(server)
        change = {name: after[name] - before[name] for name in after}
        found.append((text, change["batch_size_count"], change["pool_draft_tokens_accepted_total"]))
        before = after
    (plain, steps, drafted), (first, _, early), (again, few, accepted) = found
    assert plain == first == again
    assert drafted == 0
    assert early < 10
    assert accepted > 20
    assert few < steps / 3


def test_metrics(server: LocalServer, client: Client) -> None:
    before = metrics(server)
    answer = client.generate("One two three", max_tokens=12, min_tokens=12, prompt_lookup=False)
    after = metrics(server)
    change = {name: after[name] - before.get(name, 0.0) for name in after}
    assert change["prompt_tokens_total"] == answer.num_input_tokens
    assert change["generated_tokens_total"] == 12
    for histogram in ("time_to_first_token", "request_duration", "queue_time"):
        assert change[f"{histogram}_seconds_count"] == 1
        assert 0 <= change[f"{histogram}_seconds_sum"] < 10
    assert change["batch_size_count"] == change["batch_size_sum"] == 11
    assert 0 <= change["inter_token_latency_seconds_count"] <= 11  # a share of them, see test_publisher.py
    assert after["requests_running"] == after["requests_waiting"] == after["slots_used"] == 0
    assert after["kv_cache_tokens"] > 0


def test_an_http_client_that_hangs_up_frees_the_slot(server: LocalServer) -> None:
    import socket

    before = metrics(server)
    body = json.dumps({"text_input": "Once", "max_tokens": 2000, "min_tokens": 2000, "stream": True}).encode()
    head = f"POST /v2/models/smollm2/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.http_port)) as connection:
        connection.sendall(head.encode() + body)
        assert b"200 OK" in connection.recv(4096)
    eventually(lambda: metrics(server)["slots_used"] == 0, 3.0)
    assert metrics(server)["requests_cancelled_total"] == before["requests_cancelled_total"] + 1


def test_a_client_that_dies_frees_the_slot(server: LocalServer) -> None:
    import sys

    before = metrics(server)
    code = (
        "from trident_client import Client\n"
        f"for chunk in Client('{server.grpc_url}').stream('Once', max_tokens=2000, min_tokens=2000):\n"
        "    print(chunk.text, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
    eventually(lambda: metrics(server)["slots_used"] == 0, 3.0)
    assert metrics(server)["requests_cancelled_total"] == before["requests_cancelled_total"] + 1


def test_a_cancellation_is_heard_within_a_few_steps(server: LocalServer, client: Client) -> None:
    """Tokens that are generated after the last one seen: some that waited to be sent, and the steps of 50 ms.

    Where other tests keep the cores busy, a single try may be late in this process, not in the server.
    """
    late = []
    for _ in range(5):
        before = metrics(server)["generated_tokens_total"]
        stream = client.stream("Once upon a time", max_tokens=1500, min_tokens=1500, prompt_lookup=False)
        seen = next(chunk.num_output_tokens for chunk in stream if chunk.num_output_tokens >= 30)
        stream.close()  # type: ignore[attr-defined]
        eventually(lambda: metrics(server)["slots_used"] == 0, 5.0)
        late.append(metrics(server)["generated_tokens_total"] - before - seen)
    assert sorted(late)[2] < 20, late


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A server with a small model, for tests that would disturb others on a shared server."""
    root = tmp_path_factory.mktemp("engine")
    tiny_models.make_causal(root / "llama", "llama", context=4096)
    entry = tiny_models.causal_entry(root / "llama", slots=4, context=4096, max_waiting=64)
    (root / "models.toml").write_text(tiny_models.models_toml({"llama": entry, "other": entry}))
    done = run_export("export", "--models-file", str(root / "models.toml"), "--repository", str(root / "repository"))
    assert done.returncode == 0, done.stderr
    server = local.start(root / "repository", root / "log")
    yield server
    server.stop()


def test_the_memory_is_summed_up_at_load(tiny: LocalServer) -> None:
    cache = r"8 MiB of KV cache \(16384 tokens of 512 bytes\)"
    expected = rf"trident: llama: 4 slots of 4096 tokens; \d+ MiB of weights \+ {cache}"
    assert re.search(expected, tiny.log.read_text())


def stub_process(server: LocalServer) -> int:
    """The process of the first model's backend."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_bytes().decode().split("\0")
                parents = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            if "triton_python_backend_stub" in command[0] and "/llama/" in " ".join(command):
                grandparent = int((Path("/proc") / str(parents) / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if grandparent == server.launcher.pid:
                    return int(entry.name)
    raise AssertionError("no backend process")


def resources(server: LocalServer, pid: int) -> dict[str, int]:
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    return {
        "MiB": int(status["VmRSS"].split()[0]) // 1024,
        "threads": int(status["Threads"]),
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "shared": sum(1 for _ in Path("/dev/shm").glob(f"trident-{server.launcher.pid}-*")),
    }


def test_nothing_is_left_of_cancelled_requests(tiny: LocalServer) -> None:
    def cancelled(number: int) -> None:
        stream = client.stream("A", model="llama", max_tokens=4000, min_tokens=4000)
        if number % 2:
            next(stream, None)
        stream.close()  # type: ignore[attr-defined]

    with Client(tiny.grpc_url, timeout=60) as client, ThreadPoolExecutor(16) as pool:
        list(pool.map(cancelled, range(100)))  # what is taken once: arenas, pools, channels
        eventually(lambda: metrics(tiny, "llama")["slots_used"] == 0)
        pid = stub_process(tiny)
        before, server_before = resources(tiny, pid), resources(tiny, stub_parent(pid))
        list(pool.map(cancelled, range(300)))
        eventually(lambda: metrics(tiny, "llama")["slots_used"] == 0)
        after, server_after = resources(tiny, pid), resources(tiny, stub_parent(pid))
        found = metrics(tiny, "llama")
        assert found["requests_running"] == found["requests_waiting"] == 0
        assert len(client.generate("A", model="llama", max_tokens=5).text) > 0
    assert after["MiB"] - before["MiB"] < 4
    assert server_after["MiB"] - server_before["MiB"] < 8
    for name in ("threads", "files", "shared"):
        assert after[name] <= before[name] + 2


def stub_parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def test_a_slow_reader_delays_no_other_stream(tiny: LocalServer) -> None:
    with Client(tiny.grpc_url, timeout=60) as slow, Client(tiny.grpc_url, timeout=60) as quick:
        expected = quick.generate("B", model="llama", max_tokens=60).text
        stream = slow.stream("A", model="llama", max_tokens=1000, min_tokens=1000)
        next(stream)  # ... and no more for now
        started = time.monotonic()
        assert all(quick.generate("B", model="llama", max_tokens=60).text == expected for _ in range(5))
        assert time.monotonic() - started < 5
        assert sum(1 for _ in stream) > 0


def test_unloading_ends_running_requests_and_loading_starts_again(tiny: LocalServer) -> None:
    options = {"model": "other", "max_tokens": 4000, "min_tokens": 4000, "prompt_lookup": False}
    url = f"{tiny.http_url}/v2/repository/models/other"
    with Client(tiny.grpc_url, timeout=60) as client:
        expected = client.generate("A", model="llama", max_tokens=20).text
        stream = client.stream("A", **options)
        next(stream)
        neighbour = client.stream("A", model="llama", max_tokens=20)
        assert post(f"{url}/unload", {}, tiny.admin_headers)[0] == 200
        started = time.monotonic()
        with pytest.raises(UnavailableError, match="the model was unloaded before the answer was complete"):
            list(stream)
        assert time.monotonic() - started < 0.5  # all of it takes seconds
        assert "".join(chunk.text for chunk in neighbour) == expected
        assert post(f"{url}/load", {}, tiny.admin_headers)[0] == 200
        assert client.generate("A", model="other", max_tokens=20).text == expected
