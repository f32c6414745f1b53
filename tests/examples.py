"""Runs the programs of examples/ as a person does: each is a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples"


def run(name: str, *arguments: str, text: str = "", status: int = 0, **environ: str) -> tuple[str, str]:
    """What an example prints, on standard output and on standard error.

    Args:
        name: its file in examples/.
        text: its standard input.
        status: the exit status that it must have.
        environ: variables of its environment.

    Raises:
        AssertionError: it ended with another status.
    """
    command = ["bash"] if name.endswith(".sh") else [sys.executable]
    done = subprocess.run(
        [*command, str(FOLDER / name), *arguments],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=ROOT,
        env=os.environ | environ,
    )
    assert done.returncode == status, f"{done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout, done.stderr
