"""The packages of the extra `cli`: imported only by the commands that need them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

PACKAGES = ("prometheus_client", "prompt_toolkit", "rich", "shtab")


@contextlib.contextmanager
def installed(what: str) -> Iterator[None]:
    """Say what to install where the import in a `with` block fails.

    Args:
        what: needs the import.

    Raises:
        ModuleNotFoundError: one of the extra's packages isn't there.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in PACKAGES:
            raise
        raise ModuleNotFoundError(
            f"{what} needs {error.name}: pip install 'trident-serving[cli]'", name=error.name
        ) from None
