"""Texts that know which of their characters a template wrote, and which came from a request.

A template cuts, trims and joins the texts that it gets. Each character's origin goes along, so that in the prompt a
control token of the template can be told from one that a message holds. `Traced` is a `str`: it is equal to, and
hashes as, the same text without origins, and a template can't see the difference.

What an operation that is not followed makes of a request's text is UNKNOWN; `trident_serving.runtime.control_tokens`
says what that means.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, SupportsIndex

TEMPLATE, DATA, UNKNOWN = b"\x00", b"\x01", b"\x02"


class Traced(str):
    """A text with the origin of each of its characters.

    Args:
        text: the text.
        origins: a byte for each character; None: UNKNOWN.
    """

    __slots__ = ("_origins",)
    _origins: bytes

    def __new__(cls, text: str = "", origins: bytes | None = None) -> Traced:
        """See the class."""
        self = str.__new__(cls, text)
        self._origins = UNKNOWN * len(self) if origins is None else origins
        return self

    def __str__(self) -> Traced:
        return self

    def __getitem__(self, key: SupportsIndex | slice) -> Traced:
        text = str.__getitem__(self, key)
        if isinstance(key, slice):
            return Traced(text, self._origins[key])
        return Traced(text, bytes([self._origins[key]]))

    def __iter__(self) -> Iterator[Traced]:
        for character, origin in zip(str.__iter__(self), self._origins, strict=True):
            yield Traced(character, bytes([origin]))

    def __add__(self, other: str) -> Traced:
        if not isinstance(other, str):
            return NotImplemented
        return Traced(str.__add__(self, other), self._origins + origins_of(other))

    def __radd__(self, other: str) -> Traced:
        if not isinstance(other, str):
            return NotImplemented
        return Traced(str.__add__(other, self), origins_of(other) + self._origins)

    def __mul__(self, count: SupportsIndex) -> Traced:
        return Traced(str.__mul__(self, count), self._origins * count.__index__())

    __rmul__ = __mul__

    def join(self, items: Iterable[str]) -> Traced:
        """See `str.join`."""
        every = list(items)
        return Traced(str.join(self, every), self._origins.join(map(origins_of, every)))

    def strip(self, characters: str | None = None) -> Traced:
        """See `str.strip`."""
        return self.lstrip(characters).rstrip(characters)

    def lstrip(self, characters: str | None = None) -> Traced:
        """See `str.lstrip`."""
        return self[len(self) - len(str.lstrip(self, characters)) :]

    def rstrip(self, characters: str | None = None) -> Traced:
        """See `str.rstrip`."""
        return self[: len(str.rstrip(self, characters))]

    def removeprefix(self, prefix: str, /) -> Traced:
        """See `str.removeprefix`."""
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> Traced:
        """See `str.removesuffix`."""
        return self[: len(self) - len(suffix)] if suffix and self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        """See `str.split`."""
        return list(self._found(str.split(self, sep, maxsplit), sep))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        """See `str.rsplit`."""
        return list(self._found(str.rsplit(self, sep, maxsplit), sep))

    def splitlines(self, keepends: bool = False) -> list[Any]:
        """See `str.splitlines`."""
        whole = self._found(str.splitlines(self, keepends=True), "")
        return [line[: len(kept)] for line, kept in zip(whole, str.splitlines(self, keepends), strict=True)]

    def partition(self, sep: str, /) -> tuple[Any, Any, Any]:
        """See `str.partition`."""
        before, middle, after = self._found(str.partition(self, sep), "")
        return before, middle, after

    def rpartition(self, sep: str, /) -> tuple[Any, Any, Any]:
        """See `str.rpartition`."""
        before, middle, after = self._found(str.rpartition(self, sep), "")
        return before, middle, after

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> Traced:
        """See `str.replace`."""
        if not old:
            return Traced(str.replace(self, old, new, count))
        return Traced(new, origins_of(new)).join(self.split(old, count))

    def lower(self) -> Traced:
        """See `str.lower`."""
        return self._changed(str.lower(self))

    def upper(self) -> Traced:
        """See `str.upper`."""
        return self._changed(str.upper(self))

    def title(self) -> Traced:
        """See `str.title`."""
        return self._changed(str.title(self))

    def capitalize(self) -> Traced:
        """See `str.capitalize`."""
        return self._changed(str.capitalize(self))

    def _changed(self, text: str) -> Traced:
        return Traced(text, self._origins if len(text) == len(self) else None)

    def _found(self, parts: Iterable[str], separator: str | None) -> Iterator[Traced]:
        """The parts that `str` makes of this text, with their origins; they come one after the other."""
        position = 0
        for part in parts:
            start = str.find(self, part, position) if separator is None else position
            yield self[start : start + len(part)]
            position = start + len(part) + len(separator or "")


def origins_of(text: str) -> bytes:
    """The origin of each character; a text without origins is the template's."""
    return text._origins if isinstance(text, Traced) else TEMPLATE * len(text)


def plain(text: str) -> str:
    """A text without its origins."""
    return str.__str__(text)


def data(value: Any) -> Any:
    """A value of JSON whose texts, keys included, come from a request."""
    if isinstance(value, str):
        return Traced(value, DATA * len(value))
    if isinstance(value, Mapping):
        return {data(key): data(item) for key, item in value.items()}
    return [data(item) for item in value] if isinstance(value, list) else value


def texts(value: Any) -> Iterator[str]:
    """Every text in a value of JSON, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts(item)


def from_request(*values: Any) -> bool:
    """Whether something in the values may come from a request."""
    for value in values:
        if isinstance(value, str):
            if isinstance(value, Traced) and value._origins.strip(TEMPLATE):
                return True
        elif isinstance(value, Mapping):
            if from_request(*value.keys(), *value.values()):
                return True
        elif isinstance(value, list | tuple):
            if from_request(*value):
                return True
        elif not isinstance(value, int | float | None):
            return True  # a generator that has been read, or an object of Jinja
    return False


def text_of(value: Any) -> str:
    """A value as a template shows it: a list or an object of a request's texts is a text of unknown origin."""
    if isinstance(value, str):
        return value
    return Traced(str(value)) if from_request(value) else str(value)


def concat(items: Iterable[Any]) -> str:
    """Values as one text; with origins if one of them has some."""
    every = [text_of(item) for item in items]
    if not any(isinstance(item, Traced) for item in every):
        return "".join(every)
    return Traced("", b"").join(every)
