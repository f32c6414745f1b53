"""What the adapters in `trident_serving/_backends` share: requests, responses and errors of Triton's Python API.

`pb_utils` exists only in Triton's processes, so the adapters pass it in.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trident_serving import integrity
from trident_serving.chat.messages import NO_IMAGES
from trident_serving.errors import Cancelled, DeadlineExceeded, InvalidRequest, Overloaded, ServingError
from trident_serving.runtime_folder import PASS_PARAMETER, Process
from trident_serving.schema.fields import timeout_seconds as parse_timeout

# Request parameters of Triton's own protocol extensions; only the timeout concerns us.
RESERVED_PARAMETERS = {"id", "timeout", "priority", "sequence_id", "sequence_start", "sequence_end", "headers"}


def setup(pb_utils: Any, args: Mapping[str, str]) -> Process:
    """Send Python's log records to Triton's log, and refuse a numpy that loses the bytes of every tensor.

    Returns:
        This process as the launcher sees it; the adapter starts it once the model is loaded.

    Raises:
        RuntimeError: numpy is version 2 or later.
    """
    if int(np.__version__.split(".")[0]) >= 2:
        raise RuntimeError(f"numpy {np.__version__} makes this server send empty tensors: install 'numpy<2'")
    root = logging.getLogger()
    root.handlers = [_TritonLog(pb_utils.Logger)]
    root.setLevel(logging.INFO)
    return Process.register(args["model_name"], args["model_version"])


class _TritonLog(logging.Handler):
    def __init__(self, triton_logger: Any) -> None:
        super().__init__()
        self._triton = triton_logger
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        write = (
            self._triton.log_error
            if record.levelno >= logging.ERROR
            else (self._triton.log_warn if record.levelno >= logging.WARNING else self._triton.log_info)
        )
        write(self.format(record))


class Responder:
    """Sends the answer to one request; any thread may use it.

    An adapter derives its own class if its answers are not yet the tensors of a response.

    The server frees a sender's state when the last response is sent. A later question about cancellation ends the
    whole server (seen on 2.51: a segmentation fault). So nothing is asked or sent for a request that has ended, and
    only one thread of the process at a time talks to the server.

    Args:
        pb_utils: Triton's Python API.
        request: Triton's.
        process: counts the requests that are open.

    Attributes:
        streams: whether the model is decoupled. A gRPC stream carries only the message of an error, so the message
            begins with the code's name. (Triton has a header that turns such errors into status codes; on this version
            it ends the server with a segmentation fault.)
    """

    streams = False
    _one_at_a_time = threading.Lock()

    def __init__(self, pb_utils: Any, request: Any, process: Process) -> None:
        self._pb_utils = pb_utils
        self._sender = request.get_response_sender()
        self._process = process
        self._ended = False
        process.opened()

    def tensors(self, answer: Any) -> Mapping[str, NDArray[Any]]:
        """The tensors of a response."""
        found: Mapping[str, NDArray[Any]] = answer
        return found

    def is_last(self, answer: Any) -> bool:
        """Whether this is the last response."""
        return True

    def is_cancelled(self) -> bool:
        """Whether the client has gone or has cancelled the request; False once the request has ended."""
        with self._one_at_a_time:
            return not self._ended and bool(self._sender.is_cancelled())

    def send(self, answer: Any) -> None:
        """Send a response; does nothing after the last one.

        Raises:
            Exception: Triton refuses it; the request then has ended.
        """
        self._send(response(self._pb_utils, self.tensors(answer)), final=self.is_last(answer))

    def fail(self, exception: Exception) -> None:
        """Send an error, which is the last response."""
        found = error(self._pb_utils, exception, name_code=self.streams)
        self._send(self._pb_utils.InferenceResponse(error=found), final=True)

    def _send(self, message: Any, *, final: bool) -> None:
        with self._one_at_a_time:
            if self._ended:
                return
            sent = False
            try:
                self._sender.send(message, flags=self._pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)
                sent = True
            finally:
                if final or not sent:
                    self._ended = True
                    self._process.closed()


def submit_each(
    pb_utils: Any,
    requests: Sequence[Any],
    process: Process,
    submit: Callable[[Any, Responder], None],
    responder: type[Responder] = Responder,
) -> None:
    """Start requests that are answered later; an error at the start is the answer to that request.

    Args:
        submit: called with Triton's request and the responder that takes its answer.
    """
    for request in requests:
        channel = responder(pb_utils, request, process)
        try:
            check_admission(request, process)
            submit(request, channel)
        except Exception as exception:
            channel.fail(exception)


def check_admission(request: Any, process: Process) -> None:
    """Refuse new requests while the server shuts down; calls of its own models are not new, but serve a running one.

    Raises:
        Overloaded: the server shuts down, and the request is new.
    """
    if process.draining and not process.holds_pass(json.loads(request.parameters() or "{}").get(PASS_PARAMETER)):
        raise Overloaded("the server is shutting down and takes no new requests: ask another, or try again later")


def is_stage(args: Mapping[str, str]) -> bool:
    """Whether a model is a stage of an ensemble of ours, from the arguments of `initialize`."""
    public, _, role = args["model_name"].partition("_")
    return role.startswith("model") and (Path(args["model_repository"]).parent / public / "config.pbtxt").exists()


def version_folder(args: Mapping[str, str]) -> Path:
    """The folder of the version that is being loaded, from the arguments of `initialize`; its files are checked.

    Raises:
        LoadError: a file is not the one that was exported.
    """
    folder = Path(args["model_repository"]) / args["model_version"]
    integrity.check(folder)
    return folder


def check_native_graphs(args: Mapping[str, str], backend: Path) -> None:
    """Check the graphs beside a stage, where the server's own backend reads them: that one does not check.

    Args:
        backend: the file of the stage's adapter, beside whose folder the stand-in for the native backend lies.

    Raises:
        LoadError: a file is not the one that was exported.
    """
    if not (backend.parents[1] / "onnxruntime" / "model.py").exists():
        integrity.check_graphs(Path(args["model_repository"]) / args["model_version"])


def model_config(args: Mapping[str, str]) -> dict[str, Any]:
    """The model's config, from the arguments of `initialize`."""
    config: dict[str, Any] = json.loads(args["model_config"])
    return config


