"""What an export writes into a model repository, and how a reader knows that it is complete.

Each exported model has a manifest, `<repository>/<name>/<version>/trident.json`, which the export writes last. A
model without one was never exported, or its export was cut off: it is not loaded.

Versions of a model lie side by side. Each has a folder of that number in every Triton model that belongs to it. The
`version_policy` of a config says which one is served; a config without a policy serves version 1, the only one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

VERSION = "1"  # where an export builds; and the version of a model that has one
# The format of an export: the files of a version folder and their contents. Raise it when our code would misread an
# older artefact; tests/unit/test_artefacts.py says when that may be.
FORMAT = 2
MANIFEST = "trident.json"
SIGNATURE = "trident.json.sig"
CONFIG = "config.pbtxt"
# What follows the name of a Triton model that is another one's version, loaded to see whether it can be.
TRIAL = "_trial"
# The file of a repository that says why the last export of a model failed, by its name. The launcher prints it.
FAILURES = ".trident/failures.json"
# The config parameter that says why the gate refused a variant that is served nevertheless.
UNVERIFIED = "unverified"
# The folder in a version folder with the graph that drafts, and the file in it that says what it is.
DRAFT = "draft"
TOWER = "vision.onnx"  # the graph of a causal model's image tower
DRAFT_FILE = "draft.json"
# As protobuf writes it: the versions of a model that a server loads.
_POLICY = re.compile(r"^version_policy \{\n  specific \{\n((?:    versions: \d+\n)+)  \}\n\}\n", re.MULTILINE)
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
        files: the SHA-256 of each file of the version, by "<Triton model>/<path in its version folder>"; {}: an older
            export does not say.
        source: where the weights come from: the keys of models.toml that name it.
        licences: what the source says of its licence: SPDX identifiers, or names as it has them.
        format: of the artefact; 1 where none is written.
        engine: the other engine that the gate ran, with its version; "": ONNX Runtime.
        image_tokens: of a prompt that an image takes at most, marks around it included; 0: it reads none.
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
    files: dict[str, str] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)
    licences: list[str] = field(default_factory=list)
    format: int = 1
    engine: str = ""
    image_tokens: int = 0

    @property
    def digest(self) -> str:
        """What the version is called by its content: the SHA-256 of the names and digests of its files."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest() if self.files else ""

    def files_of(self, model: str) -> dict[str, str]:
        """The digests of one Triton model's files, by their paths in its version folder."""
        start = f"{model}/"
        return {path.removeprefix(start): digest for path, digest in self.files.items() if path.startswith(start)}

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


def served_versions(repository: Path, model: str) -> list[int]:
    """The versions of a Triton model that a server loads, as its config says; [1] where it says nothing."""
    found = _POLICY.search(_read(repository / model / CONFIG))
    return [int(number) for number in re.findall(r"\d+", found[1])] if found else [int(VERSION)]


def is_pinned(repository: Path, model: str) -> bool:
    """Whether a Triton model's config says which version is served, as it does once there has been a second one."""
    return _POLICY.search(_read(repository / model / CONFIG)) is not None


def with_versions(config: str, versions: Iterable[int]) -> str:
    """The text of a config that names a version, with these in its place."""
    lines = "".join(f"    versions: {version}\n" for version in versions)
    text, count = _POLICY.subn(f"version_policy {{\n  specific {{\n{lines}  }}\n}}\n", config, count=1)
    if not count:
        raise ValueError("the config names no version")
    return text


def renamed(config: str, old: str, new: str) -> str:
    """The text of a config under another name of its Triton model."""
    return config.replace(f'name: "{old}"\n', f'name: "{new}"\n', 1)


