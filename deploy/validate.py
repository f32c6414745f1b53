"""Checks the production stack without a container engine: the compose file's schema, the Dockerfile's lint, and
the properties that the documents promise.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TOOLS = Path(sys.executable).parent
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
OLDEST_IMAGE = (26, 8)  # earlier servers crash on a request of very many chunks
BACKEND_FOLDER = "serving/trident_serving/_backends"
BACKENDS = ("trident_generator", "trident_postprocess", "trident_seq2seq", "trident_template", "trident_tokenizer")


def main() -> int:
    """Print every problem; returns the exit status."""
    problems = [*dockerfile_problems(DOCKERFILE.read_text()), *lint_problems()]
    services = compose_services()
    for name in ("trident", "trident-gpu"):
        problems += [f"service {name}: {problem}" for problem in service_problems(services[name])]
    devices = services["trident-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    runtime = services["trident-gpu"]["build"]["args"]["ONNXRUNTIME"]
    if not runtime.startswith("onnxruntime-gpu==") or not devices:
        problems.append("service trident-gpu must build onnxruntime-gpu and reserve a GPU")
    for problem in problems:
        print(f"deploy: {problem}", file=sys.stderr)
    return 1 if problems else 0


def compose_services() -> dict[str, Any]:
    """The services with every profile, as docker compose itself resolves them."""
    command = [str(TOOLS / "docker-compose"), "--profile", "gpu", "config", "--format", "json"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"deploy: docker-compose.yml is not valid: {run.stderr.strip()}")
    services: dict[str, Any] = json.loads(run.stdout)["services"]
    return services


def service_problems(service: dict[str, Any]) -> list[str]:
    """What a service lacks of what production needs."""
    mounts = [volume for volume in service.get("volumes", []) if volume["target"] == "/models"]
    holds = {
        "the model repository must be mounted read-only": bool(mounts) and bool(mounts[0].get("read_only")),
        "the file system must be read-only": service.get("read_only") is True,
        "it must not run as root": str(service.get("user", "0")).split(":")[0] != "0",
        "no-new-privileges is missing": "no-new-privileges:true" in service.get("security_opt", []),
        "every capability must be dropped": service.get("cap_drop") == ["ALL"],
        "shm_size must be 512 MiB at least": int(service.get("shm_size", 0)) >= 2**29,
        "a health check on /v2/health/ready is missing": "/v2/health/ready" in str(service.get("healthcheck")),
    }
    return [problem for problem, good in holds.items() if not good]


def dockerfile_problems(text: str) -> list[str]:
    """What the image lacks."""
    problems = []
    image = re.search(r"^FROM \S+/tritonserver:(\d+)\.(\d+)-py3$", text, re.MULTILINE)
    if not image or (int(image[1]), int(image[2])) < OLDEST_IMAGE:
        problems.append(f"the image must be tritonserver:{OLDEST_IMAGE[0]}.{OLDEST_IMAGE[1]:02}-py3 or later, pinned")
    if not re.search(r"^USER (?!root|0)\S+$", text, re.MULTILINE):
        problems.append("the image must not run as root")
    missing = [name for name in BACKENDS if not (ROOT / BACKEND_FOLDER / name / "model.py").exists()]
    if missing or f"{BACKEND_FOLDER}/trident_*" not in text:
        problems.append(f"the image must hold every backend of {BACKEND_FOLDER}")
    return problems


def lint_problems() -> list[str]:
    """The findings of hadolint."""
    command = [str(TOOLS / "hadolint"), str(DOCKERFILE)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return (run.stdout + run.stderr).splitlines() if run.returncode else []


if __name__ == "__main__":
    sys.exit(main())
