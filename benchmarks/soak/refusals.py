"""Bad requests over gRPC, each with the codes of a right answer.

They are built from messages, because tritonclient refuses some of them itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from benchmarks.soak.calls import SECONDS, Address, code_of

ANSWERED = "answered"
PARSER_SAYS = ("failed to parse the request JSON buffer: ", "attempt to get members ", "Unable to parse ")


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        code: gRPC's name, "HTTP 400", "closed" for a connection without an answer, `ANSWERED` for a good answer;
            "none" for a stream's error that names no code.
        message: the server's sentence.
    """

    code: str
    message: str


@dataclass(frozen=True)
class Refusal:
    """A bad request.

    Attributes:
        name: of it.
        send: makes it.
        codes: those that are right.
        sentence: whether a message must come with it.
    """

    name: str
    send: Callable[[Address], Reply]
    codes: Sequence[str]
    sentence: bool = True


def is_known(refusal: Refusal, reply: Reply) -> bool:
    """Whether a wrong code is tritonserver's own, which we can't change: 500 of its JSON parser (2.51)."""
    return "HTTP 400" in refusal.codes and reply.code == "HTTP 500" and reply.message.startswith(PARSER_SAYS)


def complaint(refusal: Refusal, reply: Reply) -> str:
    """What is wrong with a reply, in one line; "" where it is right."""
    shown = f"{reply.code}: {reply.message[:300]}"
    if is_known(refusal, reply):
        return ""
    if reply.code not in refusal.codes:
        return f"expected {' or '.join(refusal.codes)}, found {shown}"
    if refusal.sentence and reply.code != "closed" and len(reply.message.split()) < 3:
        return f"no sentence says what is wrong: {shown}"
    if "Traceback" in reply.message or "INTERNAL" in reply.message:
        return f"the message looks like a defect: {shown}"
    return ""


def text(*values: bytes) -> np.ndarray:
    """Texts as a tensor [1, n]."""
    return np.array([values], dtype=np.object_)


def number(value: float, kind: type = np.int32) -> np.ndarray:
    """A number as a tensor [1, 1]."""
    return np.array([[value]], dtype=kind)


def message(model: str, inputs: Mapping[str, np.ndarray], **parameters: str) -> pb.ModelInferRequest:
    """A request."""
    request = pb.ModelInferRequest(model_name=model)
    for name, array in inputs.items():
        request.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        is_text = array.dtype == np.object_
        request.raw_input_contents.append(
            serialize_byte_tensor(array).item() if is_text and array.size else array.tobytes()
        )
    for name, value in parameters.items():
        request.parameters[name].string_param = value
    return request


def unary(request: Any, method: str = "ModelInfer", **metadata: str) -> Callable[[Address], Reply]:
    """One call."""

    def send(address: Address) -> Reply:
        with grpc.insecure_channel(address.grpc) as channel:
            call = getattr(service_pb2_grpc.GRPCInferenceServiceStub(channel), method)
            try:
                call(request, timeout=SECONDS, metadata=tuple(metadata.items()))
            except grpc.RpcError as error:
                return Reply(error.code().name, error.details() or "")
        return Reply(ANSWERED, "")

    return send


def stream(request: pb.ModelInferRequest) -> Callable[[Address], Reply]:
    """One request on a stream."""

    def send(address: Address) -> Reply:
        with grpc.insecure_channel(address.grpc) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            try:  # read to the end: this server leaks memory if a caller leaves a stream just as it ends
                found = [response.error_message for response in stub.ModelStreamInfer(iter([request]), timeout=SECONDS)]
            except grpc.RpcError as error:
                return Reply(error.code().name, error.details() or "")
        said = next(filter(None, found), "")
        return Reply(code_of(said), said) if said else Reply(ANSWERED, "")

    return send


INVALID = ("INVALID_ARGUMENT",)
# Triton's own checks of a request on a stream name no code.
STREAM_INVALID = ("INVALID_ARGUMENT", "none")
# What this Triton answers to a call without the key.
RESTRICTED = ("UNAVAILABLE", "PERMISSION_DENIED", "UNAUTHENTICATED")
HELLO = text(b"Hello")


