"""The server process: its command line and environment, its start and its end. `supervisor` decides when."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from trident_serving import artefacts, integrity, runtime_folder, signatures
from trident_serving.errors import KeyUnusable, StartError
from trident_serving.launcher import (
    admin_key,
    backend_folder,
    preflight,
    processes,
    server_log,
    shared_memory,
    temporary_folder,
)
from trident_serving.launcher.admin_key import AdminKey, PortLock
from trident_serving.launcher.control import Control
from trident_serving.launcher.installation import Installation
from trident_serving.launcher.repository_view import RepositoryView
from trident_serving.launcher.server_log import ServerLog
from trident_serving.launcher.temporary_folder import TemporaryFolder
from trident_serving.runtime_folder import RuntimeFolder

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

SHARED_MEMORY = Path("/dev/shm")
# The server's time to end once no request is in flight; open streams without a request must not delay it.
END_SECONDS = 2.0
# So long after one was made, the server may still change who may read its regions of shared memory.
NEW_REGION_SECONDS = 2.0
EVERY_ADDRESS = ("0.0.0.0", "::", "")


@dataclass(frozen=True)
class ServerOptions:
    """How to start a server.

    Attributes:
        repository: the model repository.
        host: the address to listen on.
        admin_key_file: where the admin key is written; None: where the client looks for it.
        verbose: let the server log each model and request, not only warnings and errors.
        ready_seconds: seconds that loading may take.
        gateway_port: of the gateway beside the server; 0: there is none.
        trusted_keys: a file of public keys of which one must have signed a model; None: no signature is asked for.
    """

    repository: Path
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    admin_key_file: Path | None = None
    verbose: bool = False
    ready_seconds: float = 600.0
    gateway_port: int = 0
    trusted_keys: Path | None = None

    @property
    def ports(self) -> dict[str, int]:
        """The ports by the options that name them."""
        return {
            "--http-port": self.http_port,
            "--grpc-port": self.grpc_port,
            "--metrics-port": self.metrics_port,
        } | ({"--gateway-port": self.gateway_port} if self.gateway_port else {})

    @property
    def own_host(self) -> str:
        """The address at which this machine reaches the server."""
        return "127.0.0.1" if self.host in EVERY_ADDRESS else f"[{self.host}]" if ":" in self.host else self.host

    @property
    def grpc_address(self) -> str:
        """Where this machine reaches the server's gRPC: host and port."""
        return f"{self.own_host}:{self.grpc_port}"


