"""Keys and signatures of manifests, and whether a version is what was exported. Servers have the other half."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from trident_export.errors import StoreError
from trident_export.store.versions import Version
from trident_serving import artefacts, integrity, signatures
from trident_serving.artefacts import SIGNATURE
from trident_serving.errors import LoadError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def make_keys(file: Path) -> Path:
    """Write a private key, which only this user can read, and the public one beside it; returns the latter's file.

    Raises:
        StoreError: a file is there already, or cryptography is missing.
    """
    _require_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = file.with_name(f"{file.name}.pub")
    if public.exists():
        raise StoreError(f"{public} is there already: a new key would make its signatures worthless")
    key = Ed25519PrivateKey.generate()
    pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
    try:
        number = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise StoreError(f"{file} is there already: a new key would make its signatures worthless") from None
    with os.fdopen(number, "wb") as output:
        output.write(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, none))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return public


def sign(repository: Path, version: Version, key: Path) -> None:
    """Sign the manifest of a version, whose files are compared with it before.

    Raises:
        StoreError: the key can't be used, or the version is not what was exported.
    """
    private = _private_key(key)
    if not version.manifest.files:
        raise StoreError(
            f"version {version.number} of {version.manifest.name} has no checksums, as an older export "
            "has none: export it again"
        )
    if found := problem(repository, version, None):
        raise StoreError(found)
    path = artefacts.manifest_path(repository, version.manifest.name, version.number)
    signature = path.with_name(SIGNATURE)
    partial = signature.with_name(f"{SIGNATURE}.part")
    partial.write_bytes(private.sign(path.read_bytes()))
    partial.replace(signature)


def problem(repository: Path, version: Version, trusted: Path | None) -> str:
    """What is wrong with the files of a version; "": nothing.

    Args:
        trusted: public keys of which one must have signed it; None: no signature is asked for.
    """
    manifest = version.manifest
    if not manifest.files:
        return "there are no checksums: export the model again"
    try:
        if trusted is not None:
            signatures.trusted_manifest(repository, manifest.name, version.number, signatures.read_keys(trusted))
        for model in manifest.triton_models:
            folder = repository / model / str(version.number)
            integrity.check_files(folder, manifest.files_of(model), complete=True)
    except LoadError as error:
        return str(error)
    return ""


def _private_key(file: Path) -> Ed25519PrivateKey:
    _require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(file.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise StoreError(f"{file} is no Ed25519 private key in PEM form without a password: trident-export keygen")
    return key


def _require_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise StoreError("signatures need the package cryptography: pip install 'trident-serving[signing]'") from None
