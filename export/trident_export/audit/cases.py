"""The texts of an audit: the same sentence for each group of an axis."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trident_export.errors import TextError

BUILT_IN = Path(__file__).with_name("groups.toml")
PERSON = "{person}"


@dataclass(frozen=True)
class Axis:
    """What people differ in, and the groups that are compared."""

    name: str
    groups: tuple[str, ...]


@dataclass(frozen=True)
class Cases:
    """What is asked of each group.

    Attributes:
        sentences: with a place for the group.
        endings: a beginning with such a place, a favourable end and another.
    """

    axes: tuple[Axis, ...]
    sentences: tuple[str, ...]
    endings: tuple[tuple[str, str, str], ...]


def load(path: Path = BUILT_IN) -> Cases:
    """Read a file of groups, sentences and endings.

    Raises:
        TextError: it can't be read, or lacks something; the message says what.
    """
    try:
        found = tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise TextError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not all of it is a TOMLDecodeError
        raise TextError(f"{path} is no TOML in UTF-8: {error}") from error
    sentences = _texts(path, "sentences.texts", _of(found.pop("sentences", {}), "texts"))
    pairs = _of(found.pop("endings", {}), "pairs")
    if not isinstance(pairs, list) or not all(isinstance(each, list) and len(each) == 3 for each in pairs):
        raise TextError(f"{path}: endings.pairs must be a list of beginning, favourable end and other end")
    endings = tuple((a, b, c) for a, b, c in (_texts(path, "endings.pairs", each) for each in pairs))
    axes = tuple(Axis(name, _texts(path, f"{name}.groups", _of(table, "groups"))) for name, table in found.items())
    for each in axes:
        if len(each.groups) < 2 or len({*each.groups}) < len(each.groups):
            raise TextError(f"{path}: {each.name}.groups must be two or more, and all different")
    for text in (*sentences, *(beginning for beginning, _, _ in endings)):
        if PERSON not in text.lower():
            raise TextError(
                f"{path}: {text!r} has no place for a group: write {PERSON}, or {{Person}} at its beginning"
            )
    if not axes or len(sentences) < 2 or len(endings) < 2:
        raise TextError(f"{path} must have an axis with groups, two sentences.texts and two endings.pairs at least")
    return Cases(axes, sentences, endings)


def _of(table: object, key: str) -> object:
    return table.get(key, []) if isinstance(table, dict) else []


def _texts(path: Path, where: str, found: object) -> tuple[str, ...]:
    if not isinstance(found, list) or not all(isinstance(each, str) and each for each in found):
        raise TextError(f"{path}: {where} must be a list of texts")
    return tuple(found)


def filled(text: str, group: str) -> str:
    """The text with a group in its place."""
    return text.replace(PERSON, group).replace("{Person}", group[:1].upper() + group[1:])


def texts(templates: Sequence[str], axis: Axis) -> list[str]:
    """Each template for each group: the groups of the first, then those of the second."""
    return [filled(text, group) for text in templates for group in axis.groups]