def parameters(config: Mapping[str, Any]) -> dict[str, str]:
    """The config's `parameters` as plain texts."""
    return {key: value["string_value"] for key, value in config.get("parameters", {}).items()}


def inputs(request: Any) -> dict[str, NDArray[Any]]:
    """The request's tensors by name."""
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


def unloading(pb_utils: Any, name: str, version: str) -> Callable[[], bool]:
    """A function that says whether the model is being unloaded; Triton itself tells the backend only at the end.

    It says False while another version takes this one's place, and while the whole server drains (Triton's answer is an
    error then): requests in flight may finish.
    """

    def asked() -> bool:
        try:
            return not pb_utils.is_model_ready(name, version) and not pb_utils.is_model_ready(name)
        except Exception:  # Triton's Python API raises types of its own
            return False

    return asked


def request_parameters(request: Any, inputs: Sequence[str] = ()) -> dict[str, Any]:
    """The request's parameters.

    Args:
        request: Triton's.
        inputs: the names of the model's inputs, for the message.

    Raises:
        InvalidRequest: a parameter is unknown. The generate endpoint makes a parameter of every field that is not an
            input, so without this error a misspelt option would silently have no effect.
    """
    given: dict[str, Any] = json.loads(request.parameters() or "{}")
    if unknown := sorted(given.keys() - RESERVED_PARAMETERS - {PASS_PARAMETER}):
        if "images" in unknown and "messages" in inputs:
            raise InvalidRequest(NO_IMAGES)
        known = f"; known are {', '.join(inputs)} and the parameter timeout" if inputs else ""
        raise InvalidRequest(f"unknown input or parameter {unknown[0]!r}{known}")
    return given


def timeout(request: Any, config: Mapping[str, Any]) -> object:
    """The request parameter `timeout`, in microseconds: Triton has gRPC's, the parameters have the generate endpoint's.

    Raises:
        InvalidRequest: a parameter is unknown.
    """
    given = request_parameters(request, [entry["name"] for entry in config["input"]])
    return request.timeout() or given.get("timeout")


def timeout_seconds(request: Any, config: Mapping[str, Any], limit: float) -> float:
    """The timeout in seconds, at most the model's limit."""
    return parse_timeout(timeout(request, config), limit)


def error(pb_utils: Any, exception: Exception, *, name_code: bool = False) -> Any:
    """The exception as Triton's error: the code says whether to fix the request, to retry, or to report a defect.

    Args:
        pb_utils: Triton's Python API.
        exception: why the request failed.
        name_code: begin the message with the code's gRPC name.
    """
    codes = pb_utils.TritonError
    code, name, message = codes.INTERNAL, "INTERNAL", f"{type(exception).__name__}: {exception}"
    if isinstance(exception, InvalidRequest):
        code, name, message = codes.INVALID_ARG, "INVALID_ARGUMENT", str(exception)
    elif isinstance(exception, Overloaded):
        code, name, message = codes.UNAVAILABLE, "UNAVAILABLE", str(exception)
    elif isinstance(exception, DeadlineExceeded):  # Triton has no code of that name
        code, name, message = codes.UNAVAILABLE, "DEADLINE_EXCEEDED", str(exception)
    elif isinstance(exception, Cancelled):
        code, name, message = codes.CANCELLED, "CANCELLED", str(exception)
    return codes(f"{name}: {message}" if name_code else message, code)


def response(pb_utils: Any, result: Mapping[str, NDArray[Any]] | Exception) -> Any:
    """A response with these tensors, or with this error."""
    if isinstance(result, Exception):
        return pb_utils.InferenceResponse(error=error(pb_utils, result))
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, tensor) for name, tensor in result.items()])


def answer(
    pb_utils: Any,
    serve: Callable[[dict[str, NDArray[Any]]], Mapping[str, NDArray[Any]]],
    request: Any,
    entry: Process | None = None,
) -> Any:
    """The response to one request; an exception becomes its error and does not affect the other requests.

    Args:
        serve: makes the response's tensors from the request's.
        entry: the process of a first stage, which refuses new requests while the server shuts down; None: a later one.
    """
    try:
        if entry is not None:
            check_admission(request, entry)
        request_parameters(request)
        return response(pb_utils, serve(inputs(request)))
    except Exception as exception:
        if not isinstance(exception, ServingError):
            logging.getLogger(__name__).exception("a request failed")
        return response(pb_utils, exception)


def folder_to_complete(command_line: bytes | None = None) -> Path:
    """The version folder of the model whose config is being completed.

    Triton completes a config before it tells the backend where the model is. The command line of the backend's own
    process has it: Triton puts the model's file there as the first argument.

    Raises:
        RuntimeError: the command line does not name the file.
    """
    command = command_line if command_line is not None else Path("/proc/self/cmdline").read_bytes()
    arguments = command.decode().split("\0")
    if len(arguments) < 2 or not Path(arguments[1]).is_absolute():
        raise RuntimeError("this server does not say where the model is: give inputs and outputs in config.pbtxt")
    return Path(arguments[1]).parent
