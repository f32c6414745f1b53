"""Starts a private server on free ports of this machine, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trident_serving.errors import StartError
from trident_serving.launcher import http
from trident_serving.launcher.admin_key import HEADER, default_file
from trident_serving.launcher.cli import READY

# Below the range from which Linux by default takes the ports of outgoing connections.
_OWN_PORTS = range(12_000, 32_000)


@dataclass(frozen=True)
class LocalServer:
    """A launcher process whose server is ready.

    Attributes:
        launcher: the process of `python -m trident_serving`.
        log: the file with its output and tritonserver's.
    """

    http_port: int
    grpc_port: int
    metrics_port: int
    launcher: subprocess.Popen[str]
    log: Path

    @property
    def grpc_url(self) -> str:
        """Host and port, as the client takes them."""
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        """Base URL of the HTTP endpoint."""
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def admin_headers(self) -> dict[str, str]:
        """The headers of an HTTP request that needs the admin key."""
        return {HEADER: default_file(self.grpc_port).read_text(encoding="ascii")}

    @property
    def metrics_url(self) -> str:
        """URL of the metrics."""
        return f"http://127.0.0.1:{self.metrics_port}/metrics"

    def stop(self) -> None:
        """Drain and stop the server; does nothing if the launcher has ended."""
        self.launcher.terminate()
        self.launcher.wait(60)
        if self.launcher.stdin is not None:
            self.launcher.stdin.close()


def free_ports(count: int) -> list[int]:
    """Different ports of 127.0.0.1 on which nothing listens now.

    The kernel gives none of them to an outgoing connection, so that a restarted server can have its port again.
    """
    found: list[int] = []
    while len(found) < count:
        port = secrets.choice(_OWN_PORTS)
        with contextlib.suppress(OSError), socket.socket() as one:
            one.bind(("127.0.0.1", port))
            found += [port] if port not in found else []
    return found


def start(
    repository: Path,
    log: Path,
    ready_seconds: float = 120,
    flags: Sequence[str] = (),
    ports: Sequence[int] | None = None,
    environment: Mapping[str, str] | None = None,
) -> LocalServer:
    """Start a server on free ports and wait until it is ready; the caller stops it.

    The server also ends with this process, even if this process is killed.

    Args:
        ports: of HTTP, gRPC and metrics, as one before it had; None: free ones.
        environment: variables beside those of this process.

    Raises:
        StartError: it ended or was not ready in time; the message holds its log.
    """
    ports = free_ports(3) if ports is None else ports
    command = [sys.executable, "-m", "trident_serving", "--until-stdin-closes", "--repository", str(repository), *flags]
    for flag, port in zip(("--http-port", "--grpc-port", "--metrics-port"), ports, strict=True):
        command += [flag, str(port)]
    with log.open("w") as output:
        launcher = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    server = LocalServer(ports[0], ports[1], ports[2], launcher, log)
    deadline = time.monotonic() + ready_seconds
    while time.monotonic() < deadline and launcher.poll() is None:
        with contextlib.suppress(OSError), http.open(f"{server.http_url}/v2/health/ready", timeout=2):
            if READY in log.read_text():  # the launcher, too, knows that it is, and watches it
                return server
        time.sleep(0.1)
    ended = launcher.poll()
    server.stop()
    why = f"was not ready within {ready_seconds:.0f} s" if ended is None else f"ended with status {ended}"
    raise StartError(f"the server {why}:\n{log.read_text()}")


@contextlib.contextmanager
def running(repository: Path, log: Path) -> Iterator[LocalServer]:
    """A server for the time of a `with` block."""
    server = start(repository, log)
    try:
        yield server
    finally:
        server.stop()
