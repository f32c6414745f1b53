"""`python -m trident_serving.launcher.health`: what a container's health check runs, where the image has no curl.

Status 0 if the server of this container is ready, else 1. It imports the standard library alone: it runs every ten
seconds.
"""

from __future__ import annotations

import http.client
import sys
import urllib.request
from collections.abc import Sequence

READY = "http://127.0.0.1:{port}/v2/health/ready"
SECONDS = 4.0  # less than the images' HEALTHCHECK --timeout


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask the HTTP port, 8000 or the one that is given; returns the exit status."""
    port = next(iter(sys.argv[1:] if arguments is None else arguments), "8000")
    # Without the proxy that the environment may name: this is our own loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(READY.format(port=port), timeout=SECONDS):
            return 0
    except (OSError, http.client.HTTPException) as error:
        print(f"trident: not ready on port {port}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
