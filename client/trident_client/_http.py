"""What calls over HTTP have in common, whether they block or are awaited: paths, bodies, answers and errors.

Requests that have one response are KServe's `infer` with binary tensors. Those of generators and of speech are
`generate_stream`, whose bodies are JSON, also where the answer is wanted whole: only there does the server notice that
its caller hung up. JSON holds a recording in Base64.
"""

from __future__ import annotations

import json
import math
import socket
import ssl
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx2
import numpy as np
from numpy.typing import NDArray

from trident_client import _wire
from trident_client._errors import (
    DeadlineExceededError,
    InvalidRequestError,
    ServerError,
    TridentError,
    UnavailableError,
    from_named_code,
    from_status,
    refused,
)
from trident_client._settings import Address, Settings
from trident_client._steps import RESTRICTED, Ask, Tensors
from trident_client._types import ModelStatus

ADMIN_KEY = "trident-admin-key"
CONNECT_SECONDS = 10.0
# tritonserver 2.51 ends at a body of 4 MiB.
LARGEST_BODY = 3 * 2**20
_LENGTH = "inference-header-content-length"
# Inputs that hold files, and what stands before their Base64 where JSON has to hold them.
_FILES = {"audio": "", "images": "data:application/octet-stream;base64,"}


def arguments(address: Address, settings: Settings) -> dict[str, Any]:
    """What a client of httpx2 is made with; a server of this machine is never called through a proxy."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody
    if address.secure:
        tls = settings.certificates()
        context = ssl.create_default_context(cafile=tls.ca)
        if tls.certificate is not None:
            context.load_cert_chain(tls.certificate, tls.key)
    return {
        "verify": context,
        "trust_env": not address.is_loopback(),
        "limits": httpx2.Limits(max_connections=None, max_keepalive_connections=20),
        "headers": {"accept-encoding": "identity"},
    }


def extensions(settings: Settings) -> dict[str, Any]:
    """The name that the server's certificate has."""
    name = settings.certificates().server_name
    return {} if name is None else {"sni_hostname": name}


def headers(settings: Settings, ask: Ask | None = None) -> dict[str, str]:
    """The headers of a request, with the admin key where it is needed and known."""
    found = dict(settings.outgoing())
    if ask is not None and ask.what in RESTRICTED and (key := settings.admin("")):
        found[ADMIN_KEY] = key
    return found


def question(ask: Ask) -> tuple[str, str]:
    """The method and the path of a question."""
    model = quote(ask.model, safe="")
    return {
        "live": ("GET", "/v2/health/live"),
        "ready": ("GET", "/v2/health/ready"),
        "metadata": ("GET", f"/v2/models/{model}"),
        "parameters": ("GET", f"/v2/models/{model}/config"),
        "served": ("GET", "/v2/models/stats"),
        "index": ("POST", "/v2/repository/index"),
        "load": ("POST", f"/v2/repository/models/{model}/load"),
        "unload": ("POST", f"/v2/repository/models/{model}/unload"),
    }[ask.what]


def answer(ask: Ask, status: int, body: bytes) -> Any:
    """What a response says.

    Raises:
        TridentError: of its status.
    """
    if ask.what in ("live", "ready") and status in (200, 400):
        return status == 200
    if status != 200:
        raise failure(status, body)
    read = _ANSWERS.get(ask.what)
    with _tritons(body):
        return None if read is None else read(json.loads(body))


_ANSWERS: Mapping[str, Callable[[Any], Any]] = {
    "parameters": lambda config: {
        name: value.get("string_value", "") for name, value in config.get("parameters", {}).items()
    },
    "served": lambda statistics: [model["name"] for model in statistics["model_stats"]],
    "index": lambda index: [
        ModelStatus(each["name"], each.get("version", ""), each.get("state", ""), each.get("reason", ""))
        for each in index
    ],
}


def inference(
    model: str, inputs: Tensors, seconds: float | None, limit: int | None
) -> tuple[str, bytes, dict[str, str]]:
    """The path, the body and the headers of a request that has one response."""
    described, contents = [], []
    for name, array in inputs.items():
        contents.append(_wire.to_bytes(array))
        described.append(
            {
                "name": name,
                "datatype": _wire.datatype(array),
                "shape": list(array.shape),
                "parameters": {"binary_data_size": len(contents[-1])},
            }
        )
    head = json.dumps({"parameters": {"binary_data_output": True, **_timeout(seconds)}, "inputs": described}).encode()
    body = b"".join([head, *contents])
    _check(body, limit)
    path = f"/v2/models/{quote(model, safe='')}/infer"
    return path, body, {"content-type": "application/octet-stream", _LENGTH: str(len(head))}


def inferred(headers: Mapping[str, str], body: bytes) -> dict[str, NDArray[Any]]:
    """The tensors of its response by name."""
    outputs = {}
    with _tritons(body):
        start = int(headers.get(_LENGTH, len(body)))
        for output in json.loads(body[:start])["outputs"]:
            end = start + output["parameters"]["binary_data_size"]
            outputs[output["name"]] = _wire.to_array(output["datatype"], output["shape"], body[start:end])
            start = end
    return outputs


def generation(
    model: str, inputs: Tensors, seconds: float | None, limit: int | None
) -> tuple[str, bytes, dict[str, str]]:
    """The path, the body and the headers of a request that may have several responses."""
    fields = {name: _plain(array, _FILES.get(name)) for name, array in inputs.items()}
    if "n" not in fields:
        fields["stream"] = True
    body = json.dumps({**fields, "parameters": _timeout(seconds)}, ensure_ascii=False, allow_nan=False).encode()
    _check(body, limit)
    path = f"/v2/models/{quote(model, safe='')}/generate_stream"
    return path, body, {"content-type": "application/json", "accept": "text/event-stream"}


