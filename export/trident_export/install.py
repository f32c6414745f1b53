"""Exports into a model repository: built aside, checked, moved into place, one at a time.

A model's manifest goes first and comes last, so whatever is cut off in between leaves no half model: without
its manifest a model is not loaded, and the next export makes it anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from trident_export import configs, sources, tasks
from trident_export.models_file import ModelSpec
from trident_export.sources import Progress
from trident_serving.artefacts import VERSION, Manifest, manifest_path, read_manifest

# What an artefact depends on beside its spec and source.
_PACKAGES = ("onnx", "onnxruntime", "optimum", "optimum-onnx", "tokenizers", "torch", "transformers")
_NOT_EXPORTING = ("add.py", "cli.py", "compression", "doctor.py", "pin.py", "quality.py", "sensitivity.py")


def exporter_version() -> str:
    """A digest of the exporter's own code and of the versions of the packages that it works with."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for file in sorted(root.rglob("*")):
        if file.suffix in (".py", ".txt", ".toml") and file.relative_to(root).parts[0] not in _NOT_EXPORTING:
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    for package in _PACKAGES:
        digest.update(f"{package}=={importlib.metadata.version(package)}\n".encode())
    return digest.hexdigest()


def fingerprint(spec: ModelSpec, base: Path) -> str:
    """A digest of everything that the artefacts of a spec depend on."""
    calibration = hashlib.sha256(Path(spec.calibration).read_bytes()).hexdigest() if spec.calibration else ""
    parts = [spec.as_dict(), calibration, sources.identity(spec, base), exporter_version()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()


def is_current(spec: ModelSpec, repository: Path, base: Path) -> bool:
    """Whether the repository holds this very model, complete."""
    manifest = read_manifest(repository, spec.name)
    return (
        manifest is not None
        and manifest.fingerprint == fingerprint(spec, base)
        and all((repository / model / VERSION).is_dir() for model in manifest.triton_models)
    )


def export(
    specs: Sequence[ModelSpec],
    repository: Path,
    base: Path,
    cache: Path,
    progress: Progress,
    *,
    force: bool = False,
) -> list[str]:
    """Export what is missing or out of date; returns the names of the models that were exported.

    Args:
        base: the folder of the models file, where relative paths start.
        cache: where converted sources are kept.
        force: install variants that the gate refuses; their configs, and so the server, call them unverified.

    Raises:
        SourceError, FidelityError, NoSpace, ValueError: a model could not be exported; the repository keeps
            what it had of it, and the models before it.
    """
    exported = []
    for spec in specs:
        if is_current(spec, repository, base):
            configs.write(spec, repository)  # a config that was changed or removed by hand
            continue
        with _locked(repository, progress):
            if is_current(spec, repository, base):
                continue  # another export made it while this one waited
            _export_one(spec, repository, base, cache, _timed(spec.name, progress), force)
            exported.append(spec.name)
    return exported


def _export_one(spec: ModelSpec, repository: Path, base: Path, cache: Path, progress: Progress, force: bool) -> None:
    work = repository / ".trident"
    for left in work.glob("staging-*"):  # of an export that was killed: the lock says that none is running
        shutil.rmtree(left, ignore_errors=True)
    source = sources.fetch(spec, base, cache, progress)
    staging = Path(tempfile.mkdtemp(prefix="staging-", dir=work))
    try:
        checked = tasks.build(tasks.Job(spec, source, staging, progress), force=force)
        models = list(configs.build(spec))
        manifest = Manifest(
            name=spec.name,
            task=spec.task,
            triton_models=models,
            public_models={
                variant: spec.public_name(variant)
                for variant in sorted(spec.variants, key=lambda variant: variant != spec.default_variant)
            },
            fingerprint=fingerprint(spec, base),
            fidelity=dict(checked.measures),
            unverified=checked.refused,
        )
        manifest_path(repository, spec.name).unlink(missing_ok=True)
        # Not before: a refused export leaves the config of the model that is installed.
        configs.write(spec, repository, checked.refused)
        for model in models:
            _replace(staging / model / VERSION, repository / model / VERSION, staging / "old" / model)
        # Written beside its place and renamed, so that it is never seen half.
        manifest.write(staging)
        os.replace(staging / "trident.json", manifest_path(repository, spec.name))
        for variant, values in checked.measures.items():
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            verdict = f"UNVERIFIED: {checked.refused[variant]}" if variant in checked.refused else "passed"
            progress(f"{variant}: {verdict} ({shown})")
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(new: Path, target: Path, old: Path) -> None:
    old.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        os.rename(target, old)
    os.rename(new, target)


@contextmanager
def _locked(repository: Path, progress: Progress) -> Iterator[None]:
    folder = repository / ".trident"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"another export works in {repository}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _timed(name: str, progress: Progress) -> Progress:
    started = time.monotonic()
    return lambda message: progress(f"{name} [{time.monotonic() - started:5.1f} s] {message}")


def print_progress(message: str) -> None:
    """Progress on standard error, so that output can be piped."""
    print(f"trident-export: {message}", file=sys.stderr, flush=True)
