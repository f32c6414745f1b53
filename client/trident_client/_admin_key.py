"""Finds the admin key of a server: in the environment, or in the file of a server on this machine."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

ENVIRONMENT = "TRIDENT_ADMIN_KEY"
# The key of the gRPC metadata: Triton's prefix, then the name that the launcher gave to Triton's flag.
METADATA = "triton-grpc-protocol-trident-admin-key"
_LOOPBACK = re.compile(r"(?:localhost|127(?:\.\d+){3}|\[::1\]|0\.0\.0\.0):(\d+)")


def find(url: str) -> str | None:
    """The key for the server at this address; None if there is none.

    Args:
        url: host and port of its gRPC endpoint.
    """
    if given := os.environ.get(ENVIRONMENT):
        return given
    match = _LOOPBACK.fullmatch(url)
    return _read(key_file(int(match[1]))) if match else None


def key_file(grpc_port: int) -> Path:
    """The file to which the launcher of this user's server writes its key."""
    return Path(tempfile.gettempdir(), f"trident-{os.getuid()}", f"{grpc_port}.key")


def _read(file: Path) -> str | None:
    try:
        folder = file.parent.lstat()
        # Another user could have made the folder, with a key of that user's own server.
        if folder.st_uid != os.getuid() or folder.st_mode & 0o077:
            return None
        return file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
