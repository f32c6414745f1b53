"""What is loaded is what was exported: a version's files against its manifest, and the manifest against a signature.

The process that loads a model checks it, at every load. Where a server has trusted keys, an unsigned manifest is as bad
as a changed file. Models without a manifest, which Trident did not export, are checked by nobody.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from trident_serving import artefacts, signatures
from trident_serving.artefacts import MANIFEST, SIGNATURE, Manifest
from trident_serving.errors import LoadError

# The file of public keys that a server trusts; the launcher sets it for its backends.
TRUSTED_KEYS = "TRIDENT_TRUSTED_KEYS"


def check(folder: Path, environment: Mapping[str, str] = os.environ) -> None:
    """Check the files of a Triton model before it reads them.

    Args:
        folder: the version folder that is being loaded.

    Raises:
        LoadError: a file is missing or is not the one that was exported; or the server trusts keys and none of them
            has signed it.
    """
    manifest = _manifest(folder, environment)
    if manifest is not None:
        model = folder.parent.name.removesuffix(artefacts.TRIAL)
        check_files(folder, manifest.files_of(model), complete=TRUSTED_KEYS in environment)


def check_graphs(folder: Path, environment: Mapping[str, str] = os.environ) -> None:
    """Check the graphs of every variant beside a stage, for a server whose own backend reads them unchecked.

    Args:
        folder: the version folder of the stage.

    Raises:
        LoadError: see `check`.
    """
    manifest = _manifest(folder, environment)
    for model in manifest.triton_models if manifest is not None else ():
        if model.partition("_")[2].startswith("model"):
            beside = folder.parents[1] / model / folder.name
            if beside.is_dir():  # of the variants that this server has
                check_files(beside, manifest.files_of(model) if manifest else {}, complete=TRUSTED_KEYS in environment)


def check_files(folder: Path, expected: Mapping[str, str], *, complete: bool) -> None:
    """Compare the files of a folder with their digests.

    Args:
        expected: SHA-256 by the path in the folder.
        complete: whether a file that is not expected is an error.

    Raises:
        LoadError: the first difference.
    """
    for name, digest in expected.items():
        path = folder / name
        try:
            found = artefacts.digest(path)
        except OSError as error:
            raise LoadError(f"{path.resolve()} can't be read: {error.strerror}; export the model again") from None
        if found != digest:
            raise LoadError(
                f"{path.resolve()} is not the file that was exported: its SHA-256 begins with {found[:12]}, the "
                f"manifest says {digest[:12]}; put the file back, or export the model again"
            )
    if complete:
        found_names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
        if unknown := sorted(found_names - {*expected, MANIFEST, SIGNATURE}):
            raise LoadError(f"{(folder / unknown[0]).resolve()} is not in the signed manifest: remove it")


def _manifest(folder: Path, environment: Mapping[str, str]) -> Manifest | None:
    """The manifest of the version that a folder belongs to; None: it has none, and need not."""
    public = folder.parent.name.partition("_")[0]
    repository, version = folder.parents[1], int(folder.name)
    if trusted := environment.get(TRUSTED_KEYS):
        return signatures.trusted_manifest(repository, public, version, signatures.read_keys(Path(trusted)))
    return artefacts.read_manifest(repository, public, version)
