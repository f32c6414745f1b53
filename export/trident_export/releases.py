"""A version that is exported beside the one that is served: its number, its configs, the files that both have."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from trident_export import configs
from trident_serving import artefacts
from trident_serving.artefacts import CONFIG, VERSION, Manifest


def next_number(repository: Path, models: Sequence[str]) -> int:
    """A number that no version of these Triton models has, not even one whose export was cut off."""
    found = (path.name for model in models for path in repository.glob(f"{model}/*") if path.is_dir())
    return max((int(name) for name in found if name.isdecimal()), default=0) + 1


def keep_configs(staging: Path, models: Sequence[str], version: int) -> None:
    """Keep each config with its version, as it is when the version is served beside others."""
    for model in models:
        text = (staging / "_configs" / model / CONFIG).read_text(encoding="utf-8")
        (staging / model / VERSION / CONFIG).write_text(configs.pinned_text(text, version), encoding="utf-8")


def use_kept_configs(staging: Path, models: Sequence[str]) -> None:
    """Install the configs that name the version: the model has had another one."""
    for model in models:
        text = (staging / model / VERSION / CONFIG).read_text(encoding="utf-8")
        (staging / "_configs" / model / CONFIG).write_text(text, encoding="utf-8")


def share(manifest: Manifest, staging: Path, repository: Path, served: int) -> None:
    """Give files that the served version has, too, a second name in place of a second copy."""
    other = artefacts.read_manifest(repository, manifest.name, served)
    for path, digest in manifest.files.items() if other is not None else ():
        if other is not None and other.files.get(path) == digest:
            model, _, name = path.partition("/")
            new, old = staging / model / VERSION / name, repository / model / str(served) / name
            second = new.with_name(f"{new.name}.link")
            with contextlib.suppress(OSError):  # a file system without links, or another one: the copy stays
                os.link(old, second)
                if artefacts.digest(second) == digest:  # it may have changed since its export
                    second.replace(new)
                else:
                    second.unlink()


def pin_served(name: str, repository: Path) -> None:
    """Have the configs of the version that is served name it, before another folder appears beside it."""
    manifest = artefacts.read_manifest(repository, name)
    if manifest is None or artefacts.is_pinned(repository, name):
        return
    for model in manifest.triton_models:
        (*_, version) = artefacts.served_versions(repository, model)
        path = repository / model / CONFIG
        kept = repository / model / str(version) / CONFIG
        text = kept.read_text(encoding="utf-8") if kept.exists() else path.read_text(encoding="utf-8")
        if not kept.exists():  # an export from before versions
            text = configs.pinned_text(text, version)
            artefacts.write_text(kept, text)
        artefacts.write_text(path, text)


@contextlib.contextmanager
def served_as_first(name: str, repository: Path) -> Iterator[Path]:
    """A folder in which a model's served version lies where exports are built, as the only one of it."""
    (*_, version) = artefacts.served_versions(repository, name)
    manifest = artefacts.read_manifest(repository, name)
    if str(version) == VERSION or manifest is None:
        yield repository
        return
    with tempfile.TemporaryDirectory() as scratch:
        for model in manifest.triton_models:
            (Path(scratch) / model).mkdir()
            (Path(scratch) / model / VERSION).symlink_to((repository / model / str(version)).resolve())
        yield Path(scratch)
