"""Callers that do not wait for their answers: they cancel, hang up, or are killed.

Each function ends once the server has begun to answer and the caller has gone; it raises `CallError` if the server does
not begin to answer.
"""

from __future__ import annotations

import json
import queue
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import tritonclient.grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from benchmarks.soak.answers import ARTICLES, Case
from benchmarks.soak.calls import SECONDS, Address, CallError, code_of, grpc_inputs, post
from benchmarks.soak.hostile import head

# Long answers, so that callers can break them off: only their length ends them.
LONG = Case("long", "smollm2", {"text_input": "Once upon a time", "max_tokens": 200, "min_tokens": 200})
# A short answer, because it can't be cancelled: the server does not see HTTP callers that hang up before the answer.
BOUNDED = {"text_input": "Once upon a time", "max_tokens": 24}
_LONG_TASK = {"max_tokens": 160, "min_tokens": 160}
TASKS = (
    Case("long translation", "translate", {"text_input": "Le chat est sur la table."} | _LONG_TASK),
    Case("long summary", "summarize", {"text_input": ARTICLES[0]} | _LONG_TASK),
    Case("long answer", "answer", {"question": ["Where is it?"], "context": [ARTICLES[1]]} | _LONG_TASK),
)
# The program of a caller that is killed: it runs a stream and prints a line at the first response.
_GRPC_VICTIM = """
import sys
import numpy as np
import tritonclient.grpc as triton
client = triton.InferenceServerClient(sys.argv[1])
inputs = []
for name, kind, dtype, value in (
    ("text_input", "BYTES", np.object_, b"Once upon a time"),
    ("max_tokens", "INT32", np.int32, 200),
    ("min_tokens", "INT32", np.int32, 200),
    ("stream", "BOOL", np.bool_, True),
):
    tensor = triton.InferInput(name, [1, 1], kind)
    tensor.set_data_from_numpy(np.array([[value]], dtype))
    inputs.append(tensor)
client.start_stream(lambda result, error: print(error or "began", flush=True))
client.async_stream_infer("smollm2", inputs)
sys.stdin.read()
"""
_HTTP_VICTIM = """
import http.client
import sys
connection = http.client.HTTPConnection(sys.argv[1])
body = '{"text_input": "Once upon a time", "max_tokens": 200, "min_tokens": 200, "stream": true}'
connection.request("POST", "/v2/models/smollm2/generate_stream", body)
said = connection.getresponse().readline().decode()
print("began" if said.startswith("data: ") and '"error"' not in said else said, flush=True)
sys.stdin.read()
"""


def cancel_stream(address: Address) -> None:
    """Cancel a gRPC stream after its first response."""
    client = triton_grpc.InferenceServerClient(address.grpc)
    responses: queue.Queue[tuple[Any, Any]] = queue.Queue()
    try:
        client.start_stream(lambda result, error: responses.put((result, error)))
        client.async_stream_infer(LONG.model, grpc_inputs(LONG, stream=True))
        _began(responses)
    finally:
        client.stop_stream(cancel_requests=True)
        client.close()


def cancel_task(address: Address) -> None:
    """Cancel several calls of template tasks."""
    client = triton_grpc.InferenceServerClient(address.grpc)
    results: queue.Queue[tuple[Any, Any]] = queue.Queue()
    try:
        calls = [
            client.async_infer(case.model, grpc_inputs(case), lambda result, error: results.put((result, error)))
            for case in random.sample(TASKS, 2)
        ]
        time.sleep(random.uniform(0.0, 1.5))
        for call in calls:
            call.cancel()
        for _ in calls:
            _, error = results.get(timeout=SECONDS)
            if error is None:
                continue  # it was faster
            if "CANCELLED" not in str(error.status()).upper() and "cancel" not in error.message().lower():
                raise CallError(str(error.status()).removeprefix("StatusCode."), error.message())
    except queue.Empty:
        raise CallError("timeout", "a cancelled call did not end") from None
    finally:
        client.close()


def hang_up_stream(address: Address) -> None:
    """End an HTTP stream after its first event, at random with a normal close or a reset."""
    body = dict(LONG.fields) | {"stream": True}
    with post(address, f"/v2/models/{LONG.model}/generate_stream", body) as response:
        line = response.readline()
        if b'"error"' in line:
            raise CallError(code_of(line.decode()), line.decode())
        if random.random() < 0.5 and response.fp is not None:
            _reset(response.fp.raw._sock)  # type: ignore[attr-defined]


def hang_up_early(address: Address) -> None:
    """Send a request over HTTP and hang up before its answer."""
    with _connected(address) as connection:
        content = json.dumps(BOUNDED).encode()
        connection.sendall(head("/v2/models/smollm2/generate", len(content)) + content)
        time.sleep(random.uniform(0.0, 0.5))
        if random.random() < 0.5:
            _reset(connection)


def hang_up_within(address: Address) -> None:
    """Hang up in the middle of a request, in its head or its body."""
    content = json.dumps(BOUNDED).encode()
    whole = head("/v2/models/smollm2/generate", len(content)) + content
    with _connected(address) as connection:
        connection.sendall(whole[: random.randrange(1, len(whole))])
        if random.random() < 0.5:
            _reset(connection)


def kill_grpc_client(address: Address) -> None:
    """Kill a process in the middle of its gRPC stream."""
    _kill(_GRPC_VICTIM, address.grpc)


def kill_http_client(address: Address) -> None:
    """Kill a process in the middle of its HTTP stream."""
    _kill(_HTTP_VICTIM, address.http)


def _kill(program: str, url: str) -> None:
    command = [sys.executable, "-c", program, url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout is not None
        timer = threading.Timer(SECONDS, victim.kill)
        timer.start()
        try:
            said = victim.stdout.readline().strip()
        finally:
            timer.cancel()
            victim.kill()
    if said != "began":
        raise CallError(code_of(said), said or "no response")


FAULTS: dict[str, Callable[[Address], None]] = {
    "cancelled gRPC stream": cancel_stream,
    "cancelled task": cancel_task,
    "hang-up in an HTTP stream": hang_up_stream,
    "hang-up before an HTTP answer": hang_up_early,
    "hang-up within an HTTP request": hang_up_within,
    "killed gRPC client": kill_grpc_client,
    "killed HTTP client": kill_http_client,
}


def silent_connections(address: Address, count: int) -> list[socket.socket]:
    """Connections that send nothing; half of them to each port."""
    found = []
    for index in range(count):
        port = address.http_port if index % 2 else address.grpc_port
        found.append(socket.create_connection(("127.0.0.1", port), timeout=SECONDS))
    return found


def _began(responses: queue.Queue[tuple[Any, Any]]) -> None:
    try:
        _, error = responses.get(timeout=SECONDS)
    except queue.Empty:
        raise CallError("timeout", "no response") from None
    if isinstance(error, InferenceServerException):
        raise CallError(code_of(error.message()), error.message())


def _connected(address: Address) -> socket.socket:
    return socket.create_connection(("127.0.0.1", address.http_port), timeout=SECONDS)


def _reset(connection: socket.socket) -> None:
    """Let the end of a connection be a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