def _plain(array: NDArray[Any], file: str | None = None) -> Any:
    """A tensor as JSON has it: Triton makes it a row again."""
    if file is not None:
        values = [file + b64encode(content).decode("ascii") for content in array.reshape(-1).tolist()]
    else:
        values = [value.decode("utf-8") if isinstance(value, bytes) else value for value in array.reshape(-1).tolist()]
    return values[0] if len(values) == 1 else values


def _timeout(seconds: float | None) -> dict[str, int]:
    """The server gives up the request, too, when its time is over."""
    return {} if seconds is None else {"timeout": max(int(seconds * 1e6), 1)}


def _check(body: bytes, limit: int | None) -> None:
    limit = limit or LARGEST_BODY
    if len(body) > limit:
        raise InvalidRequestError(
            f"the request has {len(body)} bytes, and {limit} are the most: send fewer texts in a request "
            "(batch_size), use gRPC, or give max_message_bytes if the server takes more"
        )


class Body:
    """The parts of a response's body.

    Args:
        limit: bytes that it may have; None: any.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = math.inf if limit is None else limit
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, part: bytes) -> None:
        """Add what has come.

        Raises:
            InvalidRequestError: it is too much.
        """
        self._size += len(part)
        if self._size > self._limit:
            raise InvalidRequestError(f"the response has more than the {self._limit} bytes of max_message_bytes")
        self._parts.append(part)

    def whole(self) -> bytes:
        """All of it."""
        return b"".join(self._parts)


class Events:
    """Parts the bytes of an event stream into responses.

    Args:
        inputs: of the request, which say how many of the likeliest tokens are given.
        limit: bytes that one event may have.
    """

    def __init__(self, inputs: Tensors, limit: int | None) -> None:
        self._limit = limit
        self._rest = b""
        self._widths = {
            kind: int(inputs[name].item()) if name in inputs else 0
            for kind, name in (("output", "top_logprobs"), ("prompt", "prompt_logprobs"))
        }

    def feed(self, data: bytes) -> list[dict[str, NDArray[Any]]]:
        """The responses that are complete.

        Raises:
            TridentError: one is an error.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        if self._limit is not None and len(self._rest) > self._limit:
            raise InvalidRequestError(f"a response has more than the {self._limit} bytes of max_message_bytes")
        return [self._tensors(line[5:]) for line in lines if line.startswith(b"data:")]

    def end(self) -> None:
        """Note the end of the stream.

        Raises:
            UnavailableError: it ended within an event.
        """
        if self._rest.strip():
            raise UnavailableError("the server ended the answer within an event")

    def _tensors(self, event: bytes) -> dict[str, NDArray[Any]]:
        with _tritons(event):
            fields: dict[str, Any] = json.loads(event)
            if "error" in fields:
                raise from_named_code(fields["error"]) or refused(fields["error"])
            tensors = {name: self._tensor(name, value) for name, value in fields.items()}
        tensors.setdefault("output_log_probs", np.empty((1, 0), np.float32))
        return tensors

    def _tensor(self, name: str, value: Any) -> NDArray[Any]:
        values = value if isinstance(value, list) else [value]
        if values and isinstance(values[0], str):
            array = np.empty(len(values), np.object_)
            array[:] = [each.encode("utf-8") for each in values]
            return array[None]
        kind, _, rest = name.partition("_top_")
        if rest and kind in self._widths:
            dtype = np.float32 if rest == "log_probs" else np.int32
            return np.array(values, dtype).reshape(1, -1, max(self._widths[kind], 1))
        return np.array(values, np.float32 if name.endswith("log_probs") else None)[None]


def failure(status: int, body: bytes) -> TridentError:
    """The error of a response."""
    text = body.decode("utf-8", "replace").strip()
    try:
        found = json.loads(text.removeprefix("data:"))
        text = str(found["error"])
    except (ValueError, KeyError, TypeError):
        text = text[:500]
    return from_status(status, text)


@contextmanager
def _tritons(body: bytes) -> Iterator[None]:
    """Say so where a body, which is read in the `with` block, is none of Triton's."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ServerError(f"the server's answer is not one of Triton's: {body[:200]!r}") from error


def hang_up(response: httpx2.Response) -> None:
    """End the connection of a response, from another thread than the one that reads it."""
    stream = response.extensions["network_stream"]
    stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


@contextmanager
def translated(target: str) -> Iterator[None]:
    """Raise httpx2's errors as this package's."""
    try:
        yield
    except (httpx2.ReadTimeout, httpx2.WriteTimeout) as error:
        raise DeadlineExceededError("the server did not answer in time") from error
    except httpx2.ConnectTimeout as error:
        raise UnavailableError(f"{target} can't be reached: no connection in time") from error
    except httpx2.RemoteProtocolError as error:
        raise UnavailableError(
            f"{target} ended the connection or does not speak HTTP: {error}; if it is the gRPC port, leave http:// out"
        ) from error
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, httpx2.LocalProtocolError) as error:
        raise InvalidRequestError(str(error)) from error
    except (httpx2.TransportError, OSError) as error:  # an alert of TLS comes as it is
        raise UnavailableError(f"{target} can't be reached: {error or type(error).__name__}") from error