class Server:
    """One tritonserver with the folders that it needs; a context manager that ends it.

    Attributes:
        control: calls to it with the admin key.
        runtime: the records of its backend processes.
        view: the models that it sees.

    Raises:
        StartError: something that it needs is missing; nothing was started.
    """

    def __init__(self, installation: Installation, options: ServerOptions) -> None:
        self.options = options
        environment = check_machine(options)
        if not options.repository.is_dir():
            what = "is no folder" if options.repository.exists() else "does not exist"
            raise StartError(
                f"{options.repository} {what}: name a model repository with --repository (REPOSITORY of make)"
            )
        models = artefacts.loadable(options.repository)
        if not models:
            raise StartError(f"{options.repository} holds no exported model: run make export")
        shared_memory.check(len(models))
        # A given key needs no folder, and overwrites no other key.
        self._lock = None if os.environ.get(admin_key.ENVIRONMENT) else PortLock(options.grpc_port)
        try:
            self._key = AdminKey(options.admin_key_file, options.grpc_port)
        except StartError:
            if self._lock is not None:
                self._lock.release()
            raise
        self._folder = TemporaryFolder()
        self._process: subprocess.Popen[bytes] | None = None
        self._log: ServerLog | None = None
        self._shm_changed, self._shm_until = 0, 0.0
        try:
            self._prepare(installation, environment, self._folder.path)
        except BaseException:
            self.close()
            raise

    def _prepare(self, installation: Installation, environment: dict[str, str], folder: Path) -> None:
        options = self.options
        backends = backend_folder.prepare(folder / "backends", installation)
        self.control = Control(f"http://{options.own_host}:{options.http_port}", self._key.value, folder / "models")
        self.runtime = RuntimeFolder(folder / "runtime")
        trusted = None if options.trusted_keys is None else trusted_keys(options.trusted_keys)
        self.view = RepositoryView(options.repository, folder / "models", trusted)
        if not self.view.refresh():
            raise StartError("; ".join(self.view.refused.values()))
        remove_abandoned_shared_memory()
        temporary_folder.remove_abandoned()
        self._shm_prefix = f"trident-{os.getpid()}-{options.http_port}-"
        self._environment = environment | {
            runtime_folder.ENVIRONMENT: str(self.runtime.folder),
            runtime_folder.ADDRESS_ENVIRONMENT: options.grpc_address,
        }
        self._environment.pop(admin_key.ENVIRONMENT, None)
        self._environment.pop(integrity.TRUSTED_KEYS, None)
        if options.trusted_keys is not None:
            self._environment[integrity.TRUSTED_KEYS] = str(options.trusted_keys.resolve())
        flags = known_flags(installation, environment)
        self._command = _command(installation, options, backends, self.view.folder, flags, self._shm_prefix)
        self._command += [*_restrictions(flags, self._key.value), *trace_flags(flags, environment)]

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(0.0)
        self.close()

    @property
    def pid(self) -> int:
        """The process that was started last."""
        assert self._process is not None
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The status with which the process ended; None while it runs."""
        return self._process.poll() if self._process is not None else None

    def start(self) -> list[str]:
        """Start the process, with the models that can be loaded now; returns their names, those of `view.missing` too.

        What a promotion that was killed has left is not loaded.

        Call it on the launcher's main thread: the process ends with the thread that started it.
        """
        models = [model for model in self.view.refresh() if not model.endswith(artefacts.TRIAL)]
        self.runtime.clear()
        self._process = subprocess.Popen(
            [*self._command, *(f"--load-model={model}" for model in models if model not in self.view.missing)],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches only the launcher, which drains the server
            preexec_fn=processes.before_server,
        )
        assert self._process.stdout is not None
        everything = self.options.verbose or server_log.has_gpu()
        self._log = ServerLog(self._process.stdout, everything=everything)
        return models

    def hide_key(self) -> None:
        """Take the admin key out of the server's command line, once the server has read it."""
        if self.status is None:
            processes.hide_argument(self.pid, self._key.value)

    def close_shared_memory(self) -> None:
        """Keep other users from reading the regions through which requests and answers pass.

        Triton makes them readable for every user of the machine, whatever the umask. Its own processes have them open.
        """
        with contextlib.suppress(OSError):
            changed, now = SHARED_MEMORY.stat().st_mtime_ns, time.monotonic()
            if changed != self._shm_changed:
                self._shm_changed, self._shm_until = changed, now + NEW_REGION_SECONDS
            elif now > self._shm_until:
                return
        for region in SHARED_MEMORY.glob(f"{self._shm_prefix}*"):
            with contextlib.suppress(FileNotFoundError):
                if region.stat().st_mode & 0o077:
                    region.chmod(0o600)

    def end(self, seconds: float) -> None:
        """End every process of the server.

        Args:
            seconds: that it gets to end by itself; 0: it is killed at once.
        """
        if self._process is None:
            return
        if seconds and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        # The backends' processes share the server's group; a normal end has none left.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._log is not None:
            self._log.join(1.0)
        remove_shared_memory(self._shm_prefix)
        temporary_folder.remove_servers(self._folder.path)

    def close(self) -> None:
        """Remove the server's folder and the file of its key."""
        self._key.remove()
        if self._lock is not None:
            self._lock.release()
        self._folder.close()


def trusted_keys(file: Path) -> Sequence[Ed25519PublicKey]:
    """The keys of which one must have signed a model.

    Raises:
        StartError: the file has none, or cryptography is missing.
    """
    try:
        return signatures.read_keys(file)
    except KeyUnusable as error:
        raise StartError(str(error)) from None


