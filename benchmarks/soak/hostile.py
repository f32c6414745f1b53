"""Bad requests over HTTP, and bytes that are not a request.

Requests that end this server (docs/reference/security.md) are left out: bodies of 4 MiB, JSON 100,000 deep as the body
itself, `file:` names of 256 characters, a million chunks.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.soak.calls import SECONDS, Address
from benchmarks.soak.refusals import ANSWERED, Refusal, Reply

GENERATE = "/v2/models/smollm2/generate"
INFER = "/v2/models/minilm/infer"
# How long the server has for an answer; it may leave the connection open after bytes that are not a request.
SILENT_SECONDS = 5.0


def call(
    path: str,
    body: bytes | Mapping[str, Any] | None,
    headers: Mapping[str, str] | None = None,
    method: str = "POST",
) -> Callable[[Address], Reply]:
    """One request that HTTP allows."""
    content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()

    def send(address: Address) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", address.http_port, timeout=SECONDS)
        try:
            connection.request(method, path, content, dict(headers or {}))
            return _reply(connection.getresponse())
        except TimeoutError as error:
            return Reply("timeout", str(error))
        except (OSError, http.client.HTTPException) as error:
            return Reply("closed", repr(error))
        finally:
            connection.close()

    return send


def raw(content: bytes, hang_up: bool = False) -> Callable[[Address], Reply]:
    """Bytes, and what comes back.

    Args:
        content: all that is sent.
        hang_up: end our side of the connection afterwards.
    """

    def send(address: Address) -> Reply:
        try:
            connection = socket.create_connection(("127.0.0.1", address.http_port), timeout=SILENT_SECONDS)
        except OSError as error:
            return Reply("no connection", repr(error))
        with connection:
            try:
                connection.sendall(content)
                if hang_up:
                    connection.shutdown(socket.SHUT_WR)
                response = http.client.HTTPResponse(connection)
                response.begin()
                return _reply(response)
            except TimeoutError:
                return Reply("silent", "")
            except (OSError, http.client.HTTPException):
                return Reply("closed", "")

    return send


def _reply(response: http.client.HTTPResponse) -> Reply:
    text = response.read().decode("utf-8", "replace")
    if response.status == 200:
        return Reply(ANSWERED, text)
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["error"])
    return Reply(f"HTTP {response.status}", text)


def head(path: str, length: int, method: str = "POST", more: str = "") -> bytes:
    """The head of a request whose body has this length, as it says."""
    return f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n{more}\r\n".encode()


def _generate() -> list[Refusal]:
    hello = {"text_input": "Hello"}
    bodies: dict[str, bytes | Mapping[str, Any]] = {
        "a body that is no JSON": b"hello",
        "no body": b"",
        "a list": b"[]",
        "a number": b"1",
        "JSON cut off": b'{"text_input": "Hel',
        "JSON that goes on": b'{"text_input": "Hello"} and more',
        "NaN": b'{"text_input": "Hello", "temperature": NaN}',
        "infinity": b'{"text_input": "Hello", "temperature": 1e999}',
        "invalid UTF-8": b'{"text_input": "caf\xe9"}',
        "half a character": b'{"text_input": "\\ud83d"}',
        "a prompt 1,000 deep": b'{"text_input": ' + b"[" * 1000 + b"]" * 1000 + b"}",
        "a parameter 1,000 deep": b'{"text_input": "a", "x": ' + b'{"a":' * 1000 + b"1" + b"}" * 1000 + b"}",
        "a body 1,000 deep": b"[" * 1000 + b"]" * 1000,
        "messages 100,000 deep in a text": {"messages": "[" * 100_000 + "]" * 100_000},
        "both prompts": hello | {"messages": "[]"},
        "no prompt": {"max_tokens": 4},
        "a number as prompt": {"text_input": 1},
        "null as prompt": {"text_input": None},
        "two prompts": {"text_input": ["a", "b"]},
        "wrong type of max_tokens": hello | {"max_tokens": "three"},
        "a fraction of max_tokens": hello | {"max_tokens": 2.5},
        "max_tokens of 2^40": hello | {"max_tokens": 2**40},
        "negative max_tokens": hello | {"max_tokens": -1},
        "max_tokens beyond the context": hello | {"max_tokens": 4000},
        "negative random_seed": hello | {"random_seed": -1},
        "unknown parameter": hello | {"max_new_tokens": 3},
        "cancel_key": hello | {"cancel_key": ""},
        "the server's own pass": hello | {"trident_pass": "x", "max_new_tokens": 1},
    }
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    gzip = {"Content-Encoding": "gzip"}
    return [
        *(Refusal(f"HTTP: {name}", call(GENERATE, body), ("HTTP 400",)) for name, body in bodies.items()),
        Refusal("HTTP: a form", call(GENERATE, b"text_input=Hello", form), ("HTTP 400", "HTTP 415")),
        Refusal("HTTP: gzip that is none", call(GENERATE, b'{"text_input": "a"}', gzip), ("HTTP 400", "HTTP 415")),
        Refusal("HTTP: infer of a decoupled model", call("/v2/models/smollm2/infer", _infer()), ("HTTP 501",)),
    ]


def _infer(datatype: str = "BYTES", data: Any = None, shape: Any = (1, 1)) -> dict[str, Any]:
    tensor = {"name": "text_input", "datatype": datatype, "shape": shape, "data": ["a"] if data is None else data}
    return {"inputs": [tensor]}


def _infers() -> list[Refusal]:
    bodies: dict[str, bytes | Mapping[str, Any]] = {
        "no inputs": {"inputs": []},
        "inputs of a number": {"inputs": 7},
        "no body": b"",
        "a wrong datatype": _infer("FP32", [1.0]),
        "a datatype that is none": _infer("TEXT"),
        "too few data": _infer(data=[]),
        "data that do not fit": _infer(data=[1]),
        "a negative shape": _infer(shape=[-1, 1]),
        "a shape of texts": _infer(shape=["a"]),
    }
    binary = json.dumps({"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1, 1]}]}).encode()
    lengths = ("-1", "999999", "x", "99999999999999999999")
    return [
        *(Refusal(f"HTTP infer: {name}", call(INFER, body), ("HTTP 400",)) for name, body in bodies.items()),
        *(
            Refusal(
                f"HTTP infer: a JSON head of {length} bytes",
                call(INFER, binary + b"\1\0\0\0a", {"Inference-Header-Content-Length": length}),
                ("HTTP 400",),
            )
            for length in lengths
        ),
    ]


def _administration() -> list[Refusal]:
    region = {"key": "/trident", "offset": 0, "byte_size": 64}
    # What a page in a browser can send to another origin without asking.
    simple = {"Content-Type": "text/plain", "Origin": "http://example.com"}
    wrong = {"trident-admin-key": "0" * 43}
    calls: list[tuple[str, str, dict[str, Any], dict[str, str]]] = [
        ("load without the key", "/v2/repository/models/minilm/load", {}, {}),
        ("load with a wrong key", "/v2/repository/models/minilm/load", {}, wrong),
        ("load from a page", "/v2/repository/models/x/load", {"parameters": {"config": "{}"}}, simple),
        ("unload without the key", "/v2/repository/models/minilm/unload", {}, {}),
        ("index without the key", "/v2/repository/index", {}, {}),
        ("shared memory without the key", "/v2/systemsharedmemory/region/a/register", region, {}),
        ("device memory without the key", "/v2/cudasharedmemory/region/a/register", region, {}),
        ("trace settings without the key", "/v2/trace/setting", {"trace_level": ["TIMESTAMPS"]}, {}),
        ("log settings without the key", "/v2/logging", {"log_verbose_level": 9}, {}),
    ]
    return [
        Refusal(f"HTTP: {name}", call(path, body, headers), ("HTTP 403",), sentence=True)
        for name, path, body, headers in calls
    ]


def _protocol() -> list[Refusal]:
    refused = ("HTTP 400", "closed")
    unknown = ("HTTP 400", "HTTP 404", "HTTP 405")
    body = b'{"text_input": "Hello", "max_tokens": 2}'
    too_large = (*refused, "HTTP 413", "HTTP 431")
    return [
        Refusal("HTTP: unknown model", call("/v2/models/nope/generate", {"text_input": "a"}), ("HTTP 400", "HTTP 404")),
        Refusal(
            "HTTP: unknown version", call("/v2/models/smollm2/versions/9/generate", body), ("HTTP 400", "HTTP 404")
        ),
        Refusal("HTTP: unknown address", call("/v2/nothing", body), unknown, sentence=False),
        Refusal("HTTP: a way out of the folder", call("/v2/models/..%2f..%2fetc/config", None, method="GET"), unknown),
        Refusal("HTTP: GET of generate", call(GENERATE, None, method="GET"), unknown, sentence=False),
        Refusal("HTTP: DELETE of a model", call("/v2/models/smollm2", None, method="DELETE"), unknown, sentence=False),
        Refusal("HTTP: garbage", raw(bytes(range(256)) * 8), refused, sentence=False),
        Refusal(
            "HTTP: TLS", raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)), refused, sentence=False
        ),
        Refusal("HTTP: no method", raw(b"\r\n\r\nnothing\r\n\r\n"), (*refused, "silent"), sentence=False),
        Refusal("HTTP: a method that is none", raw(head(GENERATE, 0, "BREW")), (*unknown, "closed"), sentence=False),
        Refusal("HTTP: a body cut off", raw(head(GENERATE, 400) + body, hang_up=True), refused, sentence=False),
        Refusal("HTTP: a head cut off", raw(head(GENERATE, 400)[:40], hang_up=True), refused, sentence=False),
        Refusal("HTTP: a negative length", raw(head(GENERATE, -5) + body), refused, sentence=False),
        Refusal("HTTP: a length of 2^70", raw(head(GENERATE, 2**70) + body, hang_up=True), too_large, sentence=False),
        Refusal(
            "HTTP: a head of a megabyte",
            raw(head(GENERATE, 0, more=f"X-Long: {'x' * 2**20}\r\n")),
            too_large,
            sentence=False,
        ),
        Refusal(
            "HTTP: 20,000 heads",
            raw(head(GENERATE, 0, more="".join(f"X-{n}: 1\r\n" for n in range(20_000)))),
            too_large,
            sentence=False,
        ),
        Refusal(
            "HTTP: a chunk that is none",
            raw(
                f"POST {GENERATE} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n".encode(),
                hang_up=True,
            ),
            refused,
            sentence=False,
        ),
    ]


def build() -> list[Refusal]:
    """Every bad request over HTTP."""
    return _generate() + _infers() + _administration() + _protocol()
