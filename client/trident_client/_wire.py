"""Tensors of the KServe v2 protocol: named numpy arrays to requests, responses to named numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import (
    deserialize_bytes_tensor,
    np_to_triton_dtype,
    serialize_byte_tensor,
    triton_to_np_dtype,
)

Arrays = Mapping[str, NDArray[Any]]


def texts(values: list[str]) -> NDArray[np.object_]:
    """Texts as a BYTES tensor."""
    return np.array([value.encode("utf-8") for value in values], dtype=np.object_)


def scalar(name: str, value: Any, dtype: type[np.generic]) -> NDArray[Any]:
    """One number as a tensor [1].

    Raises:
        ValueError: an integer does not fit the type; numpy would wrap it around.
    """
    if issubclass(dtype, np.integer):
        limits = np.iinfo(dtype)
        if not limits.min <= value <= limits.max:
            raise ValueError(f"{name} must be between {limits.min} and {limits.max}, found {value}")
    return np.array([value], dtype=dtype)


def build_request(model: str, inputs: Arrays) -> pb.ModelInferRequest:
    """A request with these tensors."""
    request = pb.ModelInferRequest(model_name=model)
    for name, array in inputs.items():
        request.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        request.raw_input_contents.append(_to_bytes(array))
    return request


def _to_bytes(array: NDArray[Any]) -> bytes:
    if array.dtype != np.object_:
        return array.tobytes()
    raw: bytes = serialize_byte_tensor(array).item() if array.size else b""
    return raw


def parse_response(response: pb.ModelInferResponse) -> dict[str, NDArray[Any]]:
    """The tensors of a response by name."""
    outputs = {}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.datatype == "BYTES":
            array = deserialize_bytes_tensor(raw)
        else:
            array = np.frombuffer(raw, dtype=triton_to_np_dtype(output.datatype))
        outputs[output.name] = array.reshape(tuple(output.shape))
    return outputs
