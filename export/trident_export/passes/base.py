"""What a pass of a recipe is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx
from numpy.typing import NDArray

from trident_export.unpadding import is_packed

# Inputs of a graph by name, a run each.
Feeds = Iterator[Mapping[str, NDArray[Any]]]
# Some, of so many texts that are drawn by a seed.
Feeder = Callable[[int, int], Feeds]


@dataclass(frozen=True)
class Pass:
    """A pass; its fields are the keys of recipes.toml.

    Attributes:
        nodes: regular expression of the products that it is for, searched in their names.
        refused: devices for which it makes no sense, with the reason.
        for_products: whether it does nothing for a model without products.
    """

    nodes: str = ""
    refused: ClassVar[Mapping[str, str]] = {}
    for_products: ClassVar[bool] = True

    def __post_init__(self) -> None:
        re.compile(self.nodes)

    def apply(
        self, model: onnx.ModelProto, chosen: Sequence[str], feeder: Feeder | None
    ) -> tuple[onnx.ModelProto, set[str]]:
        """The model after the pass, and which of the chosen products it took, so that later passes leave them alone.

        Args:
            model: float32 but for what earlier passes took; it may be changed.
            chosen: names of products, MatMul nodes of an activation and a constant matrix.
            feeder: gives inputs to run the graph with; None where there are none.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Keep(Pass):
    """Products that stay in float32."""

    for_products: ClassVar[bool] = False

    def apply(
        self, model: onnx.ModelProto, chosen: Sequence[str], feeder: Feeder | None
    ) -> tuple[onnx.ModelProto, set[str]]:
        """See `Pass`."""
        return model, set(chosen)


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove weights that no node uses any more."""
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def add_domain(model: onnx.ModelProto) -> None:
    """Say that the model has operators of ONNX Runtime's own."""
    if "com.microsoft" not in [entry.domain for entry in model.opset_import]:
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))


def rank(name: str, types: Mapping[str, onnx.TypeProto.Tensor]) -> int | None:
    """Dimensions of a value; None where nothing says."""
    if is_packed(name):
        return 2
    found = types.get(name)
    return len(found.shape.dim) if found is not None and found.HasField("shape") else None
