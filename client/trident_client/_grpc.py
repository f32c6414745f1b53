"""What calls over gRPC have in common, whether they block or are awaited: options, requests, answers and errors."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import grpc.experimental

from trident_client import _admin_key, _wire
from trident_client import _protocol as pb
from trident_client._errors import ForbiddenError
from trident_client._steps import Ask, Tensors
from trident_client._types import ModelStatus

STREAM = f"/{pb.SERVICE}/ModelStreamInfer"
_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
)
# The thread that iterates over a stream receives its messages itself; else a thread of the channel passes them on.
ONE_THREAD = (grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1)


def channel_options(url: str) -> list[tuple[str, int]]:
    """The options of a channel to `url`; a server of this machine is never called through the environment's proxy."""
    return [*_CHANNEL_OPTIONS, *([("grpc.enable_http_proxy", 0)] if _is_loopback(url) else [])]


def _is_loopback(url: str) -> bool:
    """Whether a gRPC target, with or without its scheme ("dns:", "ipv4:", "dns:///"), is on this machine itself."""
    target = url.rpartition("/")[2]
    scheme, _, rest = target.partition(":")
    target = rest if scheme in ("dns", "ipv4", "ipv6") else target
    host = target[1:].partition("]")[0] if target.startswith("[") else target.partition(":")[0]
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def question(ask: Ask) -> tuple[str, Any, Callable[[Any], Any]]:
    """The name of a call, its request, and what makes the answer of its response."""
    name, request, answer = _QUESTIONS[ask.what]
    return name, request(ask.model), answer


_QUESTIONS: Mapping[str, tuple[str, Callable[[str], Any], Callable[[Any], Any]]] = {
    "live": ("ServerLive", lambda _: pb.ServerLiveRequest(), lambda response: bool(response.live)),
    "ready": ("ServerReady", lambda _: pb.ServerReadyRequest(), lambda response: bool(response.ready)),
    "metadata": ("ModelMetadata", lambda model: pb.ModelMetadataRequest(name=model), lambda _: None),
    "parameters": (
        "ModelConfig",
        lambda model: pb.ModelConfigRequest(name=model),
        lambda response: {name: value.string_value for name, value in response.config.parameters.items()},
    ),
    "served": (
        "ModelStatistics",
        lambda _: pb.ModelStatisticsRequest(),
        lambda response: [model.name for model in response.model_stats],
    ),
    "index": (
        "RepositoryIndex",
        lambda _: pb.RepositoryIndexRequest(),
        lambda response: [ModelStatus(each.name, each.version, each.state, each.reason) for each in response.models],
    ),
    "load": (
        "RepositoryModelLoad",
        lambda model: pb.RepositoryModelLoadRequest(model_name=model),
        lambda _: None,
    ),
    "unload": (
        "RepositoryModelUnload",
        lambda model: pb.RepositoryModelUnloadRequest(model_name=model),
        lambda _: None,
    ),
}


def inference(model: str, inputs: Tensors, seconds: float | None) -> Any:
    """A request that the server gives up, too, when its time is over."""
    request = _wire.build_request(model, inputs)
    if seconds is not None:
        request.parameters["timeout"].int64_param = max(int(seconds * 1e6), 1)
    return request


def metadata(ask: Ask, url: str, admin_key: str | None) -> list[tuple[str, str]]:
    """The admin key for what needs it, if there is one; looked up at each call, because servers come and go."""
    if ask.what not in ("index", "load", "unload"):
        return []
    key = (admin_key or _admin_key.find(url) or "").strip()
    if not key.isascii() or not key.isprintable():
        raise ForbiddenError("the admin key has impossible characters: a key is printable ASCII")
    return [(_admin_key.METADATA, key)] if key else []
