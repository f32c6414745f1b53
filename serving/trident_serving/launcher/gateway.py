"""The gateway beside the server: a process that is started once the server is ready, and ended before it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

from trident_serving.errors import StartError
from trident_serving.launcher import processes
from trident_serving.launcher.liveness import say
from trident_serving.launcher.server import ServerOptions

RESTARTS = 3  # in WINDOW_SECONDS, before it stays down
WINDOW_SECONDS = 300.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
TICK_SECONDS = 0.1


class Gateway:
    """Keeps one `trident-gateway` running.

    Args:
        options: of the server that it asks.
        port: of its own.
        keys: its file of API keys; None: everybody may ask.
        grace: seconds that running answers get at the end.

    Raises:
        StartError: the gateway is not installed, or other machines could ask it without a key.
    """

    def __init__(self, options: ServerOptions, port: int, keys: Path | None, grace: float) -> None:
        if importlib.util.find_spec("trident_gateway") is None or importlib.util.find_spec("fastapi") is None:
            raise StartError(
                "the gateway is not installed: pip install 'trident-serving[gateway]', or --gateway-port 0"
            )
        if keys is None and options.host not in LOOPBACK:
            raise StartError(
                f"{options.host} can be reached from other machines: give the gateway API keys (--gateway-keys FILE, "
                "made by trident-gateway key add), or --gateway-port 0"
            )
        self._command = [sys.executable, "-m", "trident_gateway"]
        self._command += ["--triton", f"{options.own_host}:{options.grpc_port}"]
        self._command += ["--host", options.host, "--port", str(port), "--grace", str(grace)]
        self._command += [] if keys is None else ["--keys", str(keys)]
        self._process: subprocess.Popen[bytes] | None = None
        self._starts: deque[float] = deque()
        self._down = False

    def tend(self) -> None:
        """Start the process, also where an earlier one has ended; one that ends again and again stays down."""
        if self._down or (self._process is not None and self._process.poll() is None):
            return
        now = time.monotonic()
        while self._starts and now - self._starts[0] > WINDOW_SECONDS:
            self._starts.popleft()
        if self._process is not None:
            self._down = len(self._starts) > RESTARTS
            then = "it stays down, the server goes on" if self._down else "it is started again"
            say(f"the gateway ended with status {self._process.returncode}; {then}")
            if self._down:
                return
        self._starts.append(now)
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches only the launcher
            preexec_fn=processes.before_server,
        )

    def end(self, seconds: float, at_once: threading.Event) -> None:
        """Let running answers end, and refuse new ones.

        Args:
            seconds: that this may take.
            at_once: ends it at once when it is set.
        """
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        deadline = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < deadline and not at_once.wait(TICK_SECONDS):
            pass
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
