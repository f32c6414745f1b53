"""One gRPC channel to a server: requests, health, and which models it has loaded."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
import grpc.experimental
import numpy as np
from numpy.typing import NDArray

from trident_client import _admin_key, _wire
from trident_client import _protocol as pb
from trident_client._errors import ForbiddenError, NotFoundError, UnavailableError, translated
from trident_client._sending import send_all
from trident_client._types import Health, ModelStatus

if TYPE_CHECKING:
    from typing_extensions import Self  # typing's is Python 3.11's

_POLL_SECONDS = 0.05
# A server sees a new model within a second of its export.
_EXPORTED_SECONDS = 2.0
_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # The thread that iterates over a stream receives its messages itself; else a thread of the channel passes them on.
    (grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1),
)


class Connection:
    """The channel to a server, and what every call needs; `Client` adds the calls.

    Args:
        url: host and port of the server's gRPC endpoint.
        timeout: seconds that a call without its own timeout may take; None: no limit.
        admin_key: for `models`, `load` and `unload`; None: TRIDENT_ADMIN_KEY, or the key that a server of the same
            user on this machine has written to a file.
    """

    def __init__(
        self, url: str = "localhost:8001", *, timeout: float | None = None, admin_key: str | None = None
    ) -> None:
        self._url = url
        self._timeout = timeout
        self._admin_key = admin_key
        self._only: dict[str, str] = {}
        self._channel = grpc.insecure_channel(url, options=channel_options(url))
        self._stub = pb.Stub(self._channel)
        # Triton's stream may carry many requests; each of our calls sends one.
        self._stream_infer = self._channel.unary_stream(
            f"/{pb.SERVICE}/ModelStreamInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def models(self, *, timeout: float | None = None) -> list[ModelStatus]:
        """The models that the server has loaded or tried to load, by name.

        Raises:
            ForbiddenError: the admin key is missing or wrong.
            TridentError: see its other subclasses.
        """
        index = self._index(timeout)
        statuses = [
            ModelStatus(model.name, model.version, model.state, model.reason) for model in index.models if model.state
        ]
        return sorted(statuses, key=lambda status: status.name)

    def unverified(self, model: str, *, timeout: float | None = None) -> str:
        """Why the fidelity gate refused a model that was installed by force; "" for any other.

        Raises:
            NotFoundError: the server has not loaded such a model.
            TridentError: see its other subclasses.
        """
        with translated():
            answer = self._stub.ModelConfig(pb.ModelConfigRequest(name=model), timeout=self._deadline(timeout))
        return str(answer.config.parameters["unverified"].string_value)

    def adapters(self, model: str, *, timeout: float | None = None) -> list[str]:
        """The adapters of a model, which `lora_name` chooses from; [] of one that has none.

        Raises:
            NotFoundError: the server has not loaded such a model.
            TridentError: see its other subclasses.
        """
        with translated():
            answer = self._stub.ModelConfig(pb.ModelConfigRequest(name=model), timeout=self._deadline(timeout))
        named = str(answer.config.parameters["adapters"].string_value)
        return named.split(",") if named else []

    def load(self, model: str, *, timeout: float | None = None) -> list[str]:
        """Load a model that was exported since the server started, or that was exported again.

        The other models keep answering, and so does a generator until its new version is loaded. An ensemble that is
        loaded is unloaded first, because a new tokenizer before an old graph gives wrong answers; its requests get
        NotFoundError or UnavailableError until it is loaded again.

        Returns:
            The Triton models that were loaded: its stages and variants, the public ones last.

        Raises:
            NotFoundError: the repository has no such model, or it was never exported.
            ForbiddenError: the admin key is missing or wrong.
            TridentError: see its other subclasses; a model that can't be loaded says why.
        """
        self._only.clear()
        names = self._triton_models(model, timeout)
        public = [name for name in names if not name.startswith(_roles(model))]
        if len(public) < len(names):
            self._unload(public, timeout)
        with translated():
            for name in names:
                request = pb.RepositoryModelLoadRequest(model_name=name)
                self._stub.RepositoryModelLoad(request, timeout=self._deadline(timeout), metadata=self._metadata())
        return names

    def unload(self, model: str, *, timeout: float | None = None) -> list[str]:
        """Unload a model, once its running requests are answered; it stays in the repository.

        Returns:
            The Triton models that were unloaded.

        Raises:
            NotFoundError: the repository has no such model.
            ForbiddenError: the admin key is missing or wrong.
            TridentError: see its other subclasses.
        """
        self._only.clear()
        names = self._triton_models(model, timeout)[::-1]
        self._unload(names, timeout)
        return names

    def health(self, *, timeout: float | None = None) -> Health:
        """Whether the server answers; one that can't be reached is not live, which is no error."""
        try:
            with translated():
                live = self._stub.ServerLive(pb.ServerLiveRequest(), timeout=self._deadline(timeout)).live
                ready = self._stub.ServerReady(pb.ServerReadyRequest(), timeout=self._deadline(timeout)).ready
        except UnavailableError:
            return Health(live=False, ready=False)
        return Health(live=live, ready=ready)

    def _only_model(self, task: str, timeout: float | None) -> str:
        """The public name of the server's only model of a task; the client asks the server once and keeps the name.

        Raises:
            NotFoundError: there is none, or there are several; the message names them.
        """
        if task not in self._only:
            with translated():
                statistics = self._stub.ModelStatistics(pb.ModelStatisticsRequest(), timeout=self._deadline(timeout))
                # Names with "_" are stages and variants.
                names = sorted({model.name for model in statistics.model_stats if "_" not in model.name})
                tasks = {name: self._task(name, timeout) for name in names}
            found = [name for name, its in tasks.items() if its == task]
            if len(found) != 1:
                served = ", ".join(f"{name} ({its})" for name, its in tasks.items() if its)
                several = f"serves {' and '.join(found)} for {task}" if found else f"serves no model for {task}"
                raise NotFoundError(f"the server {several}: name one with model=; it serves {served or 'none'}")
            self._only[task] = found[0]
        return self._only[task]

    def _task(self, model: str, timeout: float | None) -> str:
        request = pb.ModelConfigRequest(name=model)
        config = self._stub.ModelConfig(request, timeout=self._deadline(timeout)).config
        return str(config.parameters["task"].string_value)

    def _unload(self, names: Sequence[str], timeout: float | None) -> None:
        """Unload models and wait until their running requests are answered."""
        with translated():
            for name in names:
                request = pb.RepositoryModelUnloadRequest(model_name=name)
                self._stub.RepositoryModelUnload(request, timeout=self._deadline(timeout), metadata=self._metadata())
        while any(status.name in names and status.state != "UNAVAILABLE" for status in self.models(timeout=timeout)):
            time.sleep(_POLL_SECONDS)

    def _triton_models(self, model: str, timeout: float | None) -> list[str]:
        """The Triton models of a public one, stages first. In a name, "_" comes only before a stage or a variant."""
        deadline = time.monotonic() + _EXPORTED_SECONDS
        while True:
            names = {entry.name for entry in self._index(timeout).models if entry.name.partition("_")[0] == model}
            if model in names:
                return sorted(names, key=lambda name: (not name.startswith(_roles(model)), name))
            if time.monotonic() > deadline:
                raise NotFoundError(f"the server's repository has no exported model {model!r}")
            time.sleep(_POLL_SECONDS)

    def _index(self, timeout: float | None) -> Any:
        with translated():
            return self._stub.RepositoryIndex(
                pb.RepositoryIndexRequest(), timeout=self._deadline(timeout), metadata=self._metadata()
            )

    def _metadata(self) -> list[tuple[str, str]]:
        """The admin key, if there is one; looked up at each call, because servers come and go."""
        key = (self._admin_key or _admin_key.find(self._url) or "").strip()
        if not key.isascii() or not key.isprintable():
            raise ForbiddenError("the admin key has impossible characters: a key is printable ASCII")
        return [(_admin_key.METADATA, key)] if key else []

    def _deadline(self, timeout: float | None) -> float | None:
        return self._timeout if timeout is None else timeout

    def _rows(
        self,
        model: str,
        columns: Mapping[str, Sequence[str]],
        truncate: bool | None,
        batch_size: int,
        timeout: float | None,
        options: Mapping[str, NDArray[Any]],
    ) -> list[dict[str, NDArray[Any]]]:
        """Texts in requests of at most `batch_size` rows, sent at once; an option is repeated for each row."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {batch_size}")
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the lists must have the same length, found {lengths}")
        requests = []
        for start in range(0, max(lengths.values()), batch_size):
            inputs: dict[str, NDArray[Any]] = {
                name: _wire.texts(list(column[start : start + batch_size]))[:, None] for name, column in columns.items()
            }
            rows = len(next(iter(inputs.values())))
            if truncate is not None:
                inputs["truncate"] = np.full((rows, 1), truncate)
            inputs |= {name: np.repeat(value[None], rows, axis=0) for name, value in options.items()}
            requests.append(inputs)
        return self._infer(model, requests, timeout)

    def _infer(
        self, model: str, requests: Sequence[Mapping[str, NDArray[Any]]], timeout: float | None
    ) -> list[dict[str, NDArray[Any]]]:
        def start(index: int, seconds: float | None) -> Any:
            request = _wire.build_request(model, requests[index])
            if seconds is not None:
                request.parameters["timeout"].int64_param = max(int(seconds * 1e6), 1)
            return self._stub.ModelInfer.future(request, timeout=seconds)

        with translated():
            responses = send_all(start, len(requests), self._deadline(timeout))
        return [_wire.parse_response(response) for response in responses]


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


def _roles(model: str) -> tuple[str, ...]:
    """The beginnings of the names of an ensemble's stages."""
    return tuple(f"{model}_{role}" for role in ("tokenizer", "model", "postprocess"))
