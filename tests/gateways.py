"""Gateways of the tests: real processes on free ports."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trident_serving.launcher.local import free_ports


@dataclass(frozen=True)
class Gateway:
    """A gateway that answers.

    Attributes:
        process: of the command.
        log: the file with its access log and what it says on standard error.
    """

    port: int
    process: subprocess.Popen[str]
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def entries(self) -> list[dict[str, Any]]:
        """The access log."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, seconds: float = 60
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON of a request; a body makes it a POST."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"content-type": "application/json"} | (headers or {})
        request = urllib.request.Request(self.url + path, content, sent)
        try:
            with urllib.request.urlopen(request, timeout=seconds) as response:
                return response.status, _lower(response.headers), _json(response.read())
        except urllib.error.HTTPError as error:
            return error.code, _lower(error.headers), _json(error.read())

    def connect(self, seconds: float = 30) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=seconds)


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content.decode()


@contextlib.contextmanager
def running(log: Path, *triton: str, flags: tuple[str, ...] = (), ready: bool = True) -> Iterator[Gateway]:
    """A gateway in front of servers."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "trident_gateway", "--port", str(port), *flags]
    for address in triton:
        command += ["--triton", address]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True)
    gateway = Gateway(port, process, log)
    try:
        deadline = time.monotonic() + 30
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            with contextlib.suppress(OSError):
                if gateway.ask("/ready")[0] == 200 or not ready:
                    break
            time.sleep(0.05)
        yield gateway
    finally:
        process.terminate()
        process.wait(60)
