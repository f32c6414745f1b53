"""Reads dataclasses from tables (TOML), files (JSON) and texts (the parameters of a config), and writes files."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trident_serving.errors import ReadingError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
LARGEST = 2**31 - 1  # of a whole number: most of them are tensors' sizes, or bound an INT32


class JsonObject(str):
    """A JSON object as its text, which a dataclass, a config's parameter and a key of models.toml can hold.

    Raises:
        ReadingError: it is no JSON object.
    """

    def __new__(cls, value: object = "{}") -> JsonObject:
        """From the text, or from a table."""
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ReadingError(f"must be a table or the text of a JSON object, found {value!r}")
        return str.__new__(cls, text)

    @property
    def values(self) -> dict[str, Any]:
        """What it holds."""
        found: dict[str, Any] = json.loads(self)
        return found


def read(kind: type[T], table: object, where: str, *, positive: bool = True) -> T:
    """A dataclass from a table, whose values must have the types of its fields. A list becomes a tuple.

    Args:
        kind: the dataclass; its own checks may raise ReadingError too.
        where: what the message begins with.
        positive: whether an integer must be 1 or more, or what its field's metadata names as `least`.

    Raises:
        ReadingError: a key is unknown or missing, or a value has another type.
    """
    if not isinstance(table, Mapping):
        raise ReadingError(f"{where} must be a table, found {table!r}")
    check_keys(where, table, kind)
    hints = typing.get_type_hints(kind)
    known = {field.name: field for field in _fields(kind)}
    values = {
        key: _value(f"{where}.{key}", value, hints[key], known[key].metadata.get("least", 1) if positive else None)
        for key, value in table.items()
    }
    return _built(kind, values, f"{where}.")


def read_parameters(kind: type[T], texts: Mapping[str, str]) -> T:
    """A dataclass from the parameters of a config, which are texts; other parameters are ignored.

    Raises:
        ReadingError: a parameter is missing, or is not a value of its field.
    """
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for field in _fields(kind):
        if field.name not in texts and not _required(field):
            continue
        text, where = texts.get(field.name, ""), f"parameter {field.name!r}"
        found: Any = text
        if hints[field.name] is bool:
            if text not in ("true", "false"):
                raise ReadingError(f"{where} must be true or false, found {text!r}")
            found = text == "true"
        elif hints[field.name] is int:
            found = int(text) if text.isdecimal() else text
        elif typing.get_origin(hints[field.name]) is tuple:
            found = [int(item) if item.isdecimal() else item for item in text.split(",")]
        values[field.name] = _value(where, found, hints[field.name], field.metadata.get("least", 1))
    return _built(kind, values, "parameter ")


def load(kind: type[T], file: Path) -> T:
    """A dataclass from a JSON file that `save` wrote.

    Raises:
        ReadingError: the file holds something else.
        OSError: it can't be read.
    """
    return read(kind, json.loads(file.read_text(encoding="utf-8")), file.name, positive=False)


def save(value: DataclassInstance, file: Path) -> None:
    """Write a dataclass as a JSON file."""
    file.write_text(json.dumps(asdict(value), ensure_ascii=False) + "\n", encoding="utf-8")


def check_keys(where: str, table: Mapping[str, Any], kind: type[Any]) -> None:
    """Check that a table has the keys of a dataclass, and no others.

    Raises:
        ReadingError: a key is unknown or missing.
    """
    known = [field.name for field in _fields(kind)]
    if unknown := sorted(set(table) - set(known)):
        raise ReadingError(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(known)}")
    if missing := [field.name for field in _fields(kind) if _required(field) and field.name not in table]:
        raise ReadingError(f"{where}: {', '.join(missing)} is missing")


def _fields(kind: type[Any]) -> tuple[Field[Any], ...]:
    return fields(kind)


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _built(kind: type[T], values: dict[str, Any], where: str) -> T:
    try:
        return kind(**values)
    except ReadingError as error:
        raise ReadingError(f"{where}{error}") from None


def _value(where: str, value: Any, hint: Any, least: int | None) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        wanted = [argument for argument in arguments if argument is not type(None)]
        return None if value is None else _value(where, value, wanted[0] if len(wanted) == 1 else object, least)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ReadingError(f"{where} must be list, found {value!r}")
        return tuple(_value(where, item, arguments[0], least) for item in value)
    if hint is int:
        if type(value) is not int or (least is not None and value < least):
            least_of = {None: "int", 1: "a positive integer"}
            wanted_number = least_of.get(least, f"an integer, {least} or more")
            raise ReadingError(f"{where} must be {wanted_number}, found {value!r}")
        if value > LARGEST:
            raise ReadingError(f"{where} must be at most {LARGEST}, found {value}")
        return value
    if hint is JsonObject:
        try:
            return JsonObject(value)
        except ReadingError as error:
            raise ReadingError(f"{where} {error}") from None
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        if value not in list(hint):
            raise ReadingError(f"{where} must be one of {', '.join(hint)}, found {value!r}")
        return hint(value)
    if hint in (bool, str, float) and type(value) is not hint:
        raise ReadingError(f"{where} must be {hint.__name__}, found {value!r}")
    return value
