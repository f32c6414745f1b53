"""Exports into a model repository: built aside, checked, moved into place, one at a time.

An export takes the place of the version that is served, or becomes a version beside it, which `store.rollout` promotes.

A model's manifest goes first and comes last, so whatever is cut off in between leaves no half model: without
its manifest a model is not loaded, and the next export makes it anew.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from trident_export import configs, disk, drafts, memory, origins, processors, releases, report, tasks
from trident_export.errors import ExportError, ExportsFailed, SourceError
from trident_export.fingerprint import fingerprint
from trident_export.huggingface import sources
from trident_export.measure import fidelity
from trident_export.models_file import ModelSpec
from trident_export.processors import Processor
from trident_export.progress import Progress
from trident_export.store.versions import keep_only, locked
from trident_serving import artefacts
from trident_serving.artefacts import (
    CONFIG,
    DRAFT,
    MANIFEST,
    TOWER,
    VERSION,
    VLLM_FILE,
    Manifest,
    manifest_path,
    read_failures,
    read_manifest,
    read_versions,
    read_vllm,
    served_versions,
    write_failures,
)
from trident_serving.generation.vision import VisionSettings


def is_current(spec: ModelSpec, repository: Path, base: Path) -> bool:
    """Whether the repository serves this very model, complete."""
    (*_, version) = served_versions(repository, spec.name)
    return _is_version(version, read_manifest(repository, spec.name), spec, repository, base)


def waiting_version(spec: ModelSpec, repository: Path, base: Path) -> int | None:
    """The version of this very model that lies beside the one that is served; None: there is none."""
    served = served_versions(repository, spec.name)
    found = [
        version
        for version, manifest in read_versions(repository, spec.name).items()
        if version not in served and _is_version(version, manifest, spec, repository, base)
    ]
    return found[-1] if found else None


def _is_version(version: int, manifest: Manifest | None, spec: ModelSpec, repository: Path, base: Path) -> bool:
    return (
        manifest is not None
        and manifest.fingerprint == fingerprint(as_made(spec, manifest), base)
        and all((repository / model / str(version)).is_dir() for model in manifest.triton_models)
        and all(file.is_file() for variant in spec.variants for file in graph_files(spec, variant, repository, version))
        and (not artefacts.is_pinned(repository, spec.name) or configs.keeps_guard(spec, repository, version))
    )


def as_made(spec: ModelSpec, manifest: Manifest) -> ModelSpec:
    """The model for the processor that its export was made for: on another one it is slower at most, and not stale."""
    known = manifest.processor in list(Processor)
    return spec.made_for(Processor(manifest.processor)) if known else spec


def graph_files(spec: ModelSpec, variant: str, repository: Path, version: int | None = None) -> list[Path]:
    """The graphs that a variant is served from, or what vLLM is told of it; a template has none.

    Args:
        version: which one; None: the one that is served.
    """
    if spec.template:
        return []
    number = str(served_versions(repository, spec.name)[-1] if version is None else version)
    if spec.vllm_limits:
        return [repository / spec.public_name(variant) / number / VLLM_FILE]
    if spec.seq2seq or spec.speech:
        folder = repository / spec.public_name(variant) / number
        return [folder / "encoder.onnx", folder / "decoder.onnx"]
    parts = [spec.public_name(variant)] if spec.generation else configs.model_parts(spec, variant)
    folders = [repository / part / number for part in parts]
    if spec.draft_of(variant) is not None:
        folders.append(folders[0] / DRAFT)
    towers = [folders[0] / TOWER] if spec.generation and spec.generation.images else []
    return [*(folder / "model.onnx" for folder in folders), *towers]


def export(
    specs: Sequence[ModelSpec],
    repository: Path,
    base: Path,
    cache: Path,
    progress: Progress,
    *,
    force: bool = False,
    beside: bool = False,
) -> list[str]:
    """Export what is missing or out of date; returns the names of the models that were exported.

    A model that fails does not keep the others from being exported. A version that waits beside the one that is served
    is not exported again.

    Args:
        base: the folder of the models file, where relative paths start.
        cache: where converted sources are kept.
        force: install variants that the gate refuses (their configs, and so the server, call them unverified), and
            go on where memory is short.
        beside: leave what is served as it is, and put a new version beside it.

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
            if _export_if_needed(spec, repository, base, cache, progress, force, beside):
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
    spec: ModelSpec, repository: Path, base: Path, cache: Path, progress: Progress, force: bool, beside: bool
) -> bool:
    with disk.writing(repository):
        if is_current(spec, repository, base):
            # A guard is in configs only, and files may have been changed or removed by hand.
            if written := configs.write(spec, repository):
                files = ", ".join(str(path.relative_to(repository)) for path in written)
                progress(
                    f"{spec.name}: wrote {files} as models.toml says, and the rest is up to date: a running server "
                    f"takes it up with trident unload {spec.name} and trident load {spec.name}"
                )
            return False
        if (waits := waiting_version(spec, repository, base)) is not None:
            progress(
                f"{spec.name}: version {waits} is what models.toml says, and waits: trident-export promote {spec.name}"
            )
            return False
        disk.require_writable(repository, configs.build(spec))
        with locked(repository, progress):
            if is_current(spec, repository, base):
                progress(f"{spec.name}: the other export made it")
                return False
            _export_one(spec, repository, base, cache, _timed(spec.name, progress), force, beside)
    return True


