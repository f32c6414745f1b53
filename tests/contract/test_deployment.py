"""The checks of the production stack pass, and each catches what it is for."""

from __future__ import annotations

import copy
import re
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
def services() -> dict[str, Any]:
    return validate.compose_services()


def published(address: str | None, *ports: int) -> list[dict[str, Any]]:
    return [{"target": port} | ({"host_ip": address} if address else {}) for port in ports]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("build", {"dockerfile": "Dockerfile"}, "built from Dockerfile"),
        (
            "volumes",
            [{"target": "/models"}, {"target": "/keys", "read_only": True}],
            "repository must be mounted read-only",
        ),
        ("read_only", False, "file system must be read-only"),
        ("user", "0:0", "must not run as root"),
        ("security_opt", [], "no-new-privileges"),
        ("cap_drop", [], "capability"),
        ("cap_add", ["SYS_ADMIN"], "capability"),
        ("shm_size", "67108864", "shm_size"),
        ("healthcheck", {"test": ["NONE"]}, "health check"),
        ("stop_grace_period", "45s", "longer than the drain's 45 s"),
        ("ports", published(None, 8000, 8001, 8002, 8080), "only on 127.0.0.1"),
        ("ports", published("0.0.0.0", 8000, 8001, 8002, 8080), "only on 127.0.0.1"),
        ("ports", [*published("127.0.0.1", 8000, 8001, 8080), *published(None, 8002)], "only on 127.0.0.1"),
        ("ports", published("127.0.0.1", 8000, 8001, 8080), "only on 127.0.0.1"),
        ("command", ["--gateway-port", "8080"], "API keys"),
        ("volumes", [{"target": "/models", "read_only": True}, {"target": "/keys"}], "keys must be mounted read-only"),
        ("networks", {"default": None}, "under the name server"),
        ("environment", {"TRIDENT_ADMIN_KEY": "secret"}, "no admin key"),
    ],
)
def test_each_property_is_checked(services: dict[str, Any], key: str, value: object, message: str) -> None:
    for name, dockerfile in validate.SERVICES.items():
        assert validate.service_problems(services[name], dockerfile) == []
        changed = copy.deepcopy(services[name]) | {key: value}
        problems = validate.service_problems(changed, dockerfile)
        assert len(problems) == 1
        assert message in problems[0]


def test_an_operator_decides_where_ports_are_published(services: dict[str, Any]) -> None:
    opened = validate.compose_services({"TRIDENT_BIND": "0.0.0.0", "TRIDENT_ADMIN_KEY": "key"})
    for name in validate.SERVICES:
        assert validate.opened_problems(opened[name]) == []
        assert validate.opened_problems(services[name]) == [
            "TRIDENT_BIND must decide where every port is published",
            "TRIDENT_ADMIN_KEY must be passed on",
        ]
    ports = validate.compose_services({"TRIDENT_BIND": "10.0.0.7", "TRIDENT_GRPC_PORT": "9001"})["trident"]["ports"]
    found = [(port["host_ip"], port["published"], port["target"]) for port in ports]
    assert found == [
        ("10.0.0.7", "8000", 8000),
        ("10.0.0.7", "9001", 8001),
        ("10.0.0.7", "8002", 8002),
        ("10.0.0.7", "8080", 8080),
    ]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("image", "prom/prometheus:latest", "a version"),
        ("image", "prom/prometheus", "a version"),
        ("read_only", False, "file system must be read-only"),
        ("user", "0", "must not run as root"),
        ("security_opt", [], "no-new-privileges"),
        ("cap_drop", [], "capability"),
        ("ports", published("0.0.0.0", 9090), "only on 127.0.0.1"),
        ("volumes", [{"type": "bind", "source": str(ROOT / "deploy")}], "mounted read-only"),
        ("volumes", [{"type": "bind", "source": str(ROOT / "absent"), "read_only": True}], "must be there"),
    ],
)
def test_each_property_of_what_watches_is_checked(
    services: dict[str, Any], key: str, value: object, message: str
) -> None:
    for name in validate.WATCHERS:
        assert validate.watcher_problems(services[name]) == []
        (problem,) = validate.watcher_problems(copy.deepcopy(services[name]) | {key: value})
        assert message in problem


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("GF_AUTH_ANONYMOUS_ORG_ROLE", "Admin"),
        ("GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION", "false"),
        ("GF_AUTH_BASIC_ENABLED", "true"),
        ("GF_AUTH_DISABLE_LOGIN_FORM", "false"),
        ("GF_PLUGINS_PREINSTALL_DISABLED", "false"),
    ],
)
def test_nobody_can_log_in_to_grafana(services: dict[str, Any], variable: str, value: str) -> None:
    grafana = copy.deepcopy(services["grafana"])
    assert validate.grafana_problems(grafana) == []
    grafana["environment"][variable] = value
    assert len(validate.grafana_problems(grafana)) == 1


