"""The gateway against clients that hang up, are slow, hostile, too many or unknown, and servers that go away."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests import gateways
from tests.gateways import Gateway
from trident_client import Client
from trident_gateway import keys
from trident_serving.launcher.local import LocalServer, free_ports

SECRET = "the secret words of a prompt"
MESSAGES = [{"role": "user", "content": SECRET}]
CHAT: dict[str, Any] = {"model": "talk", "messages": MESSAGES, "max_tokens": 4}
# Two thousand tokens, which are drawn, so that no draft makes them fast.
LONG: dict[str, Any] = CHAT | {"max_tokens": 1900, "ignore_eos": True, "temperature": 1.0, "seed": 1}
PATH = "/v1/chat/completions"


def raw(body: Any, path: str = PATH, **headers: str) -> bytes:
    """A request as it goes over the wire."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"host": "127.0.0.1", "content_type": "application/json", "content_length": str(len(content))} | headers
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + content


def read(connection: socket.socket) -> bytes:
    """What comes until the other end closes."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            found += part
    return found


def until(condition: Any, seconds: float = 10) -> float:
    """Wait; returns how long."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.01)
    return time.monotonic() - began


def metric(server: LocalServer, name: str) -> float:
    with urllib.request.urlopen(server.metrics_url) as response:
        text = response.read().decode()
    found = re.search(rf'^{name}{{model="talk",version="1"}} (\S+)', text, re.MULTILINE)
    return float(found[1]) if found else 0.0


@pytest.mark.parametrize("stream", [False, True])
def test_a_hangup_cancels_within_half_a_second(gateway: Gateway, gateway_server: LocalServer, stream: bool) -> None:
    cancelled = metric(gateway_server, "trident_requests_cancelled_total")
    with gateway.connect() as connection:
        connection.sendall(raw(LONG | {"stream": stream}, x_request_id=f"gone-{stream}"))
        if stream:
            assert b"data: " in connection.recv(65536) + connection.recv(65536)
        else:
            until(lambda: metric(gateway_server, "trident_requests_running") == 1)
    gone = time.monotonic()

    def logged() -> bool:
        return any(entry["request_id"] == f"gone-{stream}" for entry in gateway.entries())

    until(logged, 0.5)
    # The server publishes its numbers four times a second.
    until(lambda: metric(gateway_server, "trident_requests_cancelled_total") == cancelled + 1, 2)
    assert time.monotonic() - gone < 1
    (entry,) = [entry for entry in gateway.entries() if entry["request_id"] == f"gone-{stream}"]
    assert entry["status"] == (200 if stream else 499)
    assert gateway.ask("/admin/status")[2]["queues"]["talk"] == {"running": 0, "waiting": 0}
    assert f"gone-{stream}: a request failed" not in gateway.log.read_text()


def test_a_hangup_is_seen_behind_a_second_request(gateway: Gateway) -> None:
    with gateway.connect() as connection:
        connection.sendall(raw(LONG, x_request_id="first") + raw(LONG, x_request_id="second"))
        until(lambda: gateway.ask("/admin/status")[2]["queues"]["talk"]["running"] == 1)
    until(lambda: any(entry["request_id"] == "first" for entry in gateway.entries()), 0.5)
    entries = {entry["request_id"]: entry for entry in gateway.entries()}
    assert (entries["first"]["status"], "second" in entries) == (499, False)


def test_requests_behind_each_other_are_answered_in_their_order(gateway: Gateway) -> None:
    with gateway.connect() as connection:
        connection.sendall(b"".join(raw(CHAT, x_request_id=f"row-{number}", connection="close") for number in "123"))
        answers = read(connection)
    assert re.findall(rb"x-request-id: (row-\d)", answers) == [b"row-1"]  # which closes, as it was asked to
    with gateway.connect() as connection:
        connection.sendall(b"".join(raw(CHAT, x_request_id=f"row-{number}") for number in range(20)))
        connection.sendall(raw(CHAT, x_request_id="row-20", connection="close"))
        answers = read(connection)
    assert re.findall(rb"x-request-id: row-(\d+)", answers) == [b"%d" % number for number in range(21)]
    assert answers.count(b"HTTP/1.1 200 OK") == 21