def _generator() -> list[Refusal]:
    deep = {depth: b'[{"role": "user", "content": ' + b"[" * depth for depth in (1_000, 100_000)}
    closed = {depth: start + b"]" * depth + b"}]" for depth, start in deep.items()}
    inputs: dict[str, dict[str, np.ndarray]] = {
        "no prompt": {"max_tokens": number(4)},
        "both prompts": {"text_input": HELLO, "messages": text(b"[]")},
        "empty text": {"text_input": text(b"")},
        "too long a prompt": {"text_input": text(b"word " * 2100)},
        "a megabyte of prompt": {"text_input": text(b"x" * 2**20)},
        "invalid UTF-8": {"text_input": text(b"caf\xe9 au lait")},
        "max_tokens beyond the context": {"text_input": HELLO, "max_tokens": number(2**31 - 1)},
        "max_tokens 0": {"text_input": HELLO, "max_tokens": number(0)},
        "negative max_tokens": {"text_input": HELLO, "max_tokens": number(-5)},
        "temperature NaN": {"text_input": HELLO, "temperature": number(float("nan"), np.float32)},
        "temperature infinite": {"text_input": HELLO, "temperature": number(float("inf"), np.float32)},
        "negative temperature": {"text_input": HELLO, "temperature": number(-1, np.float32)},
        "top_p 2": {"text_input": HELLO, "top_p": number(2, np.float32)},
        "negative top_k": {"text_input": HELLO, "top_k": number(-1)},
        "min_tokens above max_tokens": {"text_input": HELLO, "min_tokens": number(9), "max_tokens": number(4)},
        "33 stop words": {"text_input": HELLO, "stop_words": text(*[b"x"] * 33)},
        "messages that are no JSON": {"messages": text(b"hello")},
        "messages of a number": {"messages": text(b"[1]")},
        "messages with half a character": {"messages": text(b'[{"role": "user", "content": "\\ud83d"}]')},
        "messages 1,000 deep": {"messages": text(closed[1_000])},
        "messages 100,000 deep": {"messages": text(closed[100_000])},
        "messages 100,000 deep, cut off": {"messages": text(deep[100_000])},
    }
    named = {name: message("smollm2", given) for name, given in inputs.items()}
    named["unknown parameter"] = message("smollm2", {"text_input": HELLO}, temprature="1")
    named["cancel_key as a parameter"] = message("smollm2", {"text_input": HELLO}, cancel_key="")
    own = {
        "wrong dtype": message("smollm2", {"text_input": HELLO, "max_tokens": number(4, np.float32)}),
        "wrong dtype of the prompt": message("smollm2", {"text_input": number(1)}),
        "wrong shape": message("smollm2", {"text_input": text(b"a", b"b")}),
        "two rows": message("smollm2", {"text_input": np.array([[b"a"], [b"b"]], np.object_)}),
        "unknown input": message("smollm2", {"text_input": HELLO, "max_new_tokens": number(4)}),
        "a timeout that is no number": message("smollm2", {"text_input": HELLO}, timeout="soon"),
        "cancel_key as an input": message("smollm2", {"text_input": HELLO, "cancel_key": text(b"")}),
    }
    return [
        *(Refusal(f"stream: {name}", stream(request), INVALID) for name, request in named.items()),
        *(Refusal(f"stream: {name}", stream(request), STREAM_INVALID) for name, request in own.items()),
        Refusal(
            "a call of a decoupled model", unary(message("smollm2", {"text_input": HELLO})), (*INVALID, "UNIMPLEMENTED")
        ),
    ]


