"""The checks of the production stack pass, and each catches what it is for."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest

from deploy import validate
from tests.conftest import ROOT


def test_the_stack_passes() -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "deploy/validate.py")], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout + run.stderr) == (0, "")


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    return validate.compose_services()["trident"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("volumes", [{"target": "/models"}], "mounted read-only"),
        ("read_only", False, "file system must be read-only"),
        ("user", "0:0", "must not run as root"),
        ("security_opt", [], "no-new-privileges"),
        ("cap_drop", [], "capability"),
        ("shm_size", "67108864", "shm_size"),
        ("healthcheck", {"test": ["NONE"]}, "health check"),
    ],
)
def test_each_property_is_checked(service: dict[str, Any], key: str, value: object, message: str) -> None:
    assert validate.service_problems(service) == []
    changed = copy.deepcopy(service) | {key: value}
    problems = validate.service_problems(changed)
    assert len(problems) == 1
    assert message in problems[0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tritonserver:26.08-py3", "tritonserver:24.10-py3", "26.08"),
        ("tritonserver:26.08-py3", "tritonserver:latest", "26.08"),
        ("USER 1000:1000", "USER root", "root"),
        ("_backends/trident_*", "_backends/trident_generator", "every backend"),
    ],
)
def test_the_dockerfile_is_checked(old: str, new: str, message: str) -> None:
    text = validate.DOCKERFILE.read_text()
    assert validate.dockerfile_problems(text) == []
    assert old in text
    problems = validate.dockerfile_problems(text.replace(old, new))
    assert len(problems) == 1
    assert message in problems[0]
