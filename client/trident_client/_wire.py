"""Tensors of the KServe v2 protocol: turns named numpy arrays into requests, and responses into such arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trident_client import _protocol as pb
from trident_client._errors import ServerError
from trident_client._options import Option

Arrays = Mapping[str, NDArray[Any]]

_DTYPES: dict[str, type[np.generic]] = {
    "BOOL": np.bool_,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "BYTES": np.object_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


def texts(values: list[str]) -> NDArray[np.object_]:
    """Texts as a BYTES tensor [texts], in UTF-8.

    Raises:
        ValueError: one is no text, or has a surrogate, which UTF-8 can't hold.
    """
    return np.array([_utf8(value) for value in values], dtype=np.object_)


def _utf8(value: object) -> bytes:
    if not isinstance(value, str):
        raise ValueError(f"a text must be str, found {value!r}")
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"a text must be UTF-8, found {value[error.start]!r} at character {error.start} of {value[:80]!r}"
        ) from None


def options(given: Mapping[str, Any], known: Mapping[str, Option]) -> dict[str, NDArray[Any]]:
    """The options of a call as tensors [1, n]; those that are None, or an empty list, are left out.

    Raises:
        TypeError: one is unknown.
        ValueError: a number does not fit its type.
    """
    tensors: dict[str, NDArray[Any]] = {}
    for name, value in given.items():
        option = known.get(name)
        if option is None:
            raise TypeError(f"unknown option {name!r}; known are {', '.join(known)}")
        if value is None or (option.many and not value):
            continue
        if option.dtype == "BYTES":
            values = list(value) if option.many else [value if isinstance(value, str) else as_json(name, value)]
            tensors[name] = texts(values)[None]
        elif option.many:
            tensors[name] = np.concatenate([scalar(name, each, _DTYPES[option.dtype]) for each in value])[None]
        else:
            tensors[name] = scalar(name, value, _DTYPES[option.dtype])[None]
    return tensors


def as_json(name: str, value: Any) -> str:
    """A value as JSON.

    Raises:
        ValueError: something in it has no form in JSON.
    """
    try:
        return json.dumps(dict(value) if isinstance(value, Mapping) else value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} has no form in JSON: {error}") from None


def scalar(name: str, value: Any, dtype: type[np.generic]) -> NDArray[Any]:
    """One number as a tensor [1].

    Raises:
        ValueError: it is none or does not fit the type; numpy would cut or wrap an integer.
    """
    if issubclass(dtype, np.integer):
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
            raise ValueError(f"{name} must be a whole number, found {value!r}")
        limits = np.iinfo(dtype)
        if not limits.min <= value <= limits.max:
            raise ValueError(f"{name} must be between {limits.min} and {limits.max}, found {value}")
    try:
        return np.array([value], dtype=dtype)
    except OverflowError:
        raise ValueError(f"{name} is a number too large") from None


def flag(name: str, value: Any) -> NDArray[np.bool_]:
    """A yes or no as a tensor [1].

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be true or false, found {value!r}")
    return np.array([value])


def build_request(model: str, inputs: Arrays) -> Any:
    """A `ModelInferRequest` with these tensors."""
    request = pb.ModelInferRequest(model_name=model)
    for name, array in inputs.items():
        request.inputs.add(name=name, datatype=datatype(array), shape=array.shape)
        request.raw_input_contents.append(to_bytes(array))
    return request


def parse_response(response: Any) -> dict[str, NDArray[Any]]:
    """The tensors of a `ModelInferResponse` by name.

    Raises:
        ServerError: it holds something else than it says.
    """
    try:
        return {
            output.name: to_array(output.datatype, output.shape, raw)
            for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
        }
    except (ValueError, LookupError) as error:
        raise ServerError(f"the server's answer is not one of Triton's: {error}") from error


def datatype(array: NDArray[Any]) -> str:
    """The protocol's name of an array's type."""
    return _NAMES[array.dtype]


def to_array(datatype: str, shape: Sequence[int], raw: bytes) -> NDArray[Any]:
    """The tensor with this content."""
    array: NDArray[Any] = _elements(raw) if datatype == "BYTES" else np.frombuffer(raw, dtype=_DTYPES[datatype])
    return array.reshape(tuple(shape))


def to_bytes(array: NDArray[Any]) -> bytes:
    """The tensor's content; of BYTES, each element after its length in four bytes, little end first."""
    if array.dtype != np.object_:
        return array.tobytes()
    return b"".join(len(element).to_bytes(4, "little") + element for element in array.reshape(-1))


def _elements(raw: bytes) -> NDArray[np.object_]:
    """The elements of a BYTES tensor."""
    found = []
    start = 0
    while start < len(raw):
        end = start + 4 + int.from_bytes(raw[start : start + 4], "little")
        found.append(raw[start + 4 : end])
        start = end
    array = np.empty(len(found), np.object_)
    array[:] = found
    return array
