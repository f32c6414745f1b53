"""What images install has hashes and the tested versions; an audit that asked nobody does not call anything clean."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tools import audit, lock

from tests.conftest import ROOT


def test_the_lock_files_are_in_step() -> None:
    assert list(lock.problems()) == []
    packages = lock.pins((ROOT / lock.PACKAGES).read_text())
    assert packages["numpy"][0] == "1.26.4"
    assert packages["onnxruntime"][1] > 1
    assert "://" not in (ROOT / lock.PACKAGES).read_text() + (ROOT / lock.SERVERS).read_text()


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        (
            lock.PACKAGES,
            "numpy==1.26.4",
            "numpy==1.26.3",
            "requirements.txt has numpy 1.26.3, constraints.txt has 1.26.4",
        ),
        (lock.PACKAGES, "fastapi==", "slowapi==", "requirements.txt has no fastapi, which pyproject.toml asks for"),
        (lock.SERVERS, "--hash=sha256:", "--hash=md5:", "requirements-server.txt has no hash of nvidia-pytriton"),
        (lock.SERVERS, "nvidia-pytriton==0.7.0", "nvidia==0.7.0", "requirements-server.txt has no nvidia-pytriton"),
        ("constraints.txt", "\ngrpcio==1.85.1", "\ngrpcio==1.85.0", "has grpcio 1.85.1, constraints.txt has 1.85.0"),
        ("pyproject.toml", '"jinja2==3.1.6"', '"jinja2==3.1.7"', "has jinja2 3.1.6, pyproject.toml wants ==3.1.7"),
    ],
)
def test_each_difference_is_found(tmp_path: Path, file: str, old: str, new: str, problem: str) -> None:
    (tmp_path / "deploy").mkdir()
    for name in (lock.PACKAGES, lock.SERVERS, "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new))
    assert any(problem in each for each in lock.problems(tmp_path))


CLEAN = {"name": "a", "version": "1", "vulns": []}
BAD = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}, {"id": "X", "fix_versions": []}]}
SKIPPED = {"name": "c", "skip_reason": "Dependency not found on PyPI and could not be audited: c (1)"}


@pytest.mark.parametrize(
    ("packages", "status", "lines"),
    [
        ([CLEAN], audit.CLEAN, ["f: no known vulnerability in 1 packages"]),
        (
            [CLEAN, BAD, SKIPPED],
            audit.FOUND,
            ["f: b 2 has CVE-1, mended in 3", "f: b 2 has X, mended in no version yet"],
        ),
        ([CLEAN, SKIPPED], audit.UNKNOWN, ["f: no known vulnerability, but not audited: c"]),
        (
            [SKIPPED],
            audit.UNKNOWN,
            ["f: not audited, the advisories can't be reached: the index knows none of its packages"],
        ),
    ],
)
def test_what_an_audit_says(packages: list[dict[str, Any]], status: int, lines: list[str]) -> None:
    assert audit.vulnerabilities("f", {"dependencies": packages}, "") == (status, lines)


def test_an_audit_that_failed_is_not_clean() -> None:
    assert audit.vulnerabilities("f", None, "one\nNo route to host\n") == (
        audit.UNKNOWN,
        ["f: not audited: No route to host"],
    )


def test_new_secrets_are_told() -> None:
    known = {"a": ["1"], "gone": ["9"]}
    assert audit.new_secrets({"a": ["1"]}, known) == (audit.CLEAN, ["no tracked file has a new secret"])
    status, lines = audit.new_secrets({"a": ["1", "2"], "b": ["3"]}, known)
    assert status == audit.FOUND
    assert [line.split(":")[0] for line in lines] == ["a", "b"]
