"""What the Helm chart names is there; `make charts` renders it and checks the rest."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from tests.conftest import ROOT

CHART = ROOT / "deploy/helm/trident"
TEMPLATES = {file.name: file.read_text() for file in (CHART / "templates").iterdir()}


def test_every_value_is_used_and_every_used_one_is_there() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    used = {match for text in TEMPLATES.values() for match in re.findall(r"[Vv]alues\.(\w+)", text)}
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert used == values.keys() == schema["properties"].keys() - {"global"}


def test_the_metrics_that_scale_are_exported() -> None:
    told = (ROOT / "docs/reference/metrics.md").read_text()
    names = {*re.findall(r"trident_\w+", TEMPLATES["autoscaling.yaml"])}
    assert names == {"trident_requests_waiting", "trident_requests_running", "trident_queue_time_seconds_bucket"}
    assert all(f"`{name.removesuffix('_bucket')}`" in told for name in names)


def test_the_paths_of_probes_and_routes_are_answered() -> None:
    from trident_gateway.door import FREE

    assert {*re.findall(r"path: (/\w+), port: http\b", TEMPLATES["gateway.yaml"])} == {"/health", "/ready"} <= {*FREE}


def test_the_chart_s_version_is_the_project_s() -> None:
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == version[1]


def test_the_images_hold_what_the_chart_starts() -> None:
    for name in ("Dockerfile", "Dockerfile.cpu"):
        text = (Path(ROOT) / "deploy" / name).read_text()
        assert "/opt/trident/venv/bin/python" in text
        assert "--require-hashes" in text
    packages = (Path(ROOT) / "deploy" / "requirements.txt").read_text()
    assert {"fastapi", "uvicorn", "onnxruntime"} <= {line.partition("==")[0] for line in packages.splitlines()}
