"""Virtual environments of the tests, made by uv in a tenth of pip's time, from where pip takes its packages."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

# Settings of uv by those of pip that say the same.
_SETTINGS = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "cert": "SSL_CERT_FILE",
}


def make(python: str | Path, folder: Path) -> Path:
    """An empty virtual environment, in place of one that was not finished; its interpreter."""
    _uv("venv", "--clear", "--python", str(python), str(folder))
    return folder / "bin/python"


def install(python: Path, *requirements: str) -> None:
    """Install or upgrade packages."""
    options = ["--index-strategy", "unsafe-best-match"]  # as pip has it: the best version of any index
    _uv("pip", "install", "--upgrade", *options, "--python", str(python), *requirements)


def _uv(*words: str) -> None:
    command = [sys.executable, "-m", "uv", "--quiet", "--no-config", *words]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}:\n{done.stdout}{done.stderr}"


@cache
def _environment() -> dict[str, str]:
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    found = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        if name := _SETTINGS.get(key.rpartition(".")[2]):
            found[name] = " ".join(str(ast.literal_eval(value)).split())
    kept = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    return kept | found
