"""What pruning can take away; a module of its own, because torch takes seconds to import."""

from __future__ import annotations

from enum import StrEnum


class Method(StrEnum):
    """What is taken away."""

    MAGNITUDE = "magnitude"
    WANDA = "wanda"
    TWO_OF_FOUR = "2:4"
    HEADS = "heads"
    COLUMNS = "columns"
    LAYERS = "layers"

    @property
    def structured(self) -> bool:
        """Whether the graph gets smaller."""
        return self in (Method.HEADS, Method.COLUMNS, Method.LAYERS)
