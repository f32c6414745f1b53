"""What a manifest says of a model's source: where it comes from, and under which licence."""

from __future__ import annotations

import importlib.metadata
import re
from email.parser import HeaderParser
from pathlib import Path
from typing import TYPE_CHECKING

from trident_export.models_file import ModelSpec

if TYPE_CHECKING:
    from trident_export.huggingface.folder import HuggingFaceFolder  # which imports torch

_CARD = re.compile(r"\A---\s*\n(.*?)\n---", re.DOTALL)
_LICENCE = re.compile(r"^licen[sc]e:[ \t]*(\S.*)$", re.MULTILINE)
_SPDX = {"apache-2.0": "Apache-2.0", "mit": "MIT", "cc-by-4.0": "CC-BY-4.0", "bsd-3-clause": "BSD-3-Clause"}


def source(spec: ModelSpec) -> dict[str, str]:
    """The keys of models.toml that name the source; of a path on this machine its last part only."""
    found = {
        "hub": spec.source.hub,
        "revision": spec.source.revision,
        "package": spec.source.package,
        "sha256": spec.source.sha256,
        "path": spec.source.path if spec.source.package else Path(spec.source.path).name,
        "adapter": Path(spec.source.adapter).name,
        "adapter_revision": spec.source.adapter_revision,
    }
    return {key: value for key, value in found.items() if value}


def licences(spec: ModelSpec, folder: HuggingFaceFolder, cache: Path) -> list[str]:
    """What the source's card, or its package, says of the licence; [] where neither does."""
    if spec.template:
        return []
    return _of_card(folder.path) or _of_package(spec, cache)


def _of_card(folder: Path) -> list[str]:
    try:
        card = _CARD.match((folder / "README.md").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return []
    found = _LICENCE.search(card[1]) if card else None
    return [_spdx(found[1].strip(" \t\"'"))] if found else []


def _of_package(spec: ModelSpec, cache: Path) -> list[str]:
    name, _, version = spec.source.package.partition("==")
    if not name:
        return []
    try:
        stated = dict(importlib.metadata.metadata(name).json)
    except importlib.metadata.PackageNotFoundError:  # one whose data files alone were taken
        pattern = f"sources/{name}-{version}-*/**/*.dist-info/METADATA"
        file = next(iter(sorted(cache.glob(pattern))), None)
        if file is None:
            return []
        headers = HeaderParser().parsestr(file.read_text(encoding="utf-8", errors="replace"))
        stated = {key.lower().replace("-", "_"): value for key, value in headers.items()}
    text = str(stated.get("license_expression") or stated.get("license") or "").strip()
    return [_spdx(text.splitlines()[0])] if text else []


def _spdx(name: str) -> str:
    return _SPDX.get(name.lower(), name)
