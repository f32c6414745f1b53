"""The folder that a server reads: links to the models of a repository that can be loaded.

A repository also holds configs of models that were never exported. The server must not see them: a request to load one
would make it unready until its restart (2.51).
"""

from __future__ import annotations

from pathlib import Path

from trident_serving import artefacts


class RepositoryView:
    """Links to the models of one repository.

    Args:
        repository: the model repository.
        folder: where the links are made.
    """

    def __init__(self, repository: Path, folder: Path) -> None:
        self._repository = repository
        self.folder = folder
        folder.mkdir()
        self.refresh()

    def refresh(self) -> list[str]:
        """Link the models that can be loaded now, unlink those that are gone; returns all names, sorted."""
        names = set(artefacts.loadable(self._repository))
        linked = {link.name for link in self.folder.iterdir()}
        for name in names - linked:
            (self.folder / name).symlink_to(self._repository / name, target_is_directory=True)
        for name in linked - names:
            # An export removes the manifest while it installs; a model whose folder remains is still served.
            if not (self._repository / name).exists():
                (self.folder / name).unlink()
        return sorted(names)
