"""The folder that a server reads: links to the models of a repository that can be loaded.

A repository also holds configs of models that were never exported. A server that is asked to load one is not ready any
more until it is started anew (2.51), so it does not see them.
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
        """Add what can be loaded by now, remove what has gone; returns the names of all."""
        names = set(artefacts.loadable(self._repository))
        linked = {link.name for link in self.folder.iterdir()}
        for name in names - linked:
            (self.folder / name).symlink_to(self._repository / name, target_is_directory=True)
        for name in linked - names:
            # An export takes the manifest away while it installs; a folder that is still there is still served.
            if not (self._repository / name).exists():
                (self.folder / name).unlink()
        return sorted(names)
