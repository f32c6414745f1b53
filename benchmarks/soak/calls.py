"""Makes good requests as other clients do: with tritonclient over gRPC and HTTP, and with plain HTTP."""

from __future__ import annotations

import http.client
import json
import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from benchmarks.soak import answers
from benchmarks.soak.answers import Answer, Case

SECONDS = 240.0


@dataclass(frozen=True)
class Address:
    """Where the server listens, where its metrics are, and where its gateway listens; 0: it has none."""

    http_port: int
    grpc_port: int
    metrics_port: int
    gateway_port: int = 0

    @property
    def http(self) -> str:
        """Host and port of HTTP."""
        return f"127.0.0.1:{self.http_port}"

    @property
    def grpc(self) -> str:
        """Host and port of gRPC."""
        return f"127.0.0.1:{self.grpc_port}"


class CallError(Exception):
    """A call without an answer.

    Args:
        code: gRPC's name of it ("UNAVAILABLE"), "HTTP 503", "closed" or "timeout".
        message: what the server says.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class Caller:
    """The connections of one thread."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._grpc = triton_grpc.InferenceServerClient(address.grpc)
        self._http = triton_http.InferenceServerClient(
            address.http, connection_timeout=SECONDS, network_timeout=SECONDS
        )

    def close(self) -> None:
        """Close the connections."""
        self._grpc.close()
        self._http.close()

    def grpc(self, case: Case) -> Answer:
        """ModelInfer."""
        try:
            result = self._grpc.infer(case.model, grpc_inputs(case), client_timeout=SECONDS)
        except InferenceServerException as error:
            raise _translated(error) from None
        return {name: answers.flat(result.as_numpy(name)) for name in case.outputs}

    def grpc_stream(self, case: Case) -> Answer:
        """ModelStreamInfer, with a response for every few tokens."""
        responses: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._grpc.start_stream(lambda result, error: responses.put((result, error)))
        try:
            chunks = list(self._received(case, responses))
        finally:
            self._grpc.stop_stream()
        return answers.join(chunks)

    def _received(self, case: Case, responses: queue.Queue[tuple[Any, Any]]) -> Iterator[Answer]:
        inputs = grpc_inputs(case, stream=True)
        self._grpc.async_stream_infer(case.model, inputs, enable_empty_final_response=True)
        while True:
            try:
                result, error = responses.get(timeout=SECONDS)
            except queue.Empty:
                raise CallError("timeout", f"no response within {SECONDS:.0f} s") from None
            if error is not None:
                raise _translated(error)
            response = result.get_response()
            if response.outputs:
                yield {name: answers.flat(result.as_numpy(name)) for name in case.outputs}
            if response.parameters["triton_final_response"].bool_param:
                return

    def http(self, case: Case) -> Answer:
        """The infer endpoint with binary tensors."""
        try:
            result = self._http.infer(case.model, _inputs(triton_http, case))
        except InferenceServerException as error:
            raise CallError(f"HTTP {error.status() or '400'}", error.message()) from None
        except (OSError, http.client.HTTPException) as error:
            raise CallError("closed", repr(error)) from None
        return {name: answers.flat(result.as_numpy(name)) for name in case.outputs}

    def http_generate(self, case: Case) -> Answer:
        """The generate endpoint with plain JSON."""
        with post(self.address, f"/v2/models/{case.model}/generate", dict(case.fields)) as response:
            return answers.from_json(json.loads(response.read()), case.outputs)

    def http_stream(self, case: Case) -> Answer:
        """The generate_stream endpoint: server-sent events."""
        body = dict(case.fields) | {"stream": True}
        with post(self.address, f"/v2/models/{case.model}/generate_stream", body) as response:
            chunks = [answers.from_json(event, case.outputs) for event in events(response)]
        return answers.join(chunks)


# The ways to each kind of model, by what a report calls them.
Way = Callable[[Caller, Case], Answer]
STREAMS: dict[str, Way] = {"gRPC stream": Caller.grpc_stream, "HTTP generate_stream": Caller.http_stream}
WHOLE: dict[str, Way] = {"HTTP generate": Caller.http_generate}
UNARY: dict[str, Way] = {"gRPC infer": Caller.grpc, "HTTP infer": Caller.http}


class post:  # noqa: N801
    """A response to a JSON body over a connection of its own, for a `with` block.

    Args:
        port: another one than Triton's.
        kind: the media type that the request says.

    Raises:
        CallError: another status than 200, or no response.
    """

    def __init__(
        self,
        address: Address,
        path: str,
        body: dict[str, Any] | bytes,
        port: int | None = None,
        kind: str = "application/json",
    ) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port or address.http_port, timeout=SECONDS)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            self._connection.request("POST", path, content, {"Content-Type": kind})
            self._response = self._connection.getresponse()
            if self._response.status != 200:
                raise CallError(f"HTTP {self._response.status}", self._response.read().decode("utf-8", "replace"))
        except TimeoutError as error:
            self._connection.close()
            raise CallError("timeout", str(error)) from None
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise CallError("closed", repr(error)) from None
        except CallError:
            self._connection.close()
            raise

    def __enter__(self) -> http.client.HTTPResponse:
        return self._response

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._connection.close()
        if isinstance(error, TimeoutError):
            raise CallError("timeout", str(error)) from None
        if isinstance(error, OSError | http.client.HTTPException):
            raise CallError("closed", repr(error)) from None


def events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The server-sent events of a response.

    Raises:
        CallError: one of them is an error.
    """
    for line in response:
        if line.startswith(b"data: {"):  # the gateway's last one is [DONE]
            event = json.loads(line[6:])
            if "error" in event:
                error = event["error"]
                message = error if isinstance(error, str) else error["message"]
                raise CallError(code_of(message), message)
            yield event


def code_of(message: str) -> str:
    """The code's name that a stream's error begins with; "none" where there is none."""
    name = message.partition(": ")[0]
    return name if name.replace("_", "").isupper() else "none"


def grpc_inputs(case: Case, stream: bool = False) -> list[Any]:
    """A case as tritonclient.grpc takes it."""
    return _inputs(triton_grpc, case, {"stream": True} if stream else {})


def _inputs(module: Any, case: Case, more: dict[str, Any] | None = None) -> list[Any]:
    whole = Case(case.name, case.model, {**case.fields, **(more or {})}, rows=case.rows)
    found = []
    for name, array in answers.tensors(whole).items():
        tensor = module.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        found.append(tensor)
    return found


def _translated(error: InferenceServerException) -> CallError:
    status = str(error.status() or "").removeprefix("StatusCode.")
    if status == "DEADLINE_EXCEEDED":
        return CallError("timeout", error.message())
    return CallError(status or code_of(error.message()), error.message())
