"""Environments of other people's clients, made once in .cache, so that they share no package with ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

CACHE = ROOT / ".cache" / "clients"
PACKAGES = {
    "litellm": ("litellm==1.110.2",),
    "llama-index": ("llama-index-llms-nvidia-triton==0.6.0", "tritonclient[grpc]==2.73.0"),
    "aiperf": ("aiperf==0.13.0",),
}


def environment(client: str) -> Path:
    """The folder of an environment's commands; it is made where it is missing or has other packages.

    Raises:
        CalledProcessError: pip could not install a package.
    """
    folder, packages = CACHE / client, PACKAGES[client]
    made = folder / "packages.txt"
    if not made.exists() or made.read_text(encoding="utf-8").split() != list(packages):
        made.unlink(missing_ok=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin/python"), "-m", "pip", "install", "--quiet", *packages], check=True)
        made.write_text("\n".join(packages), encoding="utf-8")
    return folder / "bin"
