"""Exports into a model repository: built aside, checked, moved into place, one at a time.

A model's manifest goes first and comes last, so whatever is cut off in between leaves no half model: without
its manifest a model is not loaded, and the next export makes it anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from trident_export import configs, disk, drafts, memory, processors, report, tasks
from trident_export.errors import ExportError, ExportsFailed, SourceError
from trident_export.fingerprint import fingerprint
from trident_export.huggingface import sources
from trident_export.measure import fidelity
from trident_export.models_file import ModelSpec
from trident_export.processors import Processor
from trident_export.progress import Progress
from trident_serving.artefacts import (
    DRAFT,
    MANIFEST,
    VERSION,
    VLLM_FILE,
    Manifest,
    manifest_path,
    read_failures,
    read_manifest,
    read_vllm,
    write_failures,
)


def is_current(spec: ModelSpec, repository: Path, base: Path) -> bool:
    """Whether the repository holds this very model, complete."""
    manifest = read_manifest(repository, spec.name)
    return (
        manifest is not None
        and manifest.fingerprint == fingerprint(as_made(spec, manifest), base)
        and all((repository / model / VERSION).is_dir() for model in manifest.triton_models)
        and all(file.is_file() for variant in spec.variants for file in graph_files(spec, variant, repository))
    )


def as_made(spec: ModelSpec, manifest: Manifest) -> ModelSpec:
    """The model for the processor that its export was made for: on another one it is slower at most, and not stale."""
    known = manifest.processor in list(Processor)
    return spec.made_for(Processor(manifest.processor)) if known else spec


def graph_files(spec: ModelSpec, variant: str, repository: Path) -> list[Path]:
    """The graphs that a variant is served from, or what vLLM is told of it; a template has none."""
    if spec.template:
        return []
    if spec.vllm_limits:
        return [repository / spec.public_name(variant) / VERSION / VLLM_FILE]
    if spec.seq2seq or spec.speech:
        folder = repository / spec.public_name(variant) / VERSION
        return [folder / "encoder.onnx", folder / "decoder.onnx"]
    part = spec.public_name(variant) if spec.generation else configs.model_part(spec, variant)
    folders = [repository / part / VERSION]
    if spec.draft_of(variant) is not None:
        folders.append(folders[0] / DRAFT)
    return [folder / "model.onnx" for folder in folders]


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

    A model that fails does not keep the others from being exported.

    Args:
        base: the folder of the models file, where relative paths start.
        cache: where converted sources are kept.
        force: install variants that the gate refuses (their configs, and so the server, call them unverified), and
            go on where memory is short.

    Raises:
        ExportError: the only model could not be exported; the repository keeps what it had of it.
        ExportsFailed: so of one or more of several.
    """
    exported: list[str] = []
    failures: dict[str, str] = {}
    specs = drafts.first(specs, repository)
    for spec in specs:
        say = _timed(spec.name, progress)
        try:
            _check_generator(spec, specs, failures, repository)
            if spec.draft_spec is not None and spec.draft_spec.name in failures:
                raise SourceError(f"its draft {spec.draft} is not exported: see there")
            if _export_if_needed(spec, repository, base, cache, progress, force):
                exported.append(spec.name)
        except Exception as error:
            failures[spec.name] = _sentence(spec.name, error, repository)
            if len(specs) == 1:
                _remember(specs, failures, repository)
                raise
            say(f"failed: {failures[spec.name]}")
    _remember(specs, failures, repository)
    if failures:
        raise ExportsFailed(failures, len(specs))
    return exported


def _remember(specs: Sequence[ModelSpec], failures: Mapping[str, str], repository: Path) -> None:
    """Let the launcher say which models failed; a repository that can't be written holds none of this."""
    with contextlib.suppress(OSError):
        known = read_failures(repository)
        tried = {spec.name for spec in specs}
        now = {name: why for name, why in known.items() if name not in tried} | dict(failures)
        if now != known:
            write_failures(repository, now)


def _sentence(name: str, error: Exception, repository: Path) -> str:
    if isinstance(error, ExportError):
        return str(error)
    if (meaning := disk.explain(error, repository)) is not None:
        return str(meaning)
    return report.defect(error, f"{name}: ")


def _check_generator(
    spec: ModelSpec, specs: Sequence[ModelSpec], failures: Mapping[str, str], repository: Path
) -> None:
    """A template without its generator would be served and answer nothing.

    Raises:
        SourceError: the generator's export failed just now, and no older one is there.
    """
    if not spec.template:
        return
    for other in specs:
        wanted = spec.template.generator in map(other.public_name, other.variants)
        if wanted and other.name in failures and read_manifest(repository, other.name) is None:
            raise SourceError(f"its generator {other.name} is not exported: see there")


