"""Requests through the gateway: good ones with the answers of the server itself, bad ones, and callers that hang up."""

from __future__ import annotations

import json
import random
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.soak import answers
from benchmarks.soak.answers import Answer, Case
from benchmarks.soak.calls import SECONDS, Address, Caller, CallError, Way, events, post
from benchmarks.soak.hostile import head
from benchmarks.soak.refusals import ANSWERED, Refusal, Reply

# Fields of a case that the gateway names otherwise.
_NAMES = {"text_input": "prompt", "random_seed": "seed", "stop_words": "stop"}
LONG = {"model": "smollm2", "prompt": "Once upon a time", "max_tokens": 200, "min_tokens": 200}


def completion(caller: Caller, case: Case) -> Answer:
    """An answer in one piece, of /v1/completions or /v1/chat/completions."""
    with post(caller.address, _path(case), _body(case), caller.address.gateway_port) as response:
        found = json.loads(response.read())
    (choice,) = found["choices"]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return _answer(case, text, choice["finish_reason"], found["usage"], _log_probs(choice))


def completion_stream(caller: Caller, case: Case) -> Answer:
    """The same as server-sent events."""
    body = _body(case) | {"stream": True, "stream_options": {"include_usage": True}}
    text, reason, usage, log_probs = "", None, {}, list[float]()
    with post(caller.address, _path(case), body, caller.address.gateway_port) as response:
        for event in events(response):
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                delta = choice["delta"].get("content") if "delta" in choice else choice["text"]
                text += delta or ""
                reason = choice["finish_reason"] or reason
                log_probs += _log_probs(choice)
    return _answer(case, text, reason, usage, log_probs)


def embedding(caller: Caller, case: Case) -> Answer:
    """/v1/embeddings."""
    body = {"model": case.model, "input": case.fields["text_input"]}
    with post(caller.address, "/v1/embeddings", body, caller.address.gateway_port) as response:
        data = json.loads(response.read())["data"]
    return {"embedding": [value for row in data for value in row["embedding"]]}


def translation(caller: Caller, case: Case) -> Answer:
    """/v1/translate, which tells the text alone."""
    body = {"model": case.model, **case.fields}
    body["input"] = body.pop("text_input")
    with post(caller.address, "/v1/translate", body, caller.address.gateway_port) as response:
        found = json.loads(response.read())
    (text,) = (each["text"] for each in found["data"])
    return {"text_output": [text]}


COMPLETIONS: dict[str, Way] = {"gateway": completion, "gateway stream": completion_stream}
EMBEDDINGS: dict[str, Way] = {"gateway": embedding}
TRANSLATIONS: dict[str, Way] = {"gateway": translation}


def translations() -> list[Case]:
    """The translations of a soak, of which the gateway tells the text."""
    cases = [case for case in answers.TEMPLATES if case.model == "translate"]
    return [Case(case.name, case.model, case.fields, ("text_output",)) for case in cases]


def _path(case: Case) -> str:
    return "/v1/chat/completions" if "messages" in case.fields else "/v1/completions"


def _body(case: Case) -> dict[str, Any]:
    fields = dict(case.fields)
    body: dict[str, Any] = {"model": case.model}
    if fields.pop("return_log_probs", False):
        body["logprobs"] = True if "messages" in fields else 0
    if "messages" in fields:
        body["messages"] = json.loads(fields.pop("messages"))
    return body | {_NAMES.get(name, name): value for name, value in fields.items()}


def _log_probs(choice: dict[str, Any]) -> list[float]:
    told = choice.get("logprobs") or {}
    if "content" in told:
        return [each["logprob"] for each in told["content"] or []]
    found: list[float] = told.get("token_logprobs") or []
    return found


def _answer(
    case: Case, text: str, reason: str | None, usage: dict[str, Any], log_probs: Sequence[float]
) -> dict[str, list[Any]]:
    body = {
        "text_output": text,
        "finish_reason": reason,
        "num_input_tokens": usage.get("prompt_tokens"),
        "num_output_tokens": usage.get("completion_tokens"),
        "output_log_probs": list(log_probs),
    }
    return answers.from_json(body, case.outputs)


# Callers that go


def hang_up_stream(address: Address) -> None:
    """End a stream after its first event, at random with a reset."""
    with post(address, "/v1/completions", LONG | {"stream": True}, address.gateway_port) as response:
        line = response.readline()
        if b'"error"' in line:
            raise CallError("HTTP 200", line.decode())
        if random.random() < 0.5 and response.fp is not None:
            _reset(response.fp.raw._sock)  # type: ignore[attr-defined]


def hang_up(address: Address) -> None:
    """Hang up in the middle of a request, or while its answer is computed."""
    content = json.dumps(LONG).encode()
    whole = head("/v1/completions", len(content), more="Content-Type: application/json\r\n") + content
    with socket.create_connection(("127.0.0.1", address.gateway_port), timeout=SECONDS) as connection:
        connection.sendall(whole if random.random() < 0.5 else whole[: random.randrange(1, len(whole))])
        if random.random() < 0.5:
            _reset(connection)


FAULTS: dict[str, Callable[[Address], None]] = {
    "hang-up in a stream of the gateway": hang_up_stream,
    "hang-up before an answer of the gateway": hang_up,
}


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


# Bad requests


def _refused(
    name: str, path: str, body: bytes | dict[str, Any], *codes: str, kind: str = "application/json"
) -> Refusal:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    def send(address: Address) -> Reply:
        try:
            with post(address, path, content, address.gateway_port, kind) as response:
                return Reply(ANSWERED, response.read().decode("utf-8", "replace"))
        except CallError as error:
            return Reply(error.code, error.message)

    return Refusal(f"gateway: {name}", send, codes or ("HTTP 400",))


def refusals() -> list[Refusal]:
    """Bad requests, and what the gateway must answer."""
    prompt = {"model": "smollm2", "prompt": "Hello", "max_tokens": 4}
    chat = "/v1/chat/completions"
    half = b'[{"role": "user", "content": "\\ud83d"}]'
    deep = b'{"model": "smollm2", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    return [
        _refused("no JSON", "/v1/completions", b"hello"),
        _refused("an array", "/v1/completions", b"[]"),
        _refused("nothing", "/v1/completions", b""),
        _refused("100,000 deep", chat, deep),
        _refused("invalid UTF-8", "/v1/completions", b'{"model": "smollm2", "prompt": "caf\xe9"}'),
        _refused("a form", "/v1/completions", b"a=b", "HTTP 415", kind="application/x-www-form-urlencoded"),
        _refused("an unknown model", "/v1/completions", prompt | {"model": "gpt"}, "HTTP 404"),
        _refused("a model of another task", "/v1/completions", prompt | {"model": "minilm"}),
        _refused("an unknown field", "/v1/completions", prompt | {"max_new_tokens": 4}),
        _refused("a text for a number", "/v1/completions", prompt | {"max_tokens": "4"}),
        _refused("temperature -1", "/v1/completions", prompt | {"temperature": -1}),
        _refused("NaN", "/v1/completions", b'{"model": "smollm2", "prompt": "a", "temperature": NaN}'),
        _refused("too long a prompt", "/v1/completions", prompt | {"prompt": "word " * 2100}),
        _refused("no messages", chat, {"model": "smollm2", "messages": []}),
        _refused("half a character", chat, b'{"model": "smollm2", "messages": ' + half + b"}"),
        _refused("no texts", "/v1/embeddings", {"model": "minilm", "input": []}),
        _refused("a path that is none", "/v1/nothing", {}, "HTTP 404"),
    ]