@pytest.mark.parametrize("place", ["behind a request", "behind a body", "in a chunk", "first"])
def test_headers_without_end(gateway: Gateway, place: str) -> None:
    """Nothing is kept of them beyond a limit, wherever they come."""
    begin, line = b"GET / HTTP/1.1\r\n", b"x: " + b"y" * 65536 + b"\r\n"
    if place == "behind a request":
        begin = raw(LONG) + b"GET / HTTP/1.1\r\n"
    elif place != "first":
        begin = raw(b"", transfer_encoding="chunked").replace(b"content-length: 0\r\n", b"")
        begin += b"2\r\n{}\r\n0\r\n" if place == "behind a body" else b"2;"
        line = line if place == "behind a body" else b"y" * 65536
    with gateway.connect() as connection:
        connection.sendall(begin)
        with pytest.raises(ConnectionError):
            connection.sendall(line * 200)
    if place == "first":
        with gateway.connect() as connection:
            connection.sendall(begin + line)
            assert read(connection).startswith(b"HTTP/1.1 431 ")


def test_a_wish_for_http_2_is_overlooked(gateway: Gateway) -> None:
    """As curl --http2 and Java's client send it with every request."""
    with gateway.connect() as connection:
        headers = {"connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2_Settings": "AAMAAABkAAQAAP__"}
        connection.sendall(raw(CHAT, **headers) + raw(CHAT, connection="close"))
        assert read(connection).count(b"HTTP/1.1 200 OK") == 2


