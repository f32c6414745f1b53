"""`trident-export doctor`: what is wrong with a repository, found without a server and without the network.

A problem keeps a model from being served as models.toml says; a warning is about speed, memory or reproducibility.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from tritonclient.grpc import model_config_pb2 as pb

from trident_export import configs, disk, install, needs, processors
from trident_export import memory as memory_of_exports
from trident_export.errors import ExportError
from trident_export.huggingface import sources
from trident_export.models_file import ModelSpec
from trident_serving import memory
from trident_serving.artefacts import Manifest, read_manifest, version_folder
from trident_serving.guard import labels
from trident_serving.triton.onnx_session import TRITON_TYPES

MEBIBYTE = 2**20
# What Triton takes of /dev/shm for a Python-based backend, before tensors grow it.
SHARED_MEMORY_MIB = 1
_ONNX_TYPES = {
    onnx.TensorProto.FLOAT: "tensor(float)",
    onnx.TensorProto.FLOAT16: "tensor(float16)",
    onnx.TensorProto.INT64: "tensor(int64)",
    onnx.TensorProto.INT32: "tensor(int32)",
    onnx.TensorProto.BOOL: "tensor(bool)",
}


@dataclass(frozen=True)
class Finding:
    """Something to know.

    Attributes:
        problem: whether it keeps a model from being served; else it is a warning.
        text: what, where, and what to do about it.
    """

    problem: bool
    text: str


def examine(
    specs: Sequence[ModelSpec], repository: Path, base: Path, models_file: Path = Path("models.toml")
) -> list[Finding]:
    """Everything that is found, problems first.

    Args:
        base: the folder from which paths in the specs begin.
        models_file: that has the specs, as the findings name it.
    """
    # Of a folder that is missing whole, `_artefacts` tells: another export writes its config, too.
    manifests = [each for spec in specs if (each := read_manifest(repository, spec.name)) is not None]
    gone = [name for each in manifests for name in each.triton_models if not (repository / name).is_dir()]
    drift = configs.drift(specs, repository, models_file, gone) if repository.is_dir() else []
    found = [Finding(True, f"{text}: run trident-export configs") for text in drift]
    if not repository.is_dir():
        found.append(
            Finding(True, f"there is no folder {repository}: an export makes it, or name another --repository")
        )
    served: list[ModelSpec] = []
    for spec in specs:
        found += _artefacts(spec, repository, base)
        if read_manifest(repository, spec.name) is not None:
            served.append(spec)
            found += _tensors(spec, repository)
        found += _guard(spec, repository)
        if spec.source.hub and not spec.source.revision:
            found.append(Finding(False, f"[{spec.name}] {spec.source.hub} has no revision: run trident-export pin"))
    found += [*_threads(served), *_shared_memory(served), *_memory(served)]
    return sorted(found, key=lambda finding: not finding.problem)


def _artefacts(spec: ModelSpec, repository: Path, base: Path) -> Iterator[Finding]:
    manifest = read_manifest(repository, spec.name)
    if manifest is None:
        parameters = _parameters(spec, base)
        if not spec.on_demand:
            takes = f", which takes {needs.sentence(parameters, spec.kind, spec.recipes)}" if parameters else ""
            yield Finding(True, f"[{spec.name}] is not exported: run make export MODEL={spec.name}{takes}")
        yield from _needs(spec, parameters, repository)
        return
    folders = [version_folder(repository, model) for model in manifest.triton_models]
    missing = [folder for folder in folders if not folder.is_dir()]
    for folder in missing:
        yield Finding(True, f"[{spec.name}] {folder} is missing: export it again")
    for variant in spec.variants:
        for file in install.graph_files(spec, variant, repository):
            if not file.is_file() and not any(file.is_relative_to(folder) for folder in missing):
                yield Finding(True, f"[{spec.name}] {file} is missing: export it again")
    for variant, reason in manifest.unverified.items():
        yield Finding(False, f"[{spec.name}] {variant} was installed by force: {reason}")
    yield from _other_processor(spec, manifest)
    if missing:  # so that it is not current, whatever its fingerprint says
        return
    try:
        current, waits = install.is_current(spec, repository, base), install.waiting_version(spec, repository, base)
    except (ExportError, OSError) as error:
        yield Finding(True, f"[{spec.name}] can't be compared with its source, nor exported again: {error}")
        return
    if current:
        return
    if waits is not None:
        yield Finding(
            False,
            f"[{spec.name}] version {waits} is what its table says and is not served: run trident-export promote "
            f"{spec.name}",
        )
    else:
        yield Finding(False, f"[{spec.name}] is older than its table, source or exporter: export it again")


def _other_processor(spec: ModelSpec, manifest: Manifest) -> Iterator[Finding]:
    """Variants that would be made by another recipe here than they were."""
    here = processors.this_machine()
    if manifest.processor not in list(processors.Processor) or manifest.processor == here:
        return
    made, ours = (spec.by_processor.get(each, {}) for each in (processors.Processor(manifest.processor), here))
    slow = [variant for variant in spec.variants if made.get(variant) != ours.get(variant)]
    if slow:
        yield Finding(
            False,
            f"[{spec.name}] was exported for a processor with {manifest.processor}, this one has {here}: its answers "
            f'are right, {", ".join(slow)} may be slow here; processor = "{here}" in its table and an export make it '
            "for this one",
        )


def _parameters(spec: ModelSpec, base: Path) -> int:
    """Of a model's weights, where they are on this machine; else 0."""
    if spec.template:
        return 0
    with contextlib.suppress(ExportError, OSError):
        folder = sources.at_hand(spec.source, base)
        return folder.parameters if folder is not None else 0
    return 0