def check_machine(options: ServerOptions) -> dict[str, str]:
    """Check interpreter, packages, libpython and ports; returns the server's environment.

    Raises:
        StartError: something is missing.
    """
    preflight.check_python()
    environment = _environment(preflight.libpython_folder())
    preflight.check_packages(environment)
    preflight.check_ports(options.host, options.ports)
    return environment


def remove_shared_memory(prefix: str, folder: Path = SHARED_MEMORY) -> None:
    """Remove the regions of a server; a killed backend leaves its own behind."""
    for region in folder.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


def remove_abandoned_shared_memory(folder: Path = SHARED_MEMORY) -> None:
    """Remove the regions of launchers that no longer run; a killed launcher leaves its own behind."""
    for region in folder.glob("trident-*"):
        launcher = region.name.split("-")[1]
        if launcher.isdecimal() and not Path("/proc", launcher).exists():
            region.unlink(missing_ok=True)


def _environment(libpython: Path | None) -> dict[str, str]:
    """The server's environment: the stub takes the first python3 on the PATH, and libpython from the loader's path."""
    environment = dict(os.environ)
    # numpy's threads would spin while ONNX Runtime's work: pooling took four milliseconds of processor time with them.
    environment.setdefault("OPENBLAS_NUM_THREADS", "1")
    environment["ORT_DISABLE_TELEMETRY"] = "1"
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
    installation: Installation,
    options: ServerOptions,
    backends: Path,
    models: Path,
    flags: Iterable[str],
    shm_prefix: str,
) -> list[str]:
    wanted = {
        "--model-repository": str(models),
        "--backend-directory": str(backends),
        "--model-control-mode": "explicit",
        "--exit-on-error": "false",  # the other models are served if one can't be loaded
        "--strict-readiness": "true",
        "--http-address": options.host,
        "--http-port": str(options.http_port),
        "--grpc-address": options.host,
        "--grpc-port": str(options.grpc_port),
        # Clients and proxies may ask every 2 s whether a silent connection lives; by default the third time ends it.
        "--grpc-http2-min-recv-ping-interval-without-data": "2000",
        "--grpc-keepalive-permit-without-calls": "true",
        "--metrics-address": options.host,
        "--metrics-port": str(options.metrics_port),
        "--exit-timeout-secs": "5",  # no request is in flight when the launcher ends it
        "--log-info": str(options.verbose).lower(),
        "--cache-directory": str(installation.caches) if installation.caches else "",
        # Two servers on one machine must not share a region.
        "--backend-config": f"python,shm-region-prefix-name={shm_prefix}",
    }
    if not server_log.has_gpu():
        wanted |= {"--allow-gpu-metrics": "false", "--pinned-memory-pool-byte-size": "0"}
    known = set(flags)
    return [str(installation.binary), *(f"{flag}={value}" for flag, value in wanted.items() if value and flag in known)]


def trace_flags(flags: Iterable[str], environment: Mapping[str, str]) -> list[str]:
    """What makes tritonserver send its spans to OpenTelemetry's endpoint; [] where the environment names none.

    A request that carries a `traceparent`, as the gateway's and the client's do, goes on in that trace.
    """
    base = environment.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").rstrip("/")
    url = environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or (f"{base}/v1/traces" if base else "")
    if not url or "--trace-config" not in flags:
        return []
    settings = ("mode=opentelemetry", "level=TIMESTAMPS", "rate=1", f"opentelemetry,url={url}")
    service = f"opentelemetry,resource=service.name={environment.get('OTEL_SERVICE_NAME') or 'tritonserver'}"
    return [f"--trace-config={setting}" for setting in (*settings, service)]


def _restrictions(flags: Iterable[str], key: str) -> Sequence[str]:
    """The flags that make protocols need the admin key.

    Raises:
        StartError: this server can't restrict protocols, so that any caller could run code on it.
    """
    wanted = ("--http-restricted-api", "--grpc-restricted-protocol")
    if missing := [flag for flag in wanted if flag not in set(flags)]:
        raise StartError(f"this tritonserver has no {' and no '.join(missing)}: use 2.46 (24.05) or later")
    return [f"{flag}={','.join(admin_key.RESTRICTED)}:{admin_key.HEADER}={key}" for flag in wanted]