def _export_if_needed(
    spec: ModelSpec, repository: Path, base: Path, cache: Path, progress: Progress, force: bool
) -> bool:
    with disk.writing(repository):
        if is_current(spec, repository, base):
            configs.write(spec, repository)  # a config that was changed or removed by hand
            return False
        disk.require_writable(repository, configs.build(spec))
        with _locked(repository, progress):
            if is_current(spec, repository, base):
                return False  # another export made it while this one waited
            _export_one(spec, repository, base, cache, _timed(spec.name, progress), force)
    return True


def _export_one(spec: ModelSpec, repository: Path, base: Path, cache: Path, progress: Progress, force: bool) -> None:
    work = repository / ".trident"
    for left in work.glob("staging-*"):  # of an export that was killed: the lock says that none is running
        shutil.rmtree(left, ignore_errors=True)
    source = sources.fetch(spec, base, cache, progress, force=force)
    drafts.check(spec, source, repository)
    if not spec.template:
        memory.require(spec.name, source.parameters, spec.kind, force=force)
    staging = Path(tempfile.mkdtemp(prefix="staging-", dir=work))
    try:
        # Said here, because what is left on the disk shows a full one only until the staging folder is removed.
        digest = fingerprint(spec, base)  # before: what is changed while the export runs is not in it
        with disk.writing(staging), _temporary_files(staging):
            checked = tasks.build(tasks.Job(spec, source, staging, progress), force=force)
            manifest = Manifest(
                name=spec.name,
                task=spec.task,
                triton_models=list(configs.build(spec)),
                public_models={
                    variant: spec.public_name(variant)
                    for variant in sorted(spec.variants, key=lambda variant: variant != spec.default_variant)
                },
                fingerprint=digest,
                fidelity=dict(checked.measures),
                unverified=checked.refused,
                aliases=[name] if (name := configs.alias(spec)) else [],
                drafts=drafts.link(spec, staging, repository),
                processor=spec.processor or processors.this_machine(),
                recipes={
                    variant: recipe.name for variant, recipe in spec.recipes.items() if recipe.name not in ("", variant)
                },
                engine=f"vllm {read_vllm(staging / spec.name / VERSION).version}" if spec.vllm_limits else "",
            )
            manifest.write(staging)
            configs.write(spec, staging / "_configs", checked.refused)
            _install(manifest, staging, repository)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for variant, values in checked.measures.items():
        verdict = f"UNVERIFIED: {checked.refused[variant]}" if variant in checked.refused else "passed"
        for adapter, measured in fidelity.by_adapter(values).items():
            shown = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
            progress(f"{variant}: with adapter {adapter} ({shown})" if adapter else f"{variant}: {verdict} ({shown})")


def _install(manifest: Manifest, staging: Path, repository: Path) -> None:
    """Move what was built into its place; where that fails, what was there before is put back.

    All is on the disk by now, so a full one can only refuse new folders' names. The manifest goes first and comes last.
    """
    old = staging / "_old"
    (old / "configs").mkdir(parents=True)
    with contextlib.ExitStack() as undo:
        _move(manifest_path(repository, manifest.name), old / MANIFEST, undo)
        for model in manifest.triton_models:
            (repository / model).mkdir(exist_ok=True)
            _move(repository / model / "config.pbtxt", old / "configs" / model, undo)
            _move(staging / "_configs" / model / "config.pbtxt", repository / model / "config.pbtxt", undo)
            _move(repository / model / VERSION, old / model, undo)
            _move(staging / model / VERSION, repository / model / VERSION, undo)
        _move(staging / MANIFEST, manifest_path(repository, manifest.name), undo)
        undo.pop_all()


def _move(path: Path, target: Path, undo: contextlib.ExitStack) -> None:
    """Rename what is there, and remember how to take it back."""
    if path.exists():
        os.rename(path, target)
        undo.callback(os.rename, target, path)


@contextmanager
def _temporary_files(staging: Path) -> Iterator[None]:
    """Let every library write its temporary files where room was asked for, and where they are removed in any case."""
    before = tempfile.tempdir
    (staging / "_tmp").mkdir()
    tempfile.tempdir = str(staging / "_tmp")
    try:
        yield
    finally:
        tempfile.tempdir = before


@contextmanager
def _locked(repository: Path, progress: Progress) -> Iterator[None]:
    work = repository / ".trident"
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"another export works in {repository}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _timed(name: str, progress: Progress) -> Progress:
    started = time.monotonic()
    return lambda message: progress(f"{name} [{time.monotonic() - started:5.1f} s] {message}")
