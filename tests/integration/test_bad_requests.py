"""Requests that must be refused, each with a helpful sentence, while a neighbour is being served unharmed."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from tests.conftest import post, triton_request
from trident_client import Client, InvalidRequestError, NotFoundError, _wire
from trident_serving.launcher.local import LocalServer


@pytest.fixture
def neighbour(client: Client) -> Iterator[None]:
    """A stream that runs during the bad request, and must give the same answer as without it."""
    alone = client.generate("The capital of France is", max_tokens=40).text
    stream = client.stream("The capital of France is", max_tokens=40)
    text = next(stream).text
    yield
    text += "".join(chunk.text for chunk in stream)
    assert text == alone


def test_bad_requests_during_32_streams(client: Client) -> None:
    """All slots are busy; bad requests are refused at once, and no answer changes."""
    prompts = [f"{number}. The capital of" for number in range(32)]
    alone = [client.generate(prompt, max_tokens=30).text for prompt in prompts]
    bad: list[tuple[str, dict[str, Any]]] = [
        ("", {}),
        ("word " * 2100, {}),
        ("x" * 2**20, {}),
        ("Hello", {"max_tokens": -1}),
        ("Hello", {"temperature": float("nan")}),
        ("Hello", {"top_p": 2.0}),
        ("Hello", {"stop_words": ["x"] * 33}),
    ]

    def refused(prompt: str, options: dict[str, Any]) -> str:
        with pytest.raises(InvalidRequestError) as error:
            client.generate(prompt, **options)
        return str(error.value)

    with ThreadPoolExecutor(48) as pool:
        streams = [
            pool.submit(lambda p: "".join(chunk.text for chunk in client.stream(p, max_tokens=30)), prompt)
            for prompt in prompts
        ]
        messages = list(pool.map(lambda case: refused(*case), bad * 4))
        assert [stream.result() for stream in streams] == alone
    assert all(
        "must" in message or "empty" in message or "limit" in message or "context" in message for message in messages
    )


def raw_stream(server: LocalServer, request: pb.ModelInferRequest) -> str:
    """The error of one request on a stream, as any client of a decoupled model gets it."""
    with grpc.insecure_channel(server.grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return "".join(response.error_message for response in stub.ModelStreamInfer(iter([request]), timeout=60))


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": -1}, "max_tokens must be at least 0, found -1"),
        ({"max_tokens": -5}, "max_tokens must be at least 0, found -5"),
        ({"max_tokens": 2**31 - 1}, "max_tokens is 2147483647, but the prompt's 1 tokens leave room for 2047"),
        ({"temperature": float("nan")}, "temperature must be between 0 and 100, found nan"),
        ({"temperature": float("inf")}, "temperature must be between 0 and 100, found inf"),
        ({"temperature": -1.0}, "temperature must be between 0 and 100, found -1.0"),
        ({"top_p": -0.5}, "top_p must be between 0 and 1, found -0.5"),
        ({"top_p": 2.0}, "top_p must be between 0 and 1, found 2.0"),
        ({"top_k": -1}, "top_k must be 0 (off) or more, found -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"presence_penalty": 3.0}, "presence_penalty must be between -2 and 2, found 3.0"),
        ({"min_tokens": 9, "max_tokens": 4}, "min_tokens must be between 0 and 4, found 9"),
        ({"stop_words": ["x"] * 33}, "stop_words holds 33 texts, the limit is 32"),
    ],
)
def test_options_out_of_range(client: Client, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        client.generate("Hello", **options)
    assert message in str(error.value)


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "text_input is empty"),
        ("word " * 2100, "text_input has 2101 tokens, the model's context of 2048 allows 2047"),
        ("x" * 2**20, "text_input has 1048576 bytes, at least"),
    ],
)
def test_prompts_that_do_not_fit(client: Client, prompt: str, message: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        client.generate(prompt)
    assert message in str(error.value)


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "give exactly one of text_input, messages and input_ids, found none"),
        (
            {"text_input": [b"a"], "messages": [b"[]"]},
            "give exactly one of text_input, messages and input_ids, found text_input and messages",
        ),
        ({"text_input": [b"caf\xe9 au lait"]}, "text_input is not UTF-8: byte 0xe9 at offset 3 of 12"),
        ({"messages": [b"hello"]}, "messages is not JSON"),
        ({"messages": [b"[]"]}, "messages must be a JSON list like"),
        ({"messages": [b'{"role": "user"}']}, "messages must be a JSON list like"),
        ({"messages": [b"[1]"]}, "messages[0] must be an object, found int"),
        ({"messages": [b'[{"role": "user"}]']}, "messages[0] needs the text 'content', found None"),
        ({"messages": [b'[{"role": "user", "content": 5}]']}, "messages[0] needs the text 'content', found 5"),
        ({"messages": [b'[{"role": "user", "content": "\\ud83d"}]']}, "messages[0].content holds half of"),
        ({"messages": [b"[" * 100_000]}, "messages is nested too deeply"),
    ],
)
def test_malformed_prompts(server: LocalServer, inputs: dict[str, list[bytes]], message: str) -> None:
    tensors = {name: np.array([values], dtype=np.object_) for name, values in inputs.items()}
    tensors["max_tokens"] = np.array([[4]], np.int32)
    error = raw_stream(server, triton_request("smollm2", tensors))
    assert error.startswith("INVALID_ARGUMENT: ")
    assert message in error


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize(
    "tensors",
    [
        {"text_input": np.array([[b"a"]], np.object_), "max_tokens": np.array([[1.0]], np.float32)},
        {"text_input": np.array([[1]], np.int32)},
        {"text_input": np.array([[b"a", b"b"]], np.object_)},
        {"text_input": np.array([[b"a"], [b"b"]], np.object_)},
        {"text_input": np.array([b"a"], np.object_)[0:0].reshape(1, 0)},
    ],
    ids=["dtype of an option", "dtype of the prompt", "two prompts in a row", "two rows", "no prompt in a row"],
)
def test_wrong_dtype_and_shape(server: LocalServer, tensors: dict[str, Any]) -> None:
    assert raw_stream(server, triton_request("smollm2", tensors))
    with pytest.raises(InvalidRequestError), Client(server.grpc_url) as client:
        list(client._receive("smollm2", tensors, 60.0))


def test_http_answers_400(server: LocalServer) -> None:
    url = f"{server.http_url}/v2/models/smollm2/generate"
    assert post(url, {"text_input": "a", "max_tokens": -1}) == (
        400,
        '{"error":"INVALID_ARGUMENT: max_tokens must be at least 0, found -1"}',
    )
    assert post(url, {"text_input": "a", "messages": "[]"})[0] == 400


@pytest.mark.parametrize(
    ("model", "body", "name"),
    [
        ("smollm2", {"text_input": "Hello", "max_new_tokens": 3}, "max_new_tokens"),
        ("smollm2", {"text_input": "Hello", "parameters": {"temprature": 1}}, "temprature"),
        ("answer", {"question": "Who?", "context": "Ann sings.", "n_best": 2}, "n_best"),
        ("minilm", {"text_input": "Hello", "normalise": False}, "normalise"),
    ],
)
def test_a_misspelt_option(server: LocalServer, model: str, body: dict[str, Any], name: str) -> None:
    """Triton makes a parameter of it, which would be ignored without an error."""
    status, text = post(f"{server.http_url}/v2/models/{model}/generate", body)
    assert status == 400
    assert f"unknown input or parameter '{name}'" in text
    if model != "minilm":
        assert "known are " in text
        assert "max_tokens, " in text


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ('"temperature": "hot"', 500, "attempt to access JSON non-number as double"),
        ('"temperature": {"a": 1}', 500, "attempt to access JSON non-number as double"),
        ('"temperature": null', 500, "attempt to access JSON non-number as double"),
        ('"temperature": 1e999', 500, "Number too big to be stored in double"),
        ('"temperature": NaN', 400, "temperature must be between 0 and 100, found nan"),
        ('"temperature": -Infinity', 400, "temperature must be between 0 and 100, found -inf"),
        ('"temperature": 1e40', 400, "temperature must be between 0 and 100, found inf"),
        ('"max_tokens": 1.5', 500, "attempt to access JSON non-signed-integer as signed-integer"),
        ('"max_tokens": 99999999999999999999', 500, "attempt to access JSON non-signed-integer as signed-integer"),
        ('"stop_words": 5', 500, "attempt to access JSON non-string as string"),
        ('"stop_words": {"a": 1}', 500, "attempt to access JSON non-string as string"),
        ('"stream": "yes"', 500, "attempt to access JSON non-boolean as boolean"),
        ('"random_seed": -1', 500, "attempt to access JSON non-unsigned-integer as unsigned-integer"),
        ('"parameters": {"temperature": "hot"}', 500, "attempt to access JSON non-number as double"),
        ('"parameters": 5', 500, "attempt to access JSON non-object as object"),
        ('"top_p": []', 400, "input byte size mismatch for input 'top_p'"),
        ('"temperature": [0.5, 0.6]', 400, "batch size does not match other inputs"),
    ],
)
def test_wrong_types_over_http(server: LocalServer, fields: str, status: int, message: str) -> None:
    """Triton's parser answers 500 where it refuses; what it lets through is ours."""
    text = "{" + f'"text_input": "1, 2, 3, 4,", {fields}' + "}"
    request = urllib.request.Request(f"{server.http_url}/v2/models/smollm2/generate", text.encode())
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=60)
    assert error.value.code == status
    assert message in json.loads(error.value.read())["error"]


