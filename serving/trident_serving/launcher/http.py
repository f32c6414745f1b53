"""HTTP to a server of this machine, never through the environment's proxies."""

from __future__ import annotations

import urllib.request
from typing import Any

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def open(url: str | urllib.request.Request, timeout: float) -> Any:
    """The response to a request, as a context manager.

    Args:
        timeout: seconds that connecting, and each wait for data, may take.

    Raises:
        OSError: no answer (`urllib.error.URLError`), or one with an error status (`urllib.error.HTTPError`).
    """
    return _opener.open(url, timeout=timeout)
