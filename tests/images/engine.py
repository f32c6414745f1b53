"""Podman, and base images under their names: the real ones where they are or can be had, else stand-ins.

A stand-in carries a real image's name, so it never enters this user's images: it has a storage of its own, in .cache.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.conftest import ROOT

DEBIAN = "docker.io/library/debian:bookworm-slim"
TRITON = "nvcr.io/nvidia/tritonserver:26.08-py3"
CACHE = ROOT / ".cache" / "images"


class NoEngine(RuntimeError):
    """Images can't be built or run here; the message says why."""


@dataclass(frozen=True)
class Podman:
    """A podman with a storage.

    Attributes:
        storage: folder of its images and containers; None: this user's own.
    """

    storage: Path | None = None

    @cached_property
    def _command(self) -> list[str]:
        if self.storage is None:
            return ["podman"]
        # A short path, since sockets lie there.
        name = hashlib.sha256(str(self.storage).encode()).hexdigest()[:8]
        return [
            "podman",
            f"--root={self.storage}",
            f"--runroot={Path(tempfile.gettempdir()) / f'trident-images-{name}'}",
        ]

    def __call__(self, *arguments: str, timeout: float = 900) -> str:
        """What a command prints on its standard output.

        Raises:
            AssertionError: it failed; the message has what it printed.
        """
        run = self.try_(*arguments, timeout=timeout)
        assert run.returncode == 0, f"podman {' '.join(arguments)}:\n{run.stdout[-3000:]}{run.stderr[-3000:]}"
        return run.stdout.strip()

    def try_(self, *arguments: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        """Run a command that may fail."""
        CACHE.mkdir(parents=True, exist_ok=True)
        config = CACHE / "containers.conf"
        config.write_text("[containers]\ndefault_ulimits = []\n")  # a machine may forbid to raise them
        environment = os.environ | {"CONTAINERS_CONF": str(config)}
        command = [*self._command, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)

    def has(self, image: str) -> bool:
        """Whether an image is there."""
        return self.try_("image", "exists", image).returncode == 0

    def build(self, dockerfile: str, tag: str) -> None:
        """Build an image from the repository's root.

        Where this machine's pip needs certificates of its own, the build gets them by mounts that leave nothing behind.
        """
        options = ["--format=docker", "--isolation=chroot", "--network=host", "--pull=never"]  # OCI has no HEALTHCHECK
        if bundle := os.environ.get("PIP_CERT"):
            config = CACHE / "pip.conf"
            config.write_text("[global]\ncert = /etc/pip-certificates.pem\n")
            options += [f"--volume={bundle}:/etc/pip-certificates.pem:ro", f"--volume={config}:/etc/pip.conf:ro"]
        self("build", *options, f"--file={ROOT / dockerfile}", f"--tag={tag}", str(ROOT), timeout=1800)


def engine(images: Sequence[str] = (DEBIAN, TRITON)) -> Podman:
    """A podman that has the base images.

    Raises:
        NoEngine: there is no podman that works, or the base images can neither be had nor be made.
    """
    if shutil.which("podman") is None:
        raise NoEngine("podman is not installed")
    own = Podman()
    if (run := own.try_("info")).returncode:
        raise NoEngine(f"podman does not work here: {run.stderr.strip().splitlines()[-1]}")
    if all(own.has(image) or own.try_("pull", "--quiet", image, timeout=3600).returncode == 0 for image in images):
        return own
    private = Podman(CACHE / "storage")
    if not private.has(DEBIAN):
        _debian(private)
    private.build("tests/images/tritonserver.Dockerfile", TRITON)
    return private


def _debian(podman: Podman) -> None:
    """Stands in for Debian's image: what debootstrap calls minimal."""
    if shutil.which("debootstrap") is None or os.geteuid():
        raise NoEngine(f"{DEBIAN} can't be pulled, and to make a stand-in takes debootstrap and root")
    folder = CACHE / "debian"
    shutil.rmtree(folder, ignore_errors=True)
    command = ["debootstrap", "--variant=minbase", "bookworm", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if run.returncode:
        raise NoEngine(f"{DEBIAN} can't be pulled, and debootstrap failed: {(run.stdout + run.stderr)[-500:]}")
    for name in ("var/cache/apt/archives", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
    archive = CACHE / "debian.tar"
    subprocess.run(["tar", "--directory", str(folder), "--create", "--file", str(archive), "."], check=True)
    podman("import", str(archive), DEBIAN)
    archive.unlink()
    shutil.rmtree(folder)


# What production gives a container, and no more: docker-compose.yml has the same, with a larger /dev/shm.
RESTRICTIONS = (
    "--read-only",
    "--read-only-tmpfs=false",
    "--tmpfs=/tmp:size=256m",
    "--cap-drop=all",
    "--security-opt=no-new-privileges",
    "--ulimit=host",
)


@dataclass(frozen=True)
class Container:
    """A container on ports of 127.0.0.1 that the system picked.

    Attributes:
        name: its name.
        ports: what its ports 8000 to 8002 are on this machine.
    """

    podman: Podman
    name: str
    ports: dict[int, int]

    @classmethod
    def run(cls, podman: Podman, image: str, name: str, repository: Path, *options: str) -> Container:
        """Start one, with the model repository read-only; it need not be ready."""
        podman.try_("rm", "--force", name)
        publish = [f"--publish=127.0.0.1::{port}" for port in (8000, 8001, 8002)]
        volume = f"--volume={repository}:/models:ro"
        podman("run", "--detach", f"--name={name}", *publish, volume, *RESTRICTIONS, *options, image)
        return cls(podman, name, {}).with_ports()

    def with_ports(self) -> Container:
        """The same container with the ports that it has now; without ports if it does not run."""
        found = self.podman.try_("port", self.name).stdout.split("\n")
        pairs = (line.split(" -> ") for line in found if " -> " in line)
        ports = {int(inside.split("/")[0]): int(outside.rsplit(":", 1)[1]) for inside, outside in pairs}
        return Container(self.podman, self.name, ports)

    def python(self, code: str) -> str:
        """What a Python program prints in the container."""
        return self.podman("exec", self.name, "/opt/trident/venv/bin/python", "-c", code)

    def state(self) -> tuple[str, int]:
        """Status and exit status."""
        status, code = self.podman("inspect", "--format={{.State.Status}} {{.State.ExitCode}}", self.name).split()
        return status, int(code)

    def healthy(self) -> bool:
        """Whether the image's health check passes."""
        return self.podman.try_("healthcheck", "run", self.name).returncode == 0

    def logs(self) -> str:
        """What it printed so far."""
        run = self.podman.try_("logs", self.name)
        return run.stdout + run.stderr

    def wait_healthy(self, seconds: float = 120) -> float:
        """How many seconds it took until it was healthy.

        Raises:
            AssertionError: it ended, or took longer.
        """
        begin = time.monotonic()
        while time.monotonic() < begin + seconds:
            if self.healthy():
                return time.monotonic() - begin
            assert self.state()[0] == "running", f"{self.state()}\n{self.logs()[-3000:]}"
            time.sleep(0.5)
        raise AssertionError(f"not healthy after {seconds:.0f} s\n{self.logs()[-3000:]}")

    def wait_ended(self, seconds: float) -> int:
        """Its exit status.

        Raises:
            AssertionError: it still runs.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            status, code = self.state()
            if status == "exited":
                return code
            time.sleep(0.2)
        raise AssertionError(f"it still runs after {seconds:.0f} s\n{self.logs()[-3000:]}")

    def remove(self) -> None:
        """End and remove it."""
        self.podman.try_("rm", "--force", "--time=0", self.name)
