"""Whatever is sent to the gateway, with a real server behind it: an answer, or an error below 500."""

from __future__ import annotations

import http.client
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.values import JSON, near
from tests.gateways import Gateway

TALK = [{"role": "user", "content": "hi"}]
BODIES: dict[str, Any] = {
    "/v1/chat/completions": {"model": "talk", "messages": TALK, "max_tokens": 2},
    "/v1/completions": {"model": "talk", "prompt": "a", "max_tokens": 2},
    "/v1/responses": {"model": "talk", "input": "a", "max_output_tokens": 16},
    "/v1/embeddings": {"model": "embed", "input": ["a", "b"]},
    "/v1/rerank": {"model": "rank", "query": "a", "documents": ["b", "c"]},
    "/v2/rerank": {"model": "rank", "query": "a", "documents": ["b", "c"]},
    "/v1/score": {"model": "rank", "text_1": "a", "text_2": ["b"]},
    "/v1/classify": {"model": "classify", "input": ["a"]},
    "/tokenize": {"model": "talk", "prompt": "a"},
    "/detokenize": {"model": "talk", "tokens": [65]},
    "/embed": {"inputs": "a"},
    "/rerank": {"query": "a", "texts": ["b"]},
    "/predict": {"inputs": "a"},
    "/api/chat": {"model": "talk", "messages": TALK, "stream": False, "options": {"num_predict": 2}},
    "/api/generate": {"model": "talk", "prompt": "a", "stream": False, "options": {"num_predict": 2}},
    "/api/embed": {"model": "embed", "input": "a"},
}


def check(gateway: Gateway, path: str, body: bytes) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=30)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
    finally:
        connection.close()
    assert response.status < 500, (path, body, text)
    if response.status >= 400:
        answer = json.loads(text)
        assert answer.get("error") or answer["message"], (path, body, text)  # OpenAI's form, or Cohere's


@settings(max_examples=settings.default.max_examples * 2)
@given(sent=st.sampled_from(sorted(BODIES)).flatmap(lambda path: st.tuples(st.just(path), near(BODIES[path]))))
def test_bodies(gateway: Gateway, sent: tuple[str, Any]) -> None:
    path, body = sent
    if isinstance(body, dict) and "max_tokens" not in body and "max_tokens" in BODIES[path]:
        body = body | {"max_tokens": 2}  # a long answer would show nothing more
    check(gateway, path, json.dumps(body).encode())


@given(path=st.sampled_from(sorted(BODIES)), body=st.binary(max_size=40) | JSON.map(json.dumps).map(str.encode))
def test_what_is_no_body(gateway: Gateway, path: str, body: bytes) -> None:
    check(gateway, path, body)
