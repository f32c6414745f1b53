"""Labels that a guard's rules name, beside those that their models have.

A model of entities names in its answers only what it finds, so what it could find is read from its artefacts.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection
from pathlib import Path

from trident_serving import artefacts
from trident_serving.encoders import entities
from trident_serving.encoders.labels import LabelSettings
from trident_serving.errors import ServingError
from trident_serving.guard.rules import Rule
from trident_serving.schema.fields import Aggregation

_NAMED = 30  # labels of a sentence
_SECONDS = 10  # until a rule that was right is compared again: another version of its model may have other labels
_AGGREGATION = re.compile(r'key: "aggregation"\s+value \{\s+string_value: "(\w+)"')


def of_model(repository: Path, model: str) -> list[str] | None:
    """The labels of a served model, as its answers have them; None: it has none, or is not exported there.

    Args:
        model: its public name.
    """
    for manifest in artefacts.read_manifests(repository):
        if model not in manifest.public_models.values():
            continue
        folder = artefacts.version_folder(repository, f"{manifest.name}_postprocess")
        try:
            labels = LabelSettings.load(folder).labels
        except FileNotFoundError:
            return None
        if manifest.task != entities.TASK.name:
            return [*labels]
        named = _AGGREGATION.search((folder.parent / artefacts.CONFIG).read_text(encoding="utf-8"))
        return entities.kinds(labels, Aggregation(named[1]) if named else Aggregation.SIMPLE)
    return None


def unknown(rule: Rule, known: Collection[str]) -> str:
    """A sentence that names a rule's label which its model does not have; "": it has all."""
    for label in rule.labels:
        if label not in known:
            names = [*known][:_NAMED]
            more = f" and {len(known) - len(names)} more" if len(known) > len(names) else ""
            return f"{rule.model} has no label {label!r}, its labels are {', '.join(names)}{more}"
    return ""


class Labels:
    """Compares rules of entities with the labels of their models.

    Args:
        repository: that has the models; None: it is not known, and no rule is refused.
    """

    def __init__(self, repository: Path | None) -> None:
        self._repository = repository
        self._right: dict[str, float] = {}

    def check(self, rule: Rule) -> None:
        """Refuse a rule that would find nothing, ever. A classifier's answer names all of its classes by itself.

        Raises:
            ServingError: its model has no such label.
        """
        if self._repository is None or not rule.entities or not rule.labels:
            return
        if self._right.get(rule.name, 0.0) > (now := time.monotonic()):
            return
        known = of_model(self._repository, rule.model)
        if known is None:
            return
        if said := unknown(rule, known):
            raise ServingError(said)
        self._right[rule.name] = now + _SECONDS
