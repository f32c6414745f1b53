"""Warnings of the libraries that an export's user can do nothing about are not shown; `--verbose` shows all."""

from __future__ import annotations

import logging
import os
import sys
import warnings

# Read by the libraries when they are imported.
_VARIABLES = ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "DIFFUSERS_VERBOSITY")


def hush() -> None:
    """Let libraries speak of errors only; call it before they are imported."""
    for name in _VARIABLES:
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars would fill a log
    warnings.simplefilter("ignore")
    # Without a handler logging prints warnings of its own accord.
    logging.getLogger().addHandler(logging.NullHandler())


def hush_onnxruntime(verbose: bool) -> None:
    """The same for ONNX Runtime, whose severity is set by a call; it takes half a second to import."""
    if verbose:
        return
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
