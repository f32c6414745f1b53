"""The admin key of a server. A caller with the key may load models, and so run code as the server's user.

The launcher takes the key from the environment, or makes one at each start and writes it into a file that only its
user can read: `<temporary folder>/trident-<uid>/<gRPC port>.key`. The client looks there (`trident_client._admin_key`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
import tempfile
from pathlib import Path

from trident_serving.errors import StartError

ENVIRONMENT = "TRIDENT_ADMIN_KEY"
# The name of the key in a request: an HTTP header. In gRPC, Triton wants its own prefix before it.
HEADER = "trident-admin-key"
# The protocols that need the key, by Triton's names.
RESTRICTED = ("model-repository", "shared-memory", "trace", "logging")


def default_file(grpc_port: int) -> Path:
    """The file with the key of the server on this port."""
    return Path(tempfile.gettempdir(), f"trident-{os.getuid()}", f"{grpc_port}.key")


class AdminKey:
    """The key of one server.

    Args:
        file: where to write a new key; None: `default_file`, whose folder is created.
        grpc_port: the server's gRPC port.

    Attributes:
        value: the key.
        file: the file that holds it; None: the key comes from the environment.

    Raises:
        StartError: the environment's key is not valid, the folder belongs to another user, or the file can't be
            written.
    """

    def __init__(self, file: Path | None, grpc_port: int) -> None:
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
        if file is None:
            file = default_file(grpc_port)
            private_folder()
        _write(file, self.value)
        self.file = file

    def remove(self) -> None:
        """Remove the file, if it is still this key's."""
        if self.file is not None:
            with contextlib.suppress(OSError):
                if self.file.read_text(encoding="ascii") == self.value:
                    self.file.unlink()


def private_folder() -> Path:
    """The folder of this user's launchers, which is created if it is missing.

    Raises:
        StartError: another user made it, or others can read it.
    """
    folder = default_file(0).parent
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise StartError(f"{folder} can't be made: {error.strerror}; set {ENVIRONMENT}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise StartError(
            f"{folder} is not a folder that only this user can read, so the admin key can't be kept there: remove it, "
            f"or set {ENVIRONMENT}"
        )
    return folder


class PortLock:
    """A lock that is held while a server of this user starts or runs on a port: two starts would overwrite one key.

    Raises:
        StartError: another launcher holds it.
    """

    def __init__(self, port: int) -> None:
        self._file = (private_folder() / f"{port}.lock").open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise StartError(
                f"another server of this user starts or runs on port {port}: choose another port"
            ) from None

    def release(self) -> None:
        """Release the lock, so that the next launcher can start."""
        self._file.close()


def _write(file: Path, value: str) -> None:
    try:
        file.unlink(missing_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as output:
            output.write(value)
    except OSError as error:
        raise StartError(f"the admin key can't be written to {file}: {error.strerror}; set {ENVIRONMENT}") from None
