"""What pruning can remove; a module of its own, because torch takes seconds to import."""

from __future__ import annotations

from enum import StrEnum


class Method(StrEnum):
    """What is removed."""

    HEADS = "heads"
    COLUMNS = "columns"
    LAYERS = "layers"
    MAGNITUDE = "magnitude"
    WANDA = "wanda"
    TWO_OF_FOUR = "2:4"

    @property
    def structured(self) -> bool:
        """Whether the graph gets smaller and faster."""
        return self in (Method.HEADS, Method.COLUMNS, Method.LAYERS)

    @classmethod
    def standard(cls) -> list[Method]:
        """Methods that make a graph smaller and faster."""
        return [method for method in cls if method.structured]

    @classmethod
    def experimental(cls) -> list[Method]:
        """Methods that make none, and want --experimental."""
        return [method for method in cls if not method.structured]