@pytest.mark.parametrize("hosts", ["127.0.0.1 evil.example", "evil.example 127.0.0.1", "127.0.0.1 127.0.0.1"])
def test_two_hosts_are_refused(gateway: Gateway, hosts: str) -> None:
    lines = "".join(f"Host: {host}\r\n" for host in hosts.split())
    with gateway.connect() as connection:
        for request in (raw(CHAT), b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n"):
            connection.sendall(request.replace(b"host: 127.0.0.1\r\n", lines.encode()))
        answers = read(connection)
    assert answers.count(b"HTTP/1.1 400 ") == answers.count(b'"code": "several_hosts"') == 2


def test_who_still_sends_reads_the_refusal(gateway: Gateway) -> None:
    """A body is read to its end though the answer is already there, and the connection goes on."""
    with gateway.connect() as connection:
        connection.sendall(raw(b" " * 4_000_000, content_type="text/plain"))
        assert connection.recv(65536).startswith(b"HTTP/1.1 415 ")
        connection.sendall(raw(CHAT, connection="close"))
        assert read(connection).startswith(b"HTTP/1.1 200 ")


BAD = {
    "deep": (b"[" * 100_000, 400, "invalid_json", "recursion"),
    "deep-object": (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, 400, "invalid_json", "recursion"),
    "cut": (b'{"model": "talk"', 400, "invalid_json", "EOF"),
    "nan": (b'{"model": "talk", "messages": [], "temperature": NaN}', 400, "invalid_json", "column"),
    "not-utf8": (b'{"model": "\xff"}', 400, "invalid_json", "unicode"),
    "surrogate": (b'{"model": "\\ud800"}', 400, "invalid_json", "hex escape"),
    "list": (b"[1]", 400, None, "a JSON object"),
    "empty": (b"", 400, None, "empty"),
    "null": (b'{"model": null, "messages": null}', 400, "invalid_value", "model"),
    "huge-number": (b'{"model": "talk", "messages": [], "seed": 1e400}', 400, "invalid_value", "seed"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bodies(gateway: Gateway, direct: Client, name: str) -> None:
    body, status, code, message = BAD[name]
    alone = direct.chat(MESSAGES, model="talk", max_tokens=60).text
    stream = direct.stream(MESSAGES, model="talk", max_tokens=60)
    text = next(stream).text
    found, _, answer = gateway.ask(PATH, body)
    assert (found, answer["error"]["code"]) == (status, code), answer
    assert message in answer["error"]["message"]
    assert text + "".join(chunk.text for chunk in stream) == alone


@pytest.mark.parametrize(
    ("headers", "path", "status", "code"),
    [
        ({"content-type": "text/plain"}, PATH, 415, "unsupported_media_type"),
        ({"content-type": ""}, PATH, 415, "unsupported_media_type"),
        ({"content-type": "multipart/form-data; boundary=x"}, PATH, 415, "unsupported_media_type"),
        ({}, f"{PATH}?api_key=trident-abc", 400, "key_in_address"),
        ({}, f"{PATH}?Token=trident-abc", 400, "key_in_address"),
        ({"origin": "https://evil.example"}, PATH, 403, "origin_not_allowed"),
        ({"origin": "null"}, PATH, 403, "origin_not_allowed"),
        ({"host": "evil.example", "origin": "http://evil.example"}, PATH, 403, "host_not_allowed"),
        ({"host": "[::1"}, PATH, 403, "host_not_allowed"),
        ({"origin": "http://["}, PATH, 403, "origin_not_allowed"),
        ({}, f"{PATH}/", 404, None),
    ],
)
def test_headers_that_are_refused(gateway: Gateway, headers: dict[str, str], path: str, status: int, code: str) -> None:
    found, _, answer = gateway.ask(path, CHAT, headers)
    assert (found, answer["error"]["code"]) == (status, code)


def test_the_charset_and_our_own_page_are_fine(gateway: Gateway) -> None:
    headers = {"content-type": "application/json; charset=utf-8", "origin": f"http://127.0.0.1:{gateway.port}"}
    status, answered, _ = gateway.ask(PATH, CHAT, headers | {"x-request-id": "mine-1"})
    assert (status, answered["x-request-id"]) == (200, "mine-1")
    assert "access-control-allow-origin" not in answered


def test_large_bodies(gateway: Gateway) -> None:
    """A hundred megabytes, with a length, without one, and with a question before."""
    large = b'{"model": "' + b"x" * 100_000_000 + b'"}'
    status, _, answer = gateway.ask(PATH, large)
    assert (status, answer["error"]["code"]) == (413, "request_too_large")
    del large
    with gateway.connect() as connection:
        connection.sendall(raw(b"", content_length="100000000", expect="100-continue"))
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
    with gateway.connect() as connection:
        head = raw(b"", transfer_encoding="chunked").replace(b"content-length: 0\r\n", b"")
        connection.sendall(head)
        for _ in range(10):
            connection.sendall(b"100000\r\n" + b"x" * 2**20 + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert b"413 " in connection.recv(65536)
    assert gateway.ask(PATH, CHAT)[0] == 200


def test_nothing_leaks_between_requests(gateway: Gateway, direct: Client) -> None:
    prompts = [f"{index} cats and {index * 7} dogs" for index in range(24)]
    right = [direct.generate(prompt, model="talk", max_tokens=20).text for prompt in prompts]

    def ask(index: int) -> str:
        body = {"model": "talk", "prompt": prompts[index], "max_tokens": 20, "stream": index % 2 == 1}
        status, _, answer = gateway.ask("/v1/completions", body)
        assert status == 200, answer
        if index % 2 == 0:
            return str(answer["choices"][0]["text"])
        lines = [json.loads(line[6:]) for line in answer.split("\n\n") if line.startswith("data: {")]
        return "".join(line["choices"][0]["text"] for line in lines)

    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(ask, range(24))) == right


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def user(key_file: Path) -> dict[str, str]:
    return {"authorization": f"Bearer {keys.add(key_file, 'user', ['inference'])}"}


@pytest.fixture(scope="module")
def admin(key_file: Path) -> dict[str, str]:
    return {"authorization": f"Bearer {keys.add(key_file, 'ops', ['admin'])}"}


@pytest.fixture(scope="module")
def one(key_file: Path) -> dict[str, str]:
    return {"x-api-key": keys.add(key_file, "one", ["inference"], max_concurrent=1)}


@pytest.fixture(scope="module")
def guarded(
    gateway_server: LocalServer,
    key_file: Path,
    user: dict[str, str],
    admin: dict[str, str],
    one: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Gateway]:
    """A gateway with keys and short limits: one request at a time, two wait."""
    flags = ("--keys", str(key_file), "--max-running", "1", "--max-waiting", "2", "--queue-seconds", "20")
    flags += ("--body-seconds", "1", "--write-seconds", "1", "--alias", "gpt-4o=talk")
    flags += ("--cors-origin", "https://page.example", "--max-body-bytes", "100000")
    log = tmp_path_factory.mktemp("guarded") / "log"
    with gateways.running(log, gateway_server.grpc_url, flags=flags) as running:
        yield running


def test_keys(guarded: Gateway, user: dict[str, str], admin: dict[str, str], key_file: Path) -> None:
    key = user["authorization"].removeprefix("Bearer ")
    cases: list[tuple[dict[str, str], str, int]] = [
        ({}, PATH, 401),
        ({"authorization": "Bearer trident-wrong"}, PATH, 401),
        ({"authorization": f"Basic {key}"}, PATH, 401),
        ({"authorization": key}, PATH, 401),
        (user, PATH, 200),
        ({"x-api-key": key}, PATH, 200),
        ({"api-key": key}, PATH, 200),
        (admin, PATH, 403),
        ({}, f"{PATH}?api_key={key}", 400),
    ]
    for headers, path, status in cases:
        found, answered, answer = guarded.ask(path, CHAT | {"model": "gpt-4o"}, headers)
        assert found == status, answer
        assert ("www-authenticate" in answered) == (status == 401)
        assert key not in json.dumps(answer)
    assert guarded.ask("/metrics", headers=user)[0] == 403
    assert guarded.ask("/metrics", headers=admin)[0] == 200
    assert guarded.ask("/metrics")[0] == guarded.ask("/v1/models")[0] == 401
    assert guarded.ask("/health")[0] == guarded.ask("/ready")[0] == 200
    # In a path, which is logged as it is declared.
    assert guarded.ask(f"/v1/models/{key}", headers=user)[0] == 404
    assert guarded.ask(f"/{key}", headers=user)[0] == 404
    later = keys.add(key_file, "later", ["inference"])
    time.sleep(1.1)
    assert guarded.ask("/v1/models", headers={"authorization": f"Bearer {later}"})[0] == 200
    keys.remove(key_file, "later")
    time.sleep(1.1)
    assert guarded.ask("/v1/models", headers={"authorization": f"Bearer {later}"})[0] == 401


def test_pages_that_may_ask(guarded: Gateway, user: dict[str, str]) -> None:
    headers = {"origin": "https://page.example"}
    _, answered, _ = guarded.ask("/v1/models", headers=user | headers)
    assert answered["access-control-allow-origin"] == "https://page.example"
    assert guarded.ask("/v1/models", headers=user | {"origin": "https://other.example"})[0] == 403
    status, answered, answer = guarded.ask("/v1/models", headers=headers)
    assert (status, answer["error"]["code"]) == (401, "missing_api_key")
    assert answered["access-control-allow-origin"] == "https://page.example"
    with guarded.connect() as connection:
        asked = "authorization,content-type,x-stainless-os"
        ours = {"origin": "https://page.example", "access_control_request_headers": asked, "connection": "close"}
        connection.sendall(raw(b"", access_control_request_method="POST", **ours).replace(b"POST", b"OPTIONS", 1))
        answered = read(connection)
    assert answered.startswith(b"HTTP/1.1 200 ")
    assert b"x-stainless-os" in answered


def test_a_full_queue(guarded: Gateway, user: dict[str, str], one: dict[str, str]) -> None:
    """One runs and two wait; the next is refused, and who waits and hangs up makes room."""
    held = [guarded.connect() for _ in range(3)]
    for number, connection in enumerate(held):
        headers = user if number else one
        connection.sendall(raw(LONG | {"stream": True}, **{k.replace("-", "_"): v for k, v in headers.items()}))
        if number == 0:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
    time.sleep(0.3)
    status, headers, answer = guarded.ask(PATH, CHAT, user)
    assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
    assert answer["error"]["message"].startswith("2 requests wait already")
    assert int(headers["retry-after"]) >= 1
    status, _, answer = guarded.ask(PATH, CHAT, one)
    assert (status, "this key has 1 requests" in answer["error"]["message"]) == (429, True)
    for connection in held:
        connection.close()
    until(lambda: guarded.ask(PATH, CHAT, user)[0] == 200, 1)


def test_slow_clients(guarded: Gateway, user: dict[str, str]) -> None:
    """Headers that do not come, a body that does not come, and an answer that nobody reads."""
    key = user["authorization"]
    began = time.monotonic()
    with guarded.connect() as silent, guarded.connect() as header, guarded.connect() as body, socket.socket() as reader:
        header.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x")
        body.sendall(raw(b'{"model"', authorization=key, content_length="100"))
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", guarded.port))
        wide = LONG | {"stream": True, "logprobs": True, "top_logprobs": 20, "n": 4}
        reader.sendall(raw(wide, authorization=key, x_request_id="unread"))
        assert read(silent) == b""
        assert read(header) == b""
        answer = read(body)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - began < 3
        until(lambda: any(entry["request_id"] == "unread" for entry in guarded.entries()), 20)
    assert guarded.ask(PATH, CHAT, user)[0] == 200
    with guarded.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 20_000)
        assert b"200" not in read(connection)


def test_a_body_that_comes_byte_by_byte(guarded: Gateway, user: dict[str, str]) -> None:
    with guarded.connect() as connection:
        connection.sendall(raw(b"{", authorization=user["authorization"], content_length="100"))
        connection.settimeout(0.2)
        began, answer = time.monotonic(), b""
        while not answer and time.monotonic() - began < 3:
            connection.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_the_log_and_the_metrics(guarded: Gateway, user: dict[str, str], admin: dict[str, str]) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    guarded.ask(PATH, CHAT, user | {"x-request-id": "seen", "traceparent": trace})
    guarded.ask(PATH, CHAT | {"stream": True}, user | {"x-request-id": "streamed"})
    until(lambda: any(entry["request_id"] == "streamed" for entry in guarded.entries()))
    entries = {entry["request_id"]: entry for entry in guarded.entries()}
    seen, streamed = entries["seen"], entries["streamed"]
    assert (seen["route"], seen["status"], seen["model"], seen["key"]) == (PATH, 200, "talk", "user")
    assert (seen["completion_tokens"], seen["trace_id"]) == (4, trace[3:35])
    assert (streamed["stream"], streamed["completion_tokens"], streamed["status"]) == (True, 4, 200)
    assert seen["prompt_tokens"] == streamed["prompt_tokens"] > 0
    text = guarded.log.read_text()
    for secret in (SECRET, *(headers["authorization"].removeprefix("Bearer ") for headers in (user, admin))):
        assert secret not in text
    assert "Traceback" not in text
    metrics = guarded.ask("/metrics", headers=admin)[2]
    found = re.search(
        r'trident_gateway_requests_total{model="talk",route="/v1/chat/completions",status="200"} (\S+)', metrics
    )
    assert found is not None
    assert float(found[1]) >= 2
    assert re.search(r'trident_gateway_tokens_total{kind="completion",model="talk"} \d', metrics)
    assert re.search(r'trident_gateway_waiting{model="talk"} 0', metrics)
    assert "trident_gateway_first_byte_seconds_bucket" in metrics
    assert "trident-" not in metrics.replace("trident-gateway", "")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_end_waits_for_what_runs(gateway_server: LocalServer, direct: Client, tmp_path: Path, workers: str) -> None:
    body = LONG | {"stream": True, "max_tokens": 700}
    right = direct.chat(MESSAGES, model="talk", max_tokens=700, ignore_eos=True, temperature=1.0, random_seed=1)
    with gateways.running(tmp_path / "log", gateway_server.grpc_url, flags=("--workers", workers)) as gateway:
        with ThreadPoolExecutor(1) as pool, contextlib.closing(HTTPConnection("127.0.0.1", gateway.port)) as connection:
            connection.request("POST", PATH, json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()  # its head, with the first token
            running = pool.submit(response.read)
            gateway.process.send_signal(signal.SIGTERM)
            if workers == "1":
                until(lambda: gateway.ask("/ready")[0] == 503)
                status, headers, answer = gateway.ask(PATH, CHAT)
                assert (status, answer["error"]["code"]) == (503, "draining")
                assert headers["retry-after"] == "1"
            lines = running.result().decode()
        assert response.status == 200
        chunks = [json.loads(line[6:]) for line in lines.split("\n\n") if line.startswith("data: {")]
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == right.text
        assert lines.endswith("data: [DONE]\n\n")
        gateway.process.wait(20)
    assert gateway.process.returncode in (0, -signal.SIGTERM)
    assert "Traceback" not in gateway.log.read_text()


class Proxy:
    """Passes connections on to a server, until it is closed."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._open: list[socket.socket] = [self._listening]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._open += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)

    def close(self) -> None:
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


def test_another_server_answers_when_one_goes(gateway_server: LocalServer, direct: Client, tmp_path: Path) -> None:
    proxy, (dead,) = Proxy(gateway_server.grpc_port), free_ports(1)
    first = f"127.0.0.1:{proxy.port}"
    addresses = (first, gateway_server.grpc_url, f"127.0.0.1:{dead}")
    right = direct.chat(MESSAGES, model="talk", max_tokens=4).text
    with gateways.running(tmp_path / "log", *addresses, flags=("--health-seconds", "60")) as gateway:
        servers = gateway.ask("/admin/status")[2]["servers"]
        assert [server["healthy"] for server in servers] == [True, True, False]

        def ask(text: str, **more: Any) -> tuple[int, Any]:
            messages = [{"role": "user", "content": text}]
            status, _, answer = gateway.ask(PATH, CHAT | {"messages": messages} | more)
            return status, answer

        assert all(ask(f"question {number}")[0] == 200 for number in range(8))
        proxy.close()
        for number in range(16):  # half of them belong to the server that is gone
            status, answer = ask(f"question {number}", stream=number % 2 == 1)
            assert status == 200, answer
        assert gateway.ask(PATH, CHAT)[2]["choices"][0]["message"]["content"] == right


class Recorder(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Passes every call on to a server, and notes what each carried."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self.calls: list[tuple[str, dict[str, str]]] = []
        self.server = grpc.server(ThreadPoolExecutor(8), handlers=[self])
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def service(self, details: Any) -> Any:
        self.calls.append((details.method, dict(details.invocation_metadata)))
        if details.method.endswith("ModelStreamInfer"):
            call = self._channel.unary_stream(details.method)
            return grpc.unary_stream_rpc_method_handler(lambda request, context: call(request))
        ask = self._channel.unary_unary(details.method)
        return grpc.unary_unary_rpc_method_handler(lambda request, context: ask(request))


def test_traces_go_on_to_triton(gateway_server: LocalServer, tmp_path: Path) -> None:
    """Each request's own, whatever runs beside it."""
    recorder = Recorder(gateway_server.grpc_url)
    traces = [f"00-{number:032x}-{number:016x}-01" for number in range(1, 9)]
    with gateways.running(tmp_path / "log", f"127.0.0.1:{recorder.port}") as gateway, ThreadPoolExecutor(8) as pool:

        def ask(trace: str) -> int:
            stream = trace in traces[::2]
            return gateway.ask(PATH, CHAT | {"stream": stream}, {"traceparent": trace})[0]

        assert set(pool.map(ask, traces)) == {200}
        assert gateway.ask(PATH, CHAT)[0] == 200
    recorder.server.stop(None)
    sent = [metadata.get("traceparent") for method, metadata in recorder.calls if method.endswith("ModelStreamInfer")]
    assert sorted(filter(None, sent)) == traces
    assert len(sent) == 9


def test_no_server_at_all(tmp_path: Path) -> None:
    (dead,) = free_ports(1)
    with gateways.running(tmp_path / "log", f"127.0.0.1:{dead}", ready=False) as gateway:
        assert gateway.ask("/health")[0] == 200
        assert gateway.ask("/ready")[0] == 503
        status, _, answer = gateway.ask(PATH, CHAT)
        assert (status, answer["error"]["code"]) == (503, "unavailable")