def _others() -> list[Refusal]:
    short = message("minilm", {"text_input": HELLO})
    short.raw_input_contents[0] = b"\xff\xff\xff\x7fab"
    missing = message("minilm", {"text_input": HELLO})
    del missing.raw_input_contents[:]
    negative = message("minilm", {"text_input": HELLO})
    negative.inputs[0].shape[0] = -1
    twice = message("minilm", {"text_input": HELLO})
    twice.inputs.append(twice.inputs[0])
    twice.raw_input_contents.append(twice.raw_input_contents[0])
    version = message("minilm", {"text_input": HELLO})
    version.model_version = "9"
    output = message("minilm", {"text_input": HELLO})
    output.outputs.add(name="nothing")
    region = message("minilm", {"text_input": HELLO})
    region.inputs[0].parameters["shared_memory_region"].string_param = "unregistered"
    region.inputs[0].parameters["shared_memory_byte_size"].int64_param = 9
    del region.raw_input_contents[:]
    requests = {
        "wrong dtype": message("minilm", {"text_input": number(1, np.float32)}),
        "wrong shape": message("minilm", {"text_input": text(b"a", b"b")}),
        "missing input": message("minilm", {}),
        "unknown input": message("minilm", {"text_input": HELLO, "normalise": number(1)}),
        "unknown parameter": message("minilm", {"text_input": HELLO}, normalise="1"),
        "empty text": message("minilm", {"text_input": text(b"")}),
        "too long a text": message("minilm", {"text_input": text(b"word " * 300)}),
        "a batch of 33": message("minilm", {"text_input": np.array([[b"a"]] * 33, np.object_)}),
        "invalid UTF-8": message("minilm", {"text_input": text(b"\xff\xfe")}),
        "a text longer than its bytes": short,
        "no bytes": missing,
        "-1 rows": negative,
        "the same input twice": twice,
        "unknown output": output,
    }
    templates = {
        "translate: empty text": message("translate", {"text_input": text(b" ")}),
        "translate: a language that is none": message(
            "translate", {"text_input": HELLO, "target_lang": text(b"x\n\n")}
        ),
        "translate: negative max_tokens": message("translate", {"text_input": HELLO, "max_tokens": number(-1)}),
        "translate: max_tokens beyond the context": message(
            "translate", {"text_input": HELLO, "max_tokens": number(5000)}
        ),
        "translate: temperature NaN": message(
            "translate", {"text_input": HELLO, "temperature": number(float("nan"), np.float32)}
        ),
        "summarize: too long a text": message("summarize", {"text_input": text(b"word " * 3000)}),
        "answer: 2 questions, 3 contexts": message(
            "answer", {"question": text(b"a", b"b")[0], "context": text(b"x", b"y", b"z")[0]}
        ),
        "answer: no context": message("answer", {"question": HELLO[0]}),
        "answer: cancel_key": message("answer", {"question": HELLO[0], "context": HELLO[0]}, cancel_key=""),
    }
    return [
        *(Refusal(f"minilm: {name}", unary(request), INVALID) for name, request in requests.items()),
        *(Refusal(name, unary(request), INVALID) for name, request in templates.items()),
        Refusal("minilm: a region that is not registered", unary(region), (*INVALID, "NOT_FOUND")),
        Refusal("unknown model", unary(message("nope", {"text_input": HELLO})), ("NOT_FOUND",)),
        Refusal("unknown version", unary(version), ("NOT_FOUND", "INVALID_ARGUMENT")),
    ]


def _administration() -> list[Refusal]:
    load = pb.RepositoryModelLoadRequest(model_name="minilm")
    system = pb.SystemSharedMemoryRegisterRequest(name="a", key="/trident", byte_size=64)
    wrong = {"triton-grpc-protocol-trident-admin-key": "0" * 43}
    calls: list[tuple[str, Any, str, dict[str, str]]] = [
        ("load without the key", load, "RepositoryModelLoad", {}),
        ("load with a wrong key", load, "RepositoryModelLoad", wrong),
        ("unload without the key", pb.RepositoryModelUnloadRequest(model_name="minilm"), "RepositoryModelUnload", {}),
        ("shared memory without the key", system, "SystemSharedMemoryRegister", {}),
        ("trace settings without the key", pb.TraceSettingRequest(), "TraceSetting", {}),
        ("log settings without the key", pb.LogSettingsRequest(), "LogSettings", {}),
    ]
    return [
        Refusal(f"gRPC: {name}", unary(request, method, **metadata), RESTRICTED)
        for name, request, method, metadata in calls
    ]


def build() -> list[Refusal]:
    """Every bad request over gRPC."""
    return _generator() + _others() + _administration()