def signature(repository: Path, model: str) -> dict[str, Any]:
    """The inputs and outputs of a Triton model as its config has them, in the form of Triton's JSON.

    It reads configs as the export and Protocol Buffers' text format lay them out, one field a line. Of another one it
    finds nothing.

    Returns:
        `input` and `output`, [] where it finds none; `max_batch_size` and `model_transaction_policy`.
    """
    text = _read(repository / model / CONFIG)
    batch = re.search(r"^max_batch_size: (\d+)$", text, re.MULTILINE)
    return {
        "input": [_tensor(block) for block in re.findall(r"^input \{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)],
        "output": [_tensor(block) for block in re.findall(r"^output \{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)],
        "max_batch_size": int(batch[1]) if batch else 0,
        "model_transaction_policy": {"decoupled": re.search(r"^  decoupled: true$", text, re.MULTILINE) is not None},
    }


def _tensor(block: str) -> dict[str, Any]:
    """One input or output, of the lines between its braces."""
    fields = re.findall(r'^  (\w+): "?([\w.-]+)"?$', block, re.MULTILINE)
    tensor: dict[str, Any] = {key: value for key, value in fields if key in ("name", "data_type")}
    tensor["dims"] = [int(value) for key, value in fields if key == "dims"]
    return tensor | ({"optional": True} if ("optional", "true") in fields else {})


def named_by_plain_models(repository: Path) -> set[str]:
    """The Triton models that ensembles ask which Trident did not export."""
    texts = (_read(repository / name / CONFIG) for name in plain_models(repository))
    return {name for text in texts for name in re.findall(r'\bmodel_name\s*:\s*"([^"]+)"', text)}


def version_folder(repository: Path, model: str) -> Path:
    """The folder of the version of a Triton model that is served."""
    return repository / model / str(served_versions(repository, model)[-1])


def manifest_path(repository: Path, name: str, version: int | None = None) -> Path:
    """The manifest file of a model's version; None: of the one that is served."""
    folder = version_folder(repository, name) if version is None else repository / name / str(version)
    return folder / MANIFEST


def read_manifest(repository: Path, name: str, version: int | None = None) -> Manifest | None:
    """The manifest of a model; None if it is not exported, not complete, or has another format than this.

    Args:
        version: which one; None: the one that is served.
    """
    try:
        text = manifest_path(repository, name, version).read_text(encoding="utf-8")
        manifest = Manifest(**json.loads(text))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return None
    return manifest if manifest.format == FORMAT else None


def read_versions(repository: Path, name: str) -> dict[int, Manifest]:
    """The manifests of every complete version of a model, the oldest first."""
    numbers = sorted(int(path.parent.name) for path in repository.glob(f"{name}/*/{MANIFEST}") if _is_version(path))
    found = {number: read_manifest(repository, name, number) for number in numbers}
    return {number: manifest for number, manifest in found.items() if manifest is not None}


def read_manifests(repository: Path) -> list[Manifest]:
    """Every completely exported model of a repository as it is served, by name."""
    found = (read_manifest(repository, name) for name in _names(repository))
    return [manifest for manifest in found if manifest is not None]


def _names(repository: Path) -> list[str]:
    return sorted({path.parent.parent.name for path in repository.glob(f"*/*/{MANIFEST}") if _is_version(path)})


def _is_version(manifest: Path) -> bool:
    return manifest.parent.name.isdecimal()


def checksums(root: Path, models: Sequence[str], version: str = VERSION) -> dict[str, str]:
    """The digests of all files of a version but its manifest and signature, as `Manifest.files` has them."""
    found = {}
    for model in sorted(models):
        folder = root / model / version
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.relative_to(folder).as_posix() not in (MANIFEST, SIGNATURE):
                found[f"{model}/{path.relative_to(folder).as_posix()}"] = digest(path)
    return found


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    write_text(path, json.dumps(dict(failures), indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def unexported(repository: Path) -> list[str]:
    """Public names of models that have a config and no artefacts: `make export MODEL=name` makes them."""
    exported = {manifest.name for manifest in read_manifests(repository)}
    configured = {path.parent.name for path in repository.glob(f"*/{CONFIG}") if _is_ours(path)}
    return sorted(name for name in configured - exported if "_" not in name)  # the others are stages and variants


def plain_models(repository: Path) -> list[str]:
    """Models that Trident did not export: they have a version folder and no config of ours."""
    return _plain(repository, _every_version(repository))


def loadable(repository: Path) -> list[str]:
    """Every Triton model that can be loaded: those of complete exports, and plain models."""
    versions = _every_version(repository)
    exported = {
        model
        for version, manifest in versions
        for model in manifest.triton_models
        if version in served_versions(repository, model)
    }
    trials = {path.parent.name for path in repository.glob(f"*{TRIAL}/{CONFIG}") if _is_ours(path)}
    return sorted(exported | trials | set(_plain(repository, versions)))


def _every_version(repository: Path) -> list[tuple[int, Manifest]]:
    return [each for name in _names(repository) for each in read_versions(repository, name).items()]


def _plain(repository: Path, versions: Sequence[tuple[int, Manifest]]) -> list[str]:
    # What belongs to a version that is not served may have no config now.
    ours = {model for _, manifest in versions for model in manifest.triton_models}
    return sorted(
        path.name
        for path in repository.iterdir()
        if path.name not in ours
        and any(version.name.isdecimal() and version.is_dir() for version in path.glob("*"))
        and not _is_ours(path / CONFIG)
    )


def _is_ours(config: Path) -> bool:
    return _read(config).startswith(CONFIG_HEADER)


def _read(config: Path) -> str:
    try:
        return config.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return ""
