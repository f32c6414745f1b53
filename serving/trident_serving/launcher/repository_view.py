"""The folder that a server reads: links to the models of a repository that can be loaded.

A repository also holds configs of models that were never exported. The server must not see them: a request to load one
would make it unready until its restart (2.51). A server with trusted keys sees only versions that one of them has
signed, and their configs as they were signed, not as they lie in the repository.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trident_serving import artefacts, integrity, signatures
from trident_serving.artefacts import CONFIG, TRIAL
from trident_serving.errors import LoadError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


class RepositoryView:
    """Links to the models of one repository.

    Args:
        repository: the model repository.
        folder: where the links are made.
        trusted: keys of which one must have signed a model; None: no signature is asked for.

    Attributes:
        refused: why models of the repository are not in the view, by their public names.
        missing: Triton models that a manifest names and whose folders are gone, which are not in the view either:
            with a link into nothing, tritonserver refuses every load and unload, and its index.
    """

    def __init__(self, repository: Path, folder: Path, trusted: Sequence[Ed25519PublicKey] | None = None) -> None:
        self._repository = repository
        self._trusted = trusted
        self.folder = folder
        self.refused: dict[str, str] = {}
        self.missing: frozenset[str] = frozenset()
        folder.mkdir()
        self.refresh()

    def refresh(self) -> list[str]:
        """Link the models that can be loaded now, unlink those that are gone; returns all names, sorted."""
        if self._trusted is not None:
            return self._refresh_signed(self._trusted)
        names = set(artefacts.loadable(self._repository))
        self.missing = frozenset(name for name in names if not (self._repository / name).is_dir())
        linked = {link.name for link in self.folder.iterdir()}
        for name in names - self.missing - linked:
            if name.endswith(TRIAL):
                self._copy(name)
            else:
                (self.folder / name).symlink_to(self._repository / name, target_is_directory=True)
        for name in linked - (names - self.missing):
            if name.endswith(TRIAL):
                shutil.rmtree(self.folder / name)
            # An export removes the manifest while it installs; a model whose folder remains is still served.
            elif not (self._repository / name).exists():
                (self.folder / name).unlink()
        return sorted(names)

    def _copy(self, name: str) -> None:
        """Make a folder like a trial's, which may go at any time: tritonserver can't stand a link into nothing."""
        made, there = self.folder.with_name(f"{self.folder.name}-{name}"), self._repository / name
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        try:
            shutil.copyfile(there / CONFIG, made / CONFIG)
            for version in artefacts.served_versions(self._repository, name):
                target = (there / str(version)).resolve(strict=True)
                (made / str(version)).symlink_to(target, target_is_directory=True)
        except OSError:  # it has just gone
            shutil.rmtree(made)
        else:
            made.rename(self.folder / name)

    def _refresh_signed(self, keys: Sequence[Ed25519PublicKey]) -> list[str]:
        """Make a folder for each model that is signed, with its config and links to its versions."""
        refused = dict.fromkeys(
            artefacts.plain_models(self._repository), "it was not exported by Trident, so nobody has signed it"
        )
        names = set()
        for model in artefacts.loadable(self._repository):
            public = model.partition("_")[0]
            if model in refused or public in refused:
                continue
            try:
                self._link_signed(model, public, keys)
            except LoadError as error:
                if not model.endswith(TRIAL):  # of a version that nobody serves yet
                    refused[public] = str(error)
            else:
                names.add(model)
        for folder in self.folder.iterdir():
            if folder.name.endswith(TRIAL) and folder.name not in names:
                shutil.rmtree(folder)
        self.refused = refused
        return sorted(names)

    def _link_signed(self, model: str, public: str, keys: Sequence[Ed25519PublicKey]) -> None:
        versions = artefacts.served_versions(self._repository, model)
        text, shown = "", model
        model = model.removesuffix(artefacts.TRIAL)
        for version in versions:
            manifest = signatures.trusted_manifest(self._repository, public, version, keys)
            stored = self._repository / model / str(version) / CONFIG
            signed = manifest.files_of(model).get(CONFIG)
            if model not in manifest.triton_models or signed is None:
                raise LoadError(f"the signed manifest of version {version} of {public} has no config of {model}")
            integrity.check_files(stored.parent, {CONFIG: signed}, complete=False)
            text = stored.read_text(encoding="utf-8")
        folder = self.folder / shown
        folder.mkdir(exist_ok=True)
        config, text = folder / CONFIG, artefacts.renamed(artefacts.with_versions(text, versions), model, shown)
        if not config.exists() or config.read_text(encoding="utf-8") != text:
            config.with_suffix(".part").write_text(text, encoding="utf-8")
            config.with_suffix(".part").replace(config)
        # All of them: a trial's process reads the manifest of a version that is not served yet, and checks it itself.
        wanted = {path.name for path in (self._repository / shown).iterdir() if path.name.isdecimal()}
        for link in folder.iterdir():
            if link.name.isdecimal() and link.name not in wanted:
                link.unlink()
        for name in wanted:
            if not (folder / name).exists():
                (folder / name).symlink_to(self._repository / model / name, target_is_directory=True)
