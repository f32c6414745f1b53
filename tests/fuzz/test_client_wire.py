"""Whatever a server, or something in its place, answers: the client gives tensors or raises one of its own errors."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.values import JSON, near
from trident_client import TridentError, _http, _wire
from trident_client import _protocol as pb

RESPONSE = {
    "model_name": "m",
    "outputs": [
        {"name": "text", "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": 5}},
        {"name": "score", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}},
    ],
}
EVENT = {"text_output": "a", "finish_reason": "", "output_log_probs": [0.5], "num_output_tokens": 1}
PROTO = pb.ModelInferResponse(model_name="m")
PROTO.outputs.add(name="text", datatype="BYTES", shape=[1, 1])
PROTO.outputs.add(name="score", datatype="FP32", shape=[1, 2])
PROTO.raw_output_contents.extend([b"\1\0\0\0a", np.array([1, 2], np.float32).tobytes()])
BYTES = PROTO.SerializeToString()


def tensors(found: Any) -> None:
    assert all(isinstance(array, np.ndarray) for array in found.values())


@given(head=near(RESPONSE), content=st.binary(max_size=32), length=st.none() | st.integers(-5, 500))
def test_http_answers(head: Any, content: bytes, length: int | None) -> None:
    body = json.dumps(head).encode()
    headers = {"inference-header-content-length": str(len(body) if length is None else length)}
    try:
        tensors(_http.inferred(headers, body + content))
    except TridentError as error:
        assert str(error)


@given(event=near(EVENT).map(json.dumps) | st.text(max_size=30), cut=st.integers(0, 20))
def test_events(event: str, cut: int) -> None:
    stream = _http.Events({}, None)
    data = b"data: " + event.encode("utf-8", "surrogatepass") + b"\n\n"
    try:
        for part in (data[:cut], data[cut:]):
            for each in stream.feed(part):
                tensors(each)
        stream.end()
    except TridentError as error:
        assert str(error)


@given(
    status=st.sampled_from([200, 400, 404, 500, 503, 999]),
    body=st.binary(max_size=60) | JSON.map(json.dumps).map(str.encode),
)
def test_failures(status: int, body: bytes) -> None:
    assert isinstance(_http.failure(status, body), TridentError)


def damaged() -> st.SearchStrategy[bytes]:
    cut = st.integers(0, len(BYTES)).map(lambda end: BYTES[:end])
    changed = st.tuples(st.integers(0, len(BYTES) - 1), st.integers(0, 255)).map(
        lambda pair: BYTES[: pair[0]] + bytes([pair[1]]) + BYTES[pair[0] + 1 :]
    )
    return cut | changed | st.binary(max_size=60)


@given(data=damaged())
def test_grpc_answers(data: bytes) -> None:
    try:
        message = pb.ModelInferResponse.FromString(data)
    except DecodeError:
        return  # gRPC's own: the call fails with a status
    try:
        tensors(_wire.parse_response(message))
    except TridentError as error:
        assert str(error)
