"""Signed manifests: Ed25519 (RFC 8032) over the bytes of trident.json, 64 bytes beside it in trident.json.sig.

Keys are PEM files as OpenSSL writes them, so `openssl pkeyutl` makes and checks the same signatures. The manifest has
the digest of every file of a version, so who signs it signs all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trident_serving import artefacts
from trident_serving.artefacts import SIGNATURE, Manifest
from trident_serving.errors import KeyUnusable, LoadError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

_END = b"-----END PUBLIC KEY-----"


def read_keys(file: Path) -> list[Ed25519PublicKey]:
    """The public keys of a PEM file, one or more.

    Raises:
        KeyUnusable: it can't be read, holds anything else, or the package cryptography is missing.
    """
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError:
        raise KeyUnusable("signatures need the package cryptography: pip install 'trident-serving[signing]'") from None
    try:
        content = file.read_bytes()
    except OSError as error:
        raise KeyUnusable(f"the trusted keys {file} can't be read: {error.strerror}") from None
    found = []
    for block in content.split(_END)[:-1]:
        try:
            key = load_pem_public_key(block + _END + b"\n")
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PublicKey):
            raise KeyUnusable(f"{file} holds something that is no Ed25519 public key in PEM form")
        found.append(key)
    if not found:
        raise KeyUnusable(f"{file} holds no public key: trident-export keygen makes a pair")
    return found


def trusted_manifest(repository: Path, name: str, version: int, keys: Sequence[Ed25519PublicKey]) -> Manifest:
    """The manifest of a version, signed by one of the keys.

    Raises:
        LoadError: there is none, it is not signed by any of them, or it is another model's.
    """
    from cryptography.exceptions import InvalidSignature

    path = artefacts.manifest_path(repository, name, version)
    manifest = artefacts.read_manifest(repository, name, version)
    if manifest is None:
        raise LoadError(f"{name} has no signed manifest, and this server loads only what a trusted key has signed")
    try:
        signature, content = path.with_name(SIGNATURE).read_bytes(), path.read_bytes()
    except OSError:
        raise LoadError(
            f"version {version} of {name} is not signed, and this server loads only what a trusted key has signed: "
            f"trident-export sign {name}"
        ) from None
    for key in keys:
        try:
            key.verify(signature, content)
        except InvalidSignature:
            continue
        if manifest.name != name:
            raise LoadError(f"{path} is the manifest of {manifest.name}, not of {name}")
        return manifest
    raise LoadError(
        f"version {version} of {name} is not signed by a key that this server trusts, or {path} has changed since"
    )