def _needs(spec: ModelSpec, parameters: int, repository: Path) -> Iterator[Finding]:
    """What is too little for the export of a model that is at hand."""
    if not parameters:
        return
    try:
        memory_of_exports.require(spec.name, parameters, spec.kind)
        disk.require(repository, 4 * parameters, spec.recipes)
    except ExportError as error:
        yield Finding(False, f"[{spec.name}] can't be exported here now: {error}")


def _tensors(spec: ModelSpec, repository: Path) -> Iterator[Finding]:
    """Graphs that the onnxruntime backend serves must have the tensors of their configs."""
    for name, config in configs.build(spec).items():
        path = version_folder(repository, name) / "model.onnx"
        if config.backend != "onnxruntime" or not path.is_file():
            continue
        graph = onnx.load(str(path), load_external_data=False).graph
        for kind, tensors, values in (("input", config.input, graph.input), ("output", config.output, graph.output)):
            known = {value.name: value.type.tensor_type for value in values}
            for tensor in tensors:
                if tensor.name not in known:
                    yield Finding(True, f"{path} has no {kind} {tensor.name!r}; it has {', '.join(known)}")
                    continue
                expected = pb.DataType.Name(tensor.data_type)
                given = TRITON_TYPES.get(_ONNX_TYPES.get(known[tensor.name].elem_type, ""), "another type")
                if given != expected:
                    yield Finding(True, f"{path}: {kind} {tensor.name!r} is {given}, its config says {expected}")


def _guard(spec: ModelSpec, repository: Path) -> Iterator[Finding]:
    """Rules that name labels which their models do not have fail at each text."""
    for rule in spec.guard.rules if spec.guard is not None else ():
        known = labels.of_model(repository, rule.model) if rule.labels else None
        if spec.guard is not None and known is not None and (said := labels.unknown(rule, known)):
            yield Finding(True, f"[{spec.name}] guard {spec.guard.name}, rule {rule.name}: {said}")


def _threads(specs: Sequence[ModelSpec]) -> Iterator[Finding]:
    cores = os.cpu_count() or 1
    for spec in specs:
        threads = getattr(spec.limits, "threads", 0)
        if threads > cores:
            yield Finding(False, f"[{spec.name}] limits.threads is {threads}, this machine has {cores} cores")
    sessions = [spec for spec in specs for _ in spec.variants if not spec.template]
    total = sum(getattr(spec.limits, "threads", 0) for spec in sessions)
    if total > cores and len(sessions) > 1:
        yield Finding(
            False,
            f"{len(sessions)} sessions have {total} threads together and this machine {cores} cores: variants that are "
            "asked at the same time slow each other down; export the ones that are used alone",
        )


def _shared_memory(specs: Sequence[ModelSpec]) -> Iterator[Finding]:
    stubs = [config for spec in specs for config in configs.build(spec).values() if config.platform != "ensemble"]
    needed = SHARED_MEMORY_MIB * len(stubs) * MEBIBYTE
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    if needed > free:
        yield Finding(
            True,
            f"{len(stubs)} backends take {needed // MEBIBYTE} MiB of /dev/shm, {free // MEBIBYTE} MiB are free: "
            "give the container a larger one (--shm-size)",
        )


def _memory(specs: Sequence[ModelSpec]) -> Iterator[Finding]:
    caches = sum(spec.causal.kv_cache_mib * len(spec.variants) for spec in specs if spec.causal)
    available = memory.available_bytes() // MEBIBYTE
    if caches > available:
        yield Finding(
            True, f"the KV caches may grow to {caches} MiB together, {available} MiB are available: lower kv_cache_mib"
        )
