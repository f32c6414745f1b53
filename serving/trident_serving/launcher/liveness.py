"""Whether a server answers: asked over HTTP and, while that is silent, over gRPC too.

The HTTP threads of tritonserver 2.51 read a request's JSON in a time that grows with the square of its members. Callers
who send such requests keep all of them busy for minutes, while gRPC and the models answer as before. To start the
server again then would take all running answers away.
"""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trident_serving.launcher.control import Control

CARE_SECONDS = 1.0
HEALTH_SECONDS = 3.0
_LIVE = "/inference.GRPCInferenceService/ServerLive"
_YES = b"\x08\x01"  # a ServerLiveResponse whose `live` is true
_OPTIONS = (
    ("grpc.enable_http_proxy", 0),  # a server of this machine
    # A connection of its own, which no earlier failure keeps waiting.
    ("grpc.use_local_subchannel_pool", 1),
)


class Liveness:
    """A thread that asks a server every second whether it answers.

    A server whose HTTP is silent is silent itself only where gRPC is, too. Both are asked at the same time, from the
    second look on, so that a server that hangs is found as soon as by HTTP alone.

    Args:
        control: asks over HTTP.
        grpc_address: host and port of the server's gRPC.

    Attributes:
        silent_seconds: for how long the server has answered neither. It adds up the time of the looks, not the clock's,
            so that a machine that was suspended does not count as a silent server.
        grpc_only: whether gRPC answers and HTTP does not.
    """

    def __init__(self, control: Control, grpc_address: str) -> None:
        self._control = control
        self._grpc_address = grpc_address
        self._stopping = threading.Event()
        self.silent_seconds = 0.0
        self.grpc_only = False
        self._told = False
        threading.Thread(target=self._ask, name="health", daemon=True).start()

    def stop(self) -> None:
        """Tell the thread to end."""
        self._stopping.set()

    def _ask(self) -> None:
        http_silent = False
        while not self._stopping.wait(CARE_SECONDS):
            asked = time.monotonic()
            if not http_silent:
                http, over_grpc = self._control.live(HEALTH_SECONDS), False
            else:
                with _GrpcQuestion(self._grpc_address, HEALTH_SECONDS) as question:
                    http = self._control.live(HEALTH_SECONDS)
                    over_grpc = not http and question.answered()
            http_silent = not http
            if http or over_grpc:
                self.silent_seconds = 0.0
            else:
                self.silent_seconds += CARE_SECONDS + min(time.monotonic() - asked, HEALTH_SECONDS)
            self._tell(http, over_grpc)

    def _tell(self, http: bool, over_grpc: bool) -> None:
        """Say once that HTTP is silent, and once that it is so no more."""
        self.grpc_only = over_grpc
        if over_grpc and not self._told:
            self._told = True
            say(
                "HTTP does not answer, gRPC does: tritonserver goes on. Look for callers that send JSON with very many "
                "members, or many large bodies, over HTTP: their requests keep its HTTP threads busy"
            )
        elif http and self._told:
            self._told = False
            say("HTTP answers again")


class _GrpcQuestion:
    """One `ServerLive` on its way; a context manager that ends it."""

    def __init__(self, address: str, seconds: float) -> None:
        import grpc  # some 15 MB, which a launcher whose server answers over HTTP does without

        self._error: type[Exception] = grpc.RpcError
        self._channel = grpc.insecure_channel(address, _OPTIONS)
        self._call: Any = self._channel.unary_unary(_LIVE).future(b"", timeout=seconds)

    def __enter__(self) -> _GrpcQuestion:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def answered(self) -> bool:
        """Wait for the answer: whether the server says that it lives."""
        try:
            return bool(self._call.result() == _YES)
        except self._error:
            return False


def say(text: str) -> None:
    """Print a line of the launcher to standard error."""
    print(f"trident: {text}", file=sys.stderr, flush=True)