def test_whole_numbers_are_cut_to_32_bits_by_triton(server: LocalServer, client: Client) -> None:
    """No model sees what was cut off: the reference says so."""
    body = {"text_input": "1, 2, 3, 4,", "max_tokens": 2**32 + 2}
    status, text = post(f"{server.http_url}/v2/models/smollm2/generate", body)
    assert (status, json.loads(text)["num_output_tokens"]) == (200, 2)


def test_triton_s_own_fields_of_a_request(server: LocalServer) -> None:
    body = {"text_input": "1, 2, 3, 4,", "max_tokens": 2, "id": "a7", "priority": 1, "sequence_id": 3}
    status, text = post(f"{server.http_url}/v2/models/smollm2/generate", body)
    assert (status, json.loads(text)["id"], json.loads(text)["text_output"]) == (200, "a7", " 5")


def test_unknown_model(client: Client) -> None:
    with pytest.raises(NotFoundError, match="nope"):
        client.generate("Hello", model="nope")
    with pytest.raises(NotFoundError, match="nope"):
        client.embed("Hello", model="nope")


def test_the_wrong_kind_of_model(client: Client) -> None:
    with pytest.raises(InvalidRequestError):
        client.generate("Hello", model="minilm")


@pytest.mark.usefixtures("neighbour")
def test_nul_is_a_character_like_others(client: Client) -> None:
    assert client.generate("a\0b", max_tokens=3).num_input_tokens == 3
    assert client.embed("a\0b").shape == (384,)


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([""], "text_input is empty: '' holds no token"),
        (["fine", "   "], "text_input[1] is empty: '   ' holds no token"),
        (["word " * 300], "text_input has 302 tokens, the model takes 256"),
        (["fine", "word " * 300, "fine"], "text_input[1] has 302 tokens, the model takes 256"),
        (["x" * 2**20], "text_input has 1048576 bytes, the limit is 262144 bytes"),
    ],
)
def test_texts_that_can_not_be_embedded(client: Client, texts: list[str], message: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        client.embed(texts)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"text_input": np.array([[b"\xff\xfe"]], np.object_)}, "text_input is not UTF-8: byte 0xff at offset 0"),
        ({"text_input": np.array([[1.0]], np.float32)}, "FP32"),
        ({"text_input": np.array([[b"a", b"b"]], np.object_)}, "shape"),
        ({"text_input": np.array([[b"a"]] * 33, np.object_)}, "batch-size must be <= 32"),
        ({}, "text_input"),
    ],
    ids=["UTF-8", "dtype", "shape", "batch", "missing"],
)
def test_malformed_embedding_requests(server: LocalServer, tensors: dict[str, Any], message: str) -> None:
    with grpc.insecure_channel(server.grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as error:
            stub.ModelInfer(triton_request("minilm", tensors), timeout=60)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message in error.value.details()


def test_malformed_bytes_hurt_no_request_next_to_them(server: LocalServer) -> None:
    """Triton fails every request of a batch in which one has malformed BYTES, so requests with texts share none."""
    texts = [f"text {number} " + "word " * number for number in range(8)]
    malformed = triton_request("minilm", {"text_input": _wire.texts(["ab"])[:, None]})
    malformed.raw_input_contents[0] = (2**31 - 1).to_bytes(4, "little") + b"ab"
    ended = threading.Event()

    def send_malformed() -> int:
        refused = 0
        with grpc.insecure_channel(server.grpc_url) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            while not ended.is_set():
                with pytest.raises(grpc.RpcError, match="incomplete string data"):
                    stub.ModelInfer(malformed, timeout=30)
                refused += 1
        return refused

    with Client(server.grpc_url, timeout=60) as client, ThreadPoolExecutor(12) as pool:
        alone = [client.embed(text, model="minilm") for text in texts]
        attackers = [pool.submit(send_malformed) for _ in range(4)]
        try:
            answers = list(pool.map(lambda number: client.embed(texts[number % 8], model="minilm"), range(200)))
        finally:
            ended.set()
        assert all(attacker.result() > 20 for attacker in attackers)
    for number, answer in enumerate(answers):
        np.testing.assert_allclose(answer, alone[number % 8], atol=1e-5)
