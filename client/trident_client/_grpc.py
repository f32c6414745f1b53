"""What calls over gRPC have in common, whether they block or are awaited: options, requests, answers and errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import grpc.experimental

from trident_client import _admin_key, _wire
from trident_client import _protocol as pb
from trident_client._settings import Settings, is_loopback
from trident_client._steps import RESTRICTED, Ask, Tensors
from trident_client._types import ModelStatus

STREAM = f"/{pb.SERVICE}/ModelStreamInfer"
# That a stream may take to end behind an error. One that is cancelled instead, before its end has come, may leave the
# request in the server for ever (2.51), and with it the model, which then is never unloaded.
END_SECONDS = 2.0
CONNECT_MILLISECONDS = 10_000  # for one try; the next begins after a pause of at most half of that
# The thread that iterates over a stream receives its messages itself; else a thread of the channel passes them on.
ONE_THREAD = (grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1)
# Channels to one address share a connection otherwise, whatever it does.
OWN_CONNECTION = ("grpc.use_local_subchannel_pool", 1)


def channel_options(url: str, settings: Settings | None = None) -> list[tuple[str, Any]]:
    """The options of a channel to `url`; a server of this machine is never called through the environment's proxy."""
    settings = settings or Settings()
    limit = -1 if settings.max_message_bytes is None else settings.max_message_bytes
    options: list[tuple[str, Any]] = [
        ("grpc.max_send_message_length", limit),
        ("grpc.max_receive_message_length", limit),
        ("grpc.min_reconnect_backoff_ms", CONNECT_MILLISECONDS),
        ("grpc.initial_reconnect_backoff_ms", 500),
        ("grpc.max_reconnect_backoff_ms", CONNECT_MILLISECONDS // 2),
    ]
    if is_loopback(url):
        options.append(("grpc.enable_http_proxy", 0))
    if settings.keepalive is not None:
        # A ping that is not answered ends the connection, and with it the calls that wait for a frozen server.
        names = ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms")
        options += [
            (name, int(settings.keepalive * 1000)) for name in names
        ]  # newer ones go by the last, else a minute
    if (name := settings.certificates().server_name) is not None:
        options.append(("grpc.ssl_target_name_override", name))
    return options


def credentials(settings: Settings) -> grpc.ChannelCredentials:
    """What encrypts a channel."""
    tls = settings.certificates()
    files = (tls.ca, tls.key, tls.certificate)
    return grpc.ssl_channel_credentials(*(None if file is None else Path(file).read_bytes() for file in files))


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


def metadata(settings: Settings, ask: Ask | None = None, url: str = "") -> list[tuple[str, str]]:
    """The headers of a call, with the admin key where it is needed and known."""
    found = settings.outgoing()
    if ask is not None and ask.what in RESTRICTED and (key := settings.admin(url)):
        found.append((_admin_key.METADATA, key))
    return found
