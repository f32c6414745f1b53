"""The key of a server's administration: who has it may load models, which is to run code as the server's user.

It is taken from the environment, or made at each start and written into a file that its owner alone can read:
`<temporary folder>/trident-<uid>/<gRPC port>.key`. The client looks there (`trident_client._admin_key`).
"""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path

from trident_serving.launcher.preflight import StartError

ENVIRONMENT = "TRIDENT_ADMIN_KEY"
# What the key is called in a request: an HTTP header; in gRPC Triton wants its own prefix before it.
HEADER = "trident-admin-key"
# What needs the key, by Triton's names.
RESTRICTED = ("model-repository", "shared-memory", "trace", "logging")


def default_file(grpc_port: int) -> Path:
    """Where the key of the server on this port lies."""
    return Path(tempfile.gettempdir(), f"trident-{os.getuid()}", f"{grpc_port}.key")


class AdminKey:
    """The key of one server.

    Args:
        file: where a key that is made is written.

    Raises:
        StartError: the key from the environment is none, or the file's folder belongs to somebody else.
    """

    def __init__(self, file: Path) -> None:
        self.file: Path | None = None
        given = os.environ.get(ENVIRONMENT)
        if given:
            if not given.isascii() or not given.isprintable() or len(given) < 16 or {*given} & {*' "=:,;'}:
                raise StartError(
                    f"{ENVIRONMENT} must be 16 characters or more, printable ASCII without spaces, quotes and =:,;"
                )
            self.value = given
            return
        self.value = secrets.token_urlsafe(32)
        _write(file, self.value)
        self.file = file

    def remove(self) -> None:
        """Remove the file, if there is one."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def _write(file: Path, value: str) -> None:
    folder = file.parent
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not folder.is_dir() or folder.is_symlink() or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise StartError(
                f"{folder} is not a folder that this user alone can read, so the admin key can't be written there: "
                f"remove it, or set {ENVIRONMENT}"
            )
        file.unlink(missing_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as output:
            output.write(value)
    except OSError as error:
        raise StartError(f"the admin key can't be written to {file}: {error.strerror}; set {ENVIRONMENT}") from None
