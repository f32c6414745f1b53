"""Paths that make is given reach the commands whole, whatever they hold."""

from __future__ import annotations

import itertools
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _make(folder: Path, *arguments: str) -> str:
    """What make prints in a folder that has all that is built first."""
    (folder / ".venv").mkdir(exist_ok=True)
    (folder / "models").mkdir(exist_ok=True)
    for name in ("pyproject.toml", "constraints.txt", ".venv/.ready"):
        (folder / name).touch()
    command = ["make", "--no-print-directory", "-C", str(folder), "-f", str(ROOT / "Makefile"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.parametrize(
    "target", ["serve", "export", "check", "quality", "bench", "load", "load-check", "soak", "upstream"]
)
def test_a_path_is_one_argument(tmp_path: Path, target: str) -> None:
    values = {"--models-file": "my  models.toml", "--repository": "it's mine; $x", "--source": "~/a model"}
    named = dict(zip(("MODELS_FILE", "REPOSITORY", "SOURCE"), values.values(), strict=True))
    given = [f"{name}={value.replace('$', '$$')}" for name, value in named.items()]
    printed = _make(tmp_path, "-n", target, *given, "CHECKOUT=/a b/server")
    words = [shlex.split(line) for line in printed.splitlines()]
    found = [pair for line in words for pair in itertools.pairwise(line) if pair[0] in values]
    assert {value for _, value in found} <= {*values.values()}
    assert all(value == values[name] for name, value in found)
    assert (target == "upstream") == (not found)
    assert any("/a b/server" in line for line in words) == (target == "upstream")
    if target == "export":
        assert len(found) == 3
        assert "~/'a model'" in printed  # the shell knows whose home it is


def test_clean_removes_nothing_else(tmp_path: Path) -> None:
    """A repository of the name `my models` emptied the folder `my`."""
    (tmp_path / "my" / "thesis").mkdir(parents=True)
    (version := tmp_path / "my models" / "m" / "1").mkdir(parents=True)
    (kept := tmp_path / "my models" / "m" / "config.pbtxt").touch()
    _make(tmp_path, "clean", "REPOSITORY=my models")
    assert (tmp_path / "my" / "thesis").exists()
    assert kept.exists()
    assert not version.exists()
