"""Commit ids for hub models: `trident-export pin` asks the hub and writes them into models.toml.

An id is only ever written as the hub gave it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from trident_export.errors import SourceError
from trident_export.huggingface.folder import reason
from trident_export.huggingface.sources import adapter_source
from trident_export.models_file import ModelSpec


def resolve(hub_id: str, revision: str = "") -> str:
    """The commit id of a revision on the hub; of the default branch where none is given.

    Raises:
        SourceError: the hub can't be reached, or has no such model.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    try:
        commit: str | None = HfApi().model_info(hub_id, revision=revision or None).sha
    except (HfHubHTTPError, HFValidationError, HTTPError, OSError) as error:
        raise SourceError(f"the Hugging Face hub did not give {hub_id}: {reason(error)}") from None
    if not commit:
        raise SourceError(f"the Hugging Face hub gave no commit id for {hub_id}")
    return commit


def pin(path: Path, specs: list[ModelSpec], resolver: Callable[[str, str], str] = resolve) -> dict[str, str]:
    """Write the commit id of every hub model's default branch into the models file, and of every adapter's.

    Returns:
        The ids by the model's name; an adapter's by that and "adapter".

    Raises:
        SourceError: an id can't be had; the file is left as it was.
    """
    commits = {spec.name: resolver(spec.source.hub, "") for spec in specs if spec.source.hub}
    adapters = {spec.name: resolver(spec.source.adapter, "") for spec in specs if _on_hub(spec, path.parent)}
    text = path.read_text(encoding="utf-8")
    for spec in specs:
        if spec.name in commits:
            text = _with_revision(text, spec, "hub", spec.source.hub, "revision", commits[spec.name])
        if spec.name in adapters:
            key, commit = "adapter_revision", adapters[spec.name]
            text = _with_revision(text, spec, "adapter", spec.source.adapter, key, commit)
    path.write_text(text, encoding="utf-8")
    return commits | {f"{name} adapter": commit for name, commit in adapters.items()}


def _on_hub(spec: ModelSpec, base: Path) -> bool:
    """Whether a spec has an adapter, and no folder has its name."""
    return bool(spec.source.adapter) and bool(adapter_source(spec.source, base).hub)


def _with_revision(text: str, spec: ModelSpec, key: str, hub_id: str, revision: str, commit: str) -> str:
    header, found = re.escape(spec.name), re.escape(hub_id)
    source = re.compile(
        rf'(^\["?{header}"?\]$.*?^source = \{{[^\n]*?\b{key} = "{found}")(, {revision} = "[^"]*")?',
        re.MULTILINE | re.DOTALL,
    )
    changed, count = source.subn(rf'\1, {revision} = "{commit}"', text, count=1)
    if not count:
        raise SourceError(f'[{spec.name}]: write its source as one line, source = {{ {key} = "..." }}, to pin it')
    return changed
