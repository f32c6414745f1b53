"""Finds the key of a server's administration: given, in the environment, or in the file of a server on this machine."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

ENVIRONMENT = "TRIDENT_ADMIN_KEY"
# gRPC metadata; Triton wants its own prefix before the name that its flag was given.
METADATA = "triton-grpc-protocol-trident-admin-key"
_LOOPBACK = re.compile(r"(?:localhost|127(?:\.\d+){3}|\[::1\]|0\.0\.0\.0):(\d+)")


def find(url: str) -> str | None:
    """The key for the server at this address; None where nothing tells it.

    Args:
        url: host and port of its gRPC endpoint.
    """
    if given := os.environ.get(ENVIRONMENT):
        return given
    match = _LOOPBACK.fullmatch(url)
    return _read(key_file(int(match[1]))) if match else None


def key_file(grpc_port: int) -> Path:
    """Where the launcher of a server of this user writes its key."""
    return Path(tempfile.gettempdir(), f"trident-{os.getuid()}", f"{grpc_port}.key")


def _read(file: Path) -> str | None:
    try:
        folder = file.parent.lstat()
        # A folder that somebody else made could hold a key of his choice, for a server of his.
        if folder.st_uid != os.getuid() or folder.st_mode & 0o077:
            return None
        return file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
