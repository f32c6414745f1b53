"""What an export writes into a model repository, and how a reader knows that it is complete.

Each exported model has a manifest, `<repository>/<name>/1/trident.json`, which the export writes last. A
model without one was never exported, or its export was cut off: it is not loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

VERSION = "1"
# The format of an export: the files of a version folder and their contents. Raise it when our code would misread an
# older artefact; tests/unit/test_artefacts.py says when that may be.
FORMAT = 2
MANIFEST = "trident.json"
# The file of a repository that says why the last export of a model failed, by its name. The launcher prints it.
FAILURES = ".trident/failures.json"
# The config parameter that says why the gate refused a variant that is served nevertheless.
UNVERIFIED = "unverified"
# The folder in a version folder with the graph that drafts, and the file in it that says what it is.
DRAFT = "draft"
DRAFT_FILE = "draft.json"
# Of a model that vLLM computes, the Hugging Face folder in a version folder, and the file that says how it was gated.
WEIGHTS = "huggingface"
VLLM_FILE = "vllm.json"
CONFIG_HEADER = "# Written by `trident-export configs` from models.toml: change that, not this.\n"


@dataclass(frozen=True)
class Manifest:
    """One exported model.

    Attributes:
        name: the public name.
        task: the transformers pipeline's name.
        triton_models: every Triton model that belongs to it, stages and variants included.
        public_models: those of them that a client calls, by variant; the default variant first.
        fingerprint: digest of everything that the export depended on.
        fidelity: what the gate measured, by variant.
        unverified: variants that the gate refused and a person installed nevertheless, with the gate's reason.
        aliases: more of the Triton models that a client calls: the default variant with other names of its tensors.
        drafts: the model that drafts, by variant; only of those that have one.
        processor: what it was made for; "": an older export does not say.
        recipes: the recipe that made a variant, where the processor chose one of another name.
        format: of the artefact; 1 where none is written.
        engine: the other engine that the gate ran, with its version; "": ONNX Runtime.
    """

    name: str
    task: str
    triton_models: list[str]
    public_models: dict[str, str]
    fingerprint: str
    fidelity: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    unverified: dict[str, str] = field(default_factory=dict)
    aliases: list[str] = field(default_factory=list)
    drafts: dict[str, str] = field(default_factory=dict)
    processor: str = ""
    recipes: dict[str, str] = field(default_factory=dict)
    format: int = 1
    engine: str = ""

    @property
    def called(self) -> list[str]:
        """Every Triton model that a client calls, the default variant first."""
        return [*self.public_models.values(), *self.aliases]

    def write(self, folder: Path) -> None:
        """Write the manifest into a version folder."""
        text = json.dumps(asdict(self) | {"format": FORMAT}, indent=2)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class DraftSettings:
    """What a version folder says of the graph that drafts.

    Attributes:
        name: the model that it comes from.
        context: tokens of a text that it takes at most.
        longest_run: tokens of a text that it takes at once at most.
    """

    name: str
    context: int
    longest_run: int

    def write(self, folder: Path) -> None:
        """Write it into the graph's folder."""
        (folder / DRAFT_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class VllmBuild:
    """What a version folder says of a model that vLLM computes.

    Attributes:
        version: of the vLLM that the gate ran.
        dtype: the numbers that it computes with, by their name there.
        trust_remote_code: run Python code that lies in the model's folder.
    """

    version: str
    dtype: str
    trust_remote_code: bool = False

    def write(self, version_folder: Path) -> None:
        """Write it into a version folder."""
        (version_folder / VLLM_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_vllm(version_folder: Path) -> VllmBuild:
    """What a version folder says of its model, which vLLM computes.

    Raises:
        OSError, ValueError, TypeError: it says nothing, or something else.
    """
    return VllmBuild(**json.loads((version_folder / VLLM_FILE).read_text(encoding="utf-8")))


def read_draft(version_folder: Path) -> DraftSettings | None:
    """What a version folder says of its draft; None: it has none."""
    try:
        text = (version_folder / DRAFT / DRAFT_FILE).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    return DraftSettings(**json.loads(text))


def manifest_path(repository: Path, name: str) -> Path:
    """The manifest file of a model."""
    return repository / name / VERSION / MANIFEST


def read_manifest(repository: Path, name: str) -> Manifest | None:
    """The manifest of a model; None if it is not exported, not complete, or has another format than this."""
    try:
        manifest = Manifest(**json.loads(manifest_path(repository, name).read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return None
    return manifest if manifest.format == FORMAT else None


def read_manifests(repository: Path) -> list[Manifest]:
    """Every completely exported model of a repository, by name."""
    names = sorted(path.parent.parent.name for path in repository.glob(f"*/{VERSION}/{MANIFEST}"))
    return [manifest for name in names if (manifest := read_manifest(repository, name)) is not None]


def read_failures(repository: Path) -> dict[str, str]:
    """Models whose last export failed, with the reason."""
    try:
        found = json.loads((repository / FAILURES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): str(reason) for name, reason in found.items()} if isinstance(found, dict) else {}


def write_failures(repository: Path, failures: Mapping[str, str]) -> None:
    """Write the file that `read_failures` reads, whole or not at all."""
    path = repository / FAILURES
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(dict(failures), indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def unexported(repository: Path) -> list[str]:
    """Public names of models that have a config and no artefacts: `make export MODEL=name` makes them."""
    exported = {manifest.name for manifest in read_manifests(repository)}
    configured = {path.parent.name for path in repository.glob("*/config.pbtxt") if _is_ours(path)}
    return sorted(name for name in configured - exported if "_" not in name)  # the others are stages and variants


def plain_models(repository: Path) -> list[str]:
    """Models that Trident did not export: they have a version folder and no config of ours."""
    return sorted(
        path.name
        for path in repository.iterdir()
        if any(version.name.isdecimal() and version.is_dir() for version in path.glob("*"))
        and not _is_ours(path / "config.pbtxt")
    )


def loadable(repository: Path) -> list[str]:
    """Every Triton model that can be loaded: those of complete exports, and plain models."""
    exported = {model for manifest in read_manifests(repository) for model in manifest.triton_models}
    return sorted(exported | set(plain_models(repository)))


def _is_ours(config: Path) -> bool:
    try:
        return config.read_text(encoding="utf-8").startswith(CONFIG_HEADER)
    except (FileNotFoundError, NotADirectoryError):
        return False
