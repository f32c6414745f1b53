"""Finds the models that a server should have loaded and could not, in Triton's repository index; needs no server.

Triton goes on past a failed model with --exit-on-error=false. It answers on its ports once every model of the start is
loaded or has failed, so its first index is complete. A failed model is UNAVAILABLE, with a reason; an ensemble that
waits for a failed stage has neither state nor reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trident_serving import artefacts
from trident_serving.artefacts import Manifest
from trident_serving.errors import ModelError

READY = "READY"
UNLOADING = "UNLOADING"
_LONGEST_REASON = 300
# Triton's names of a status before the reason; they say nothing about the cause.
_STATUSES = ("Internal: ", "Invalid argument: ", "Not found: ", "Unavailable: ", "Unknown: ", "Unsupported: ")
# Exceptions of our backends that a user can act on; their sentences need no class name.
_KINDS = ("ValueError: ", *(f"{kind.__name__}: " for kind in ModelError.__subclasses__()))


@dataclass(frozen=True)
class IndexEntry:
    """A model in Triton's repository index.

    Attributes:
        name: of the Triton model.
        state: "READY", "UNAVAILABLE", "LOADING" or "UNLOADING"; "" where Triton never tried to load it.
        reason: why it is not ready, several lines long where Python raised it.
        served: whether another version of it answers.
        version: the one that this is about.
        unloading: versions that are being unloaded.
    """

    name: str
    state: str = ""
    reason: str = ""
    served: bool = False
    version: str = "1"
    unloading: tuple[str, ...] = ()

    @property
    def weight(self) -> int:
        """How much it says of a model among the entries of its versions: a failure before a version that answers."""
        return 3 if self.failed else 2 if self.state == READY else 0 if self.reason == "unloaded" else 1

    @property
    def failed(self) -> bool:
        """Whether it could not be loaded."""
        return self.state == "UNAVAILABLE" and self.reason not in ("", "unloaded")


@dataclass(frozen=True)
class Failure:
    """A model of the repository that is not served, or not in all of its variants.

    Attributes:
        name: the public name, by which it is exported.
        missing: public Triton models that can't be called.
        cause: the Triton model that failed, a stage or the model itself.
        reason: Triton's, in one line.
    """

    name: str
    missing: tuple[str, ...]
    cause: str
    reason: str

    def sentence(self, repository: Path) -> str:
        """What failed, why, and what to do."""
        about = self.reason if self.cause in self.missing else f"its stage {self.cause}: {self.reason}"
        return (
            f"{', '.join(self.missing)} can't be loaded ({about}): mend it, or remove "
            f"{artefacts.version_folder(repository, self.name)} and run make export MODEL={self.name}"
        )


def entries(index: Iterable[Mapping[str, str]]) -> list[IndexEntry]:
    """The entries of the JSON that `POST /v2/repository/index` answers: of each model the version that says most.

    A version that has made room for another one, whichever of the two is newer, stays in the index as "unloaded".
    """
    found: dict[str, IndexEntry] = {}
    for item in index:
        entry = IndexEntry(
            item["name"], item.get("state", ""), item.get("reason", ""), version=item.get("version", "1")
        )
        known = found.get(entry.name, IndexEntry(entry.name, reason="unloaded"))
        served = known.served or entry.state == READY
        unloading = (*known.unloading, *([entry.version] if entry.state == UNLOADING else []))
        said = entry if entry.weight >= known.weight else known
        found[entry.name] = replace(said, served=served, unloading=unloading)
    return list(found.values())


def find(index: Sequence[IndexEntry], wanted: Sequence[str], manifests: Sequence[Manifest]) -> list[Failure]:
    """The models that should be loaded and are not, by public name, in the order of the manifests.

    Args:
        index: Triton's repository index.
        wanted: the Triton models that it was started with.
        manifests: of the repository; a plain model has none and is reported by its own name.
    """
    known = {entry.name: entry for entry in index}
    broken = [name for name in wanted if name not in known or known[name].state != READY]
    failures = []
    owners = {model: manifest for manifest in manifests for model in manifest.triton_models}
    for manifest in manifests:
        own = [name for name in broken if name in manifest.triton_models]
        if own:
            # The stage that failed has a reason; the models that need it only wait.
            cause = next((name for name in own if name in known and known[name].reason), own[0])
            missing = tuple(name for name in manifest.called if name in own)
            missing = missing or tuple(manifest.called)  # a stage that all variants need
            failures.append(Failure(manifest.name, missing, cause, _reason(known.get(cause))))
    for name in broken:
        if name not in owners:
            failures.append(Failure(name, (name,), name, _reason(known.get(name))))
    return failures


def anything_ready(index: Sequence[IndexEntry], wanted: Sequence[str]) -> bool:
    """Whether at least one of the wanted models can be called."""
    return any(entry.name in wanted and entry.state == READY for entry in index)


def one_line(reason: str) -> str:
    """Triton's reason without status, traceback and line breaks, 300 characters at most."""
    text = reason.split("\n\nAt:")[0]
    while text.startswith((*_STATUSES, *_KINDS)):
        text = text.split(": ", 1)[1]
    text = " ".join(text.split()).rstrip(".")
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "..."


def _reason(entry: IndexEntry | None) -> str:
    return one_line(entry.reason) if entry is not None and entry.reason else "tritonserver gave no reason"
