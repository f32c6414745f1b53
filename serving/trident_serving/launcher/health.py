"""`python -m trident_serving.launcher.health`: the health check of our images, which have no curl.

Status 0 if the server of this container is ready, else 1. It runs every ten seconds, so it imports little.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from http.client import HTTPException

from trident_serving.launcher import http

READY = "http://127.0.0.1:{port}/v2/health/ready"
SECONDS = 4.0  # less than the images' HEALTHCHECK --timeout


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask the HTTP port, 8000 or the first argument; returns the exit status."""
    port = next(iter(sys.argv[1:] if arguments is None else arguments), "8000")
    try:
        with http.open(READY.format(port=port), timeout=SECONDS):
            return 0
    except (OSError, HTTPException) as error:
        print(f"trident: not ready on port {port}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
