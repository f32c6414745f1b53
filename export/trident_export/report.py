"""How a command ends: what the user can mend is a sentence, what is our defect is a traceback that says so."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from trident_export import disk
from trident_export.errors import ExportError
from trident_serving.errors import StartError

FAILED = 1
DEFECT = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 130
_DEFECT = "this is a defect of trident-export, not of what it was given: please report it with the text above"


def guarded(command: Callable[[], int], *folders: Path) -> int:
    """Run a command and print what went wrong; returns the exit status.

    Args:
        folders: that it may have written to.
    """
    try:
        return command()
    except KeyboardInterrupt:
        _print("interrupted; what was installed before is untouched")
        return INTERRUPTED
    except (ExportError, StartError) as error:  # the latter of a server that a command starts for itself
        _print(str(error))
        return FAILED
    except Exception as error:
        if (meaning := disk.explain(error, *folders)) is not None:
            _print(str(meaning))
            return FAILED
        defect(error)
        return DEFECT


def defect(error: BaseException, about: str = "") -> str:
    """Print a traceback with whose fault it is; returns a sentence for a summary."""
    traceback.print_exception(error)
    _print(f"{about}{_DEFECT}")
    return f"a defect of trident-export ({type(error).__name__}; the traceback is above)"


def _print(text: str) -> None:
    print(f"trident-export: {text}", file=sys.stderr, flush=True)
