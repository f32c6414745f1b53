"""From one version of a model to another, in a repository and in a server that runs on it, without losing a request.

Triton loads a model again in place: the old instances answer until the new ones can, and finish what they have begun.
An ensemble names the version of its stages, so for a moment the stages have both versions, each request is answered by
the parts of one, and a new tokenizer never stands before an old graph:

    0. each part of the new version is loaded under another name, to see whether it can be, and unloaded: a failed load
       beside a version that answers would keep tritonserver (2.51) unready until its restart
    1. stages serve the old and the new version
    2. public models change to the new one; this is the moment for callers
    3. the old ones have answered what they had begun
    4. stages serve the new version only

Triton has one config for all versions of a model, so this works where the stages of both versions have the same one. A
version with other limits or another number of labels can take its place only while nobody is answered.

Each step is written into the repository before the server is told. Whatever is cut off in between, what lies there can
be served, and asking again goes on.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from trident_export.errors import StoreError
from trident_export.store import versions
from trident_export.store.versions import Version
from trident_serving import artefacts
from trident_serving.artefacts import CONFIG, TRIAL

if TYPE_CHECKING:
    from trident_client import ModelStatus

_STAGES = ("tokenizer", "preprocess", "model", "postprocess")
_POLL_SECONDS = 0.1
# A launcher that copies configs, as one with trusted keys does, looks once a second.
_SEEN_SECONDS = 5.0
# The launcher clears a failed load within a second or two.
_CLEARED_SECONDS = 15.0
# No longer than a model may take for one request by default.
_DRAIN_SECONDS = 300.0


class Server(Protocol):
    """What is asked of a server; `trident_client.Client` is one."""

    def load(self, model: str, *, only: list[str] | None = None, timeout: float | None = None) -> list[str]:
        """Load Triton models of a public one in place."""

    def unload(self, model: str, *, only: list[str] | None = None, timeout: float | None = None) -> list[str]:
        """Unload Triton models of a public one."""

    def models(self, *, timeout: float | None = None) -> list[ModelStatus]:
        """Every version of every model that the server knows."""


@dataclass(frozen=True)
class _Step:
    """What one Triton model serves from now on."""

    model: str
    versions: tuple[int, ...]


def change(
    repository: Path,
    name: str,
    choose: Callable[[str, list[Version]], Version],
    server: Server | None,
    say: Callable[[str], None],
    *,
    interrupt: bool = False,
) -> Version:
    """Serve another version of a model.

    Args:
        choose: takes one of the versions.
        server: that runs on the repository; None: its next start takes what the repository then says.
        interrupt: go on where callers are refused for a moment.

    Returns:
        The version that is served now.

    Raises:
        StoreError: there is no such version; or the server can't load it, or could do so only by an interruption: then
            it goes on with the old one.
    """
    with versions.locked(repository, say):
        found = versions.of(repository, name)
        old = versions.served(found)
        if server is not None:
            _check_same(server, name, found)
        _Change(repository, name, old, old, server, say).finish_earlier()
        new = choose(name, found)
        if new.number != old.number:
            _check_kept(repository, new)
        change = _Change(repository, name, old, new, server, say)
        if new.number != old.number:
            different = change.different_stages() if server is not None else []
            if different and not interrupt:
                raise StoreError(
                    f"{' and '.join(different)} of version {new.number} can't be served beside version {old.number}: "
                    "their configs differ (limits, labels). --interrupt changes them while callers of "
                    f"{name} get UNAVAILABLE for a moment; or export it under another name"
                )
            change.run(overlap=not different)
        versions.keep_only(name, repository, {old.number, new.number, *_later(found, new)})
    return new


def _later(found: Iterable[Version], new: Version) -> set[int]:
    """Versions that wait: a rollback keeps them."""
    return {version.number for version in found if version.number > new.number}


def _check_kept(repository: Path, version: Version) -> None:
    """A version that is promoted needs the configs that its export kept, and its files as they were."""
    for model in version.manifest.triton_models:
        folder = repository / model / str(version.number)
        if not (folder / CONFIG).is_file():
            raise StoreError(f"{folder / CONFIG} is missing: export the model again")
        for path, digest in version.manifest.files_of(model).items():
            file = folder / path
            if not file.is_file() or artefacts.digest(file) != digest:
                raise StoreError(f"{file} is not the file that was exported: version {version.number} can't be served")


def _check_same(server: Server, name: str, found: Sequence[Version]) -> None:
    """Refuse a server that serves a version which the repository does not have: it runs on another one.

    After a change that was cut off, it may serve another of them than the repository says.
    """
    ready = [status.version for status in server.models() if status.name == name and status.state == "READY"]
    if ready and not {*ready} & {str(version.number) for version in found}:
        raise StoreError(
            f"the server has version {', '.join(ready)} of {name}, this repository {versions.served(found).number}: it "
            "serves another repository; --no-server changes only this one"
        )


class _Change:
    """One promotion or rollback under way."""

    def __init__(
        self,
        repository: Path,
        name: str,
        old: Version,
        new: Version,
        server: Server | None,
        say: Callable[[str], None],
    ) -> None:
        self._repository, self._name, self._server, self._say = repository, name, server, say
        self._old, self._new = old, new
        olds, news = old.manifest.triton_models, new.manifest.triton_models
        both = (old.number, new.number)
        stages, last = [each for each in news if _is_stage(each)], [new.number]
        self._overlap = [_Step(each, tuple(sorted(both if each in olds else last))) for each in stages]
        # The default variant comes last: its config says which version the model has.
        public = sorted((each for each in news if not _is_stage(each)), key=lambda each: each == name)
        self._public = [_Step(each, (new.number,)) for each in public]
        self._left = [each for each in olds if each not in news]
        self._end = [_Step(step.model, (new.number,)) for step in self._overlap if len(step.versions) > 1]

    def different_stages(self) -> list[str]:
        """The stages whose configs say more than another version."""
        numbers = (self._old.number, self._new.number)
        stages = [step.model for step in self._overlap if len(step.versions) > 1]
        return [each for each in stages if len({self._kept(each, number, [0]) for number in numbers}) > 1]

    def run(self, *, overlap: bool) -> None:
        """Go all steps, or take back those that were gone.

        Args:
            overlap: whether the stages can serve both versions at a time; else the public models go first.

        Raises:
            StoreError: the server does not load the new version.
        """
        self._try()
        first = self._overlap
        if not overlap:
            first = [_Step(step.model, (self._new.number,)) for step in self._overlap]
            self._end = []
            self._unload([model for model in self._old.manifest.triton_models if not _is_stage(model)])
        gone: list[_Step] = []
        try:
            for step in [*first, *self._public]:
                gone.append(step)
                self._write(step)
                self._load(step)
        except Exception as error:
            olds = [_Step(model, ()) for model in self._old.manifest.triton_models if not _is_stage(model)]
            # Public models go back before their stages do; where they are away, the stages come first.
            self._take_back(gone[::-1] if overlap else [*first, *olds, *self._public])
            if not _is_the_servers(error):
                raise
            raise StoreError(
                f"the server does not take version {self._new.number} of {self._name}, and goes on with "
                f"{self._old.number}: {error}"
            ) from None
        self._wait_old()
        self._drop(self._left)
        for step in self._end:
            self._write(step)
            self._load(step)

    def _try(self) -> None:
        """Load what the new version has, but its ensembles, under another name.

        Raises:
            StoreError: something can't be loaded; all that is served goes on.
        """
        if self._server is None:
            return
        number = str(self._new.number)
        for model in self._new.manifest.triton_models:
            text = self._kept(model, self._new.number, [self._new.number])
            if 'platform: "ensemble"' in text:
                continue
            trial = f"{model}{TRIAL}"
            folder = self._repository / trial
            shutil.rmtree(folder, ignore_errors=True)  # of a promotion that was killed
            try:
                folder.mkdir()
                (folder / number).symlink_to(Path("..", model, number), target_is_directory=True)
                artefacts.write_text(folder / CONFIG, artefacts.renamed(text, model, trial))
                self._server.load(self._name, only=[trial])
            except Exception as error:
                if not _is_the_servers(error):
                    raise
                self._wait_cleared(trial)
                raise StoreError(
                    f"the server can't load version {number} of {self._name}, and goes on with {self._old.number}: "
                    f"{self._reason(error)}"
                ) from None
            finally:
                self._unload([trial])
                shutil.rmtree(folder, ignore_errors=True)

    def _reason(self, error: Exception) -> str:
        """Why a server can't load a trial. The launcher hides what it must not load, so the server says only that."""
        from trident_client import NotFoundError

        said = str(error).split("\n")[0]
        if not isinstance(error, NotFoundError):
            return said
        path = artefacts.manifest_path(self._repository, self._name, self._new.number).with_name(artefacts.SIGNATURE)
        signed = (
            "perhaps by another key, or the manifest has changed since"
            if path.exists()
            else f"but this version is not signed: trident-export sign {self._name} --key FILE"
        )
        return f"{said}. One with --trusted-keys has only what such a key has signed, {signed}"

    def _wait_cleared(self, trial: str) -> None:
        """Wait until the launcher has cleared a failed load, as it can only while the server knows the model."""
        assert self._server is not None
        deadline = time.monotonic() + _CLEARED_SECONDS
        while time.monotonic() < deadline and any(
            status.name == trial and status.reason != "unloaded" for status in self._server.models()
        ):
            time.sleep(_POLL_SECONDS)

    def finish_earlier(self) -> None:
        """Do what a change that was cut off has left to do, or to take back."""
        own, number = self._old.manifest.triton_models, self._old.number
        self._clear_trials()
        if self._server is not None:
            for model in filter(_is_stage, own):  # what the public models need first
                ready = {int(version) for version in self._ready(model)}
                if ready and number not in ready:
                    both = _Step(model, tuple(sorted({*ready, number})))
                    self._write(both)
                    self._load(both)
        for model in sorted(own, key=_is_stage):
            step = _Step(model, (number,))
            serves = artefacts.served_versions(self._repository, model)
            if serves != [number]:
                self._write(step)
            ready_now = self._ready(model) if self._server is not None else set()
            if serves != [number] or ready_now - {str(number)}:
                self._load(step)
        known = {path.parent.name for path in self._repository.glob(f"*/{CONFIG}") if path.parent.is_dir()}
        self._drop([each for each in sorted(known - {*own}) if each.partition("_")[0] == self._name])

    def _clear_trials(self) -> None:
        """Remove what a promotion that was killed has loaded to see whether it can be."""
        there = {path.name for path in self._repository.glob(f"*{TRIAL}") if path.is_dir()}
        loaded = {status.name for status in self._server.models() if status.state == "READY"} if self._server else set()
        left = sorted(
            model for model in there | loaded if model.endswith(TRIAL) and model.partition("_")[0] == self._name
        )
        self._unload(left)
        for model in left:
            shutil.rmtree(self._repository / model, ignore_errors=True)
        if left:
            self._say(f"an earlier promotion was cut off: what it had left is removed ({', '.join(left)})")

    def _write(self, step: _Step) -> None:
        """Write the config that a version has kept, the newest of those that are served."""
        text = self._kept(step.model, step.versions[-1], step.versions)
        artefacts.write_text(self._repository / step.model / CONFIG, text)

    def _kept(self, model: str, version: int, served: Iterable[int]) -> str:
        kept = self._repository / model / str(version) / CONFIG
        return artefacts.with_versions(kept.read_text(encoding="utf-8"), served)

    def _load(self, step: _Step) -> None:
        if self._server is None:
            return
        wanted = {str(number) for number in step.versions}
        deadline = time.monotonic() + _SEEN_SECONDS
        while True:
            self._server.load(self._name, only=[step.model])
            if wanted == self._ready(step.model):
                return
            if time.monotonic() > deadline:
                raise StoreError(
                    f"the server has not loaded {' and '.join(sorted(wanted))} of {step.model}, but "
                    f"{' and '.join(sorted(self._ready(step.model))) or 'nothing'}: does it run on this repository?"
                )
            time.sleep(_POLL_SECONDS)

    def _ready(self, model: str) -> set[str]:
        assert self._server is not None
        return {status.version for status in self._server.models() if (status.name, status.state) == (model, "READY")}

    def _take_back(self, gone: list[_Step]) -> None:
        """Serve the old version only; a model that it does not have goes."""
        olds = self._old.manifest.triton_models
        for step in gone:
            if step.model in olds:
                back = _Step(step.model, (self._old.number,))
                self._write(back)
                if self._server is not None and self._ready(step.model) != {str(self._old.number)}:
                    self._load(back)
        self._drop([step.model for step in gone if step.model not in olds])

    def _wait_old(self) -> None:
        """Wait until the old version of the public models has answered what it had begun."""
        if self._server is None:
            return
        public = {step.model for step in self._public}
        deadline = time.monotonic() + _DRAIN_SECONDS
        while busy := [
            status.name
            for status in self._server.models()
            if status.name in public
            and status.version == str(self._old.number)
            and status.state not in ("", "UNAVAILABLE")
        ]:
            if time.monotonic() > deadline:
                self._say(f"version {self._old.number} of {', '.join(busy)} still answers: it goes when it has")
                return
            time.sleep(_POLL_SECONDS)

    def _drop(self, models: list[str]) -> None:
        """Unload models that the version that is served does not have."""
        self._unload(models)
        for model in models:
            (self._repository / model / CONFIG).unlink(missing_ok=True)

    def _unload(self, models: list[str]) -> None:
        if models and self._server is not None:
            known = {status.name for status in self._server.models()}
            self._server.unload(self._name, only=[model for model in models if model in known])


def _is_stage(model: str) -> bool:
    return model.partition("_")[2].startswith(_STAGES)


def _is_the_servers(error: Exception) -> bool:
    from trident_client import TridentError

    return isinstance(error, TridentError)
