"""The server process: its command line and environment, from start to drained stop."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from trident_serving.launcher import backend_folder, preflight, shared_memory
from trident_serving.launcher.installation import Installation
from trident_serving.launcher.preflight import StartError

SHARED_MEMORY = Path("/dev/shm")
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class ServerOptions:
    """How to start a server.

    Attributes:
        repository: the model repository.
        models: Triton models to load at the start.
        drain_seconds: how long requests in flight may take after the signal to stop.
        verbose: let the server log each model and request, not warnings and errors alone.
        ready_seconds: how long loading may take.
    """

    repository: Path
    models: tuple[str, ...]
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    drain_seconds: int = 30
    verbose: bool = False
    ready_seconds: float = 600.0

    @property
    def ports(self) -> dict[str, int]:
        """The ports by the names that `make serve` gives them."""
        return {
            "HTTP_PORT": self.http_port,
            "GRPC_PORT": self.grpc_port,
            "METRICS_PORT": self.metrics_port,
        }


class Server:
    """One running tritonserver; a context manager that stops it.

    Raises:
        StartError: something that it needs is missing; nothing was started.
    """

    def __init__(self, installation: Installation, options: ServerOptions) -> None:
        self.options = options
        self._stopped = False
        environment = check_machine(options)
        if not options.models:
            raise StartError(f"{options.repository} holds no exported model: run make export")
        self._folder = tempfile.TemporaryDirectory(prefix="trident-")
        backends = backend_folder.prepare(Path(self._folder.name), installation)
        remove_abandoned_shared_memory()
        self._shm_prefix = f"trident-{os.getpid()}-{options.http_port}-"
        flags = known_flags(installation, environment)
        command = _command(installation, options, backends, flags, self._shm_prefix)
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which drains the server
            preexec_fn=_die_with_parent,
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_ready(self) -> None:
        """Return when every model is loaded.

        Raises:
            StartError: the server ended or did not become ready in time.
        """
        url = f"http://{self.options.host}:{self.options.http_port}/v2/health/ready"
        deadline = time.monotonic() + self.options.ready_seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise StartError(
                    f"tritonserver ended with status {self.process.returncode} while it loaded the models: "
                    "its messages above say why"
                )
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as response:
                if response.status == 200:
                    return
            time.sleep(0.1)
        raise StartError(f"the models were not ready within {self.options.ready_seconds:.0f} s")

    def stop(self) -> None:
        """Drain and end every process of the server; a second call does nothing."""
        if self._stopped:
            return
        self._stopped = True
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(self.options.drain_seconds + 10)
            # The backends' processes share the server's group; a normal end has none left.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        finally:
            self._folder.cleanup()
            remove_shared_memory(self._shm_prefix)


def check_machine(options: ServerOptions) -> dict[str, str]:
    """Check interpreter, packages, libpython and ports; returns the server's environment.

    Raises:
        StartError: something is missing.
    """
    preflight.check_python()
    preflight.check_numpy()
    environment = _environment(preflight.libpython_folder())
    preflight.check_ports(options.host, options.ports)
    shared_memory.check(len(options.models))
    return environment


def remove_shared_memory(prefix: str, folder: Path = SHARED_MEMORY) -> None:
    """Remove the regions of a server: a backend that did not end by itself leaves its own behind."""
    for region in folder.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


def remove_abandoned_shared_memory(folder: Path = SHARED_MEMORY) -> None:
    """Remove the regions of launchers that are no more: one that is killed outright can't do it."""
    for region in folder.glob("trident-*"):
        launcher = region.name.split("-")[1]
        if launcher.isdecimal() and not Path("/proc", launcher).exists():
            region.unlink(missing_ok=True)


def _die_with_parent() -> None:
    """A launcher that is killed outright must not leave a server behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _environment(libpython: Path | None) -> dict[str, str]:
    """The stub takes the first python3 on the PATH, and loads libpython from the loader's path."""
    environment = dict(os.environ)
    # numpy's own threads would spin beside ONNX Runtime's: pooling took four milliseconds of processor time with them.
    environment.setdefault("OPENBLAS_NUM_THREADS", "1")
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    if libpython is not None:
        known = environment.get("LD_LIBRARY_PATH")
        environment["LD_LIBRARY_PATH"] = os.pathsep.join([str(libpython), *([known] if known else [])])
    return environment


def known_flags(installation: Installation, environment: dict[str, str]) -> frozenset[str]:
    """The flags of this version: an unknown one is fatal, and versions differ."""
    run = subprocess.run(
        [str(installation.binary), "--help"], env=environment, capture_output=True, text=True, check=False
    )
    words = (run.stdout + run.stderr).split()
    return frozenset(word for word in words if word.startswith("--"))


def _command(
    installation: Installation, options: ServerOptions, backends: Path, flags: Iterable[str], shm_prefix: str
) -> list[str]:
    wanted = {
        "--model-repository": str(options.repository),
        "--backend-directory": str(backends),
        "--model-control-mode": "explicit",
        "--http-address": options.host,
        "--http-port": str(options.http_port),
        "--grpc-address": options.host,
        "--grpc-port": str(options.grpc_port),
        "--metrics-address": options.host,
        "--metrics-port": str(options.metrics_port),
        "--exit-timeout-secs": str(options.drain_seconds),
        "--log-info": str(options.verbose).lower(),
        "--cache-directory": str(installation.caches) if installation.caches else "",
        # Two servers on one machine must not share a region.
        "--backend-config": f"python,shm-region-prefix-name={shm_prefix}",
    }
    known = set(flags)
    command = [str(installation.binary)]
    command += [f"{flag}={value}" for flag, value in wanted.items() if value and flag in known]
    command += [f"--load-model={model}" for model in options.models]
    return command