def _export_one(
    spec: ModelSpec, repository: Path, base: Path, cache: Path, progress: Progress, force: bool, beside: bool
) -> None:
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
            drafted = drafts.link(spec, staging, repository)
            if spec.explain is not None:  # it has no files, and Triton wants the folder
                (staging / configs.explanation(spec) / VERSION).mkdir(parents=True)
            models = list(configs.build(spec))
            (*_, version) = served = served_versions(repository, spec.name)
            beside = beside and read_manifest(repository, spec.name) is not None
            if beside:
                version = releases.next_number(repository, models)
            configs.write(spec, staging / "_configs", checked.refused)
            releases.keep_configs(staging, models, version)
            manifest = Manifest(
                name=spec.name,
                task=spec.task,
                triton_models=models,
                public_models={
                    variant: spec.public_name(variant)
                    for variant in sorted(spec.variants, key=lambda variant: variant != spec.default_variant)
                },
                fingerprint=digest,
                fidelity=dict(checked.measures),
                unverified=checked.refused,
                aliases=[name] if (name := configs.alias(spec)) else [],
                drafts=drafted,
                processor=spec.processor or processors.this_machine(),
                recipes={
                    variant: recipe.name for variant, recipe in spec.recipes.items() if recipe.name not in ("", variant)
                },
                files=artefacts.checksums(staging, models),
                source=origins.source(spec),
                licences=origins.licences(spec, source, cache),
                engine=f"vllm {read_vllm(staging / spec.name / VERSION).version}" if spec.vllm_limits else "",
                image_tokens=_image_tokens(spec, staging / spec.name / VERSION),
            )
            manifest.write(staging)
            if beside:
                releases.share(manifest, staging, repository, served[-1])
                releases.pin_served(spec.name, repository)
            elif artefacts.is_pinned(repository, spec.name):
                releases.use_kept_configs(staging, models)
            _install(manifest, staging, repository, version, served=not beside)
            if beside:
                keep_only(spec.name, repository, {version, *range(served[-1] + 1)})
                progress(f"version {version} lies beside version {served[-1]}: trident-export promote {spec.name}")
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for variant, values in checked.measures.items():
        verdict = f"UNVERIFIED: {checked.refused[variant]}" if variant in checked.refused else "passed"
        for adapter, measured in fidelity.by_adapter(values).items():
            shown = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
            progress(f"{variant}: with adapter {adapter} ({shown})" if adapter else f"{variant}: {verdict} ({shown})")


def _image_tokens(spec: ModelSpec, folder: Path) -> int:
    """Tokens of a prompt that an image takes at most; 0 of a model that reads none."""
    images = spec.generation is not None and spec.generation.images
    return VisionSettings.load(folder).most_tokens if images else 0


def _install(manifest: Manifest, staging: Path, repository: Path, version: int, *, served: bool) -> None:
    """Move what was built into its place; where that fails, what was there before is put back.

    All is on the disk by now, so a full one can only refuse new folders' names. The manifest goes first and comes last.

    Args:
        served: whether it is the version that is served from now on, so that its configs count.
    """
    old = staging / "_old"
    (old / "configs").mkdir(parents=True)
    with contextlib.ExitStack() as undo:
        _move(manifest_path(repository, manifest.name, version), old / MANIFEST, undo)
        for model in manifest.triton_models:
            (repository / model).mkdir(exist_ok=True)
            if served:
                _move(repository / model / CONFIG, old / "configs" / model, undo)
                _move(staging / "_configs" / model / CONFIG, repository / model / CONFIG, undo)
            _move(repository / model / str(version), old / model, undo)
            _move(staging / model / VERSION, repository / model / str(version), undo)
        _move(staging / MANIFEST, manifest_path(repository, manifest.name, version), undo)
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


def _timed(name: str, progress: Progress) -> Progress:
    started = time.monotonic()
    return lambda message: progress(f"{name} [{time.monotonic() - started:5.1f} s] {message}")