def test_make_up_starts_all_that_watches() -> None:
    wanted = re.search(r"^WATCHERS \?= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert wanted is not None
    assert tuple(wanted[1].split()) == validate.WATCHERS


@pytest.mark.parametrize(("text", "expected"), [("45s", 45), ("1m0s", 60), ("1h1m1.5s", 3661.5), ("500ms", 0)])
def test_durations(text: str, expected: float) -> None:
    assert validate.seconds(text) == expected


BOTH = [
    ("USER 1000:1000", "USER root", "root"),
    ("USER 1000:1000", "USER 0:1000", "root"),
    ("USER 1000:1000\n", "", "root"),
    ('CMD ["/opt/trident/venv/bin/python", "-m", "trident_serving.launcher.health"]', "CMD curl", "HEALTHCHECK"),
    ("HEALTHCHECK --interval", "# HEALTHCHECK --interval", "HEALTHCHECK"),
    ('"--host", "0.0.0.0"', '"--host", "127.0.0.1"', "ENTRYPOINT"),
    ('"--restarts", "0"', '"--restarts", "3"', "ENTRYPOINT"),
    ('ENTRYPOINT ["/opt', 'ENTRYPOINT exec ["/opt', "ENTRYPOINT"),
    ("TRIDENT_CONTAINER=1", "TRIDENT_CONTAINER=", "TRIDENT_CONTAINER"),
    ("ORT_DISABLE_TELEMETRY=1", "ORT_DISABLE_TELEMETRY=0", "TELEMETRY"),
    ("--no-build-isolation", "--no-build-isolation .[export]", "exporter"),
    ("--require-hashes --requirement", "--requirement", "compare hashes"),
    ("--no-deps --no-build-isolation", "--no-build-isolation", "compare hashes"),
    ("sbom > sbom.cdx.json", "sbom", "sbom.cdx.json"),
]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        *BOTH,
        ("tritonserver:26.08-py3", "tritonserver:24.10-py3", "26.08"),
        ("tritonserver:26.08-py3", "tritonserver:latest", "26.08"),
        ("_backends/trident_*", "_backends/trident_generator", "every backend"),
        ("-m venv --without-pip", "-m venv", "ensurepip"),
    ],
)
def test_the_dockerfile_is_checked(old: str, new: str, message: str) -> None:
    check(validate.native_problems, validate.NATIVE.read_text(), old, new, message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        *BOTH,
        ("FROM debian:bookworm-slim\n", "FROM debian:trixie-slim\n", "slim Debian"),  # Python 3.13
        ("FROM debian:bookworm-slim\n", "FROM debian\n", "slim Debian"),
        ("requirements-server.txt \\", "requirements.txt \\", "requirements-server.txt"),
        ("--require-hashes --no-deps", "--no-deps", "compare hashes"),
    ],
)
def test_the_small_dockerfile_is_checked(old: str, new: str, message: str) -> None:
    check(validate.small_problems, validate.SMALL.read_text(), old, new, message)


def check(problems_of: Any, text: str, old: str, new: str, message: str) -> None:
    assert problems_of(text) == []
    assert old in text
    problems = problems_of(text.replace(old, new))
    assert len(problems) == 1
    assert message in problems[0]
