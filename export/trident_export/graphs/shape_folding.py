"""Graph passes that make constants of shapes that never change.

Traced models compute `x.view(*hidden.shape[:2], heads, size)` at every run, five nodes and more for a reshape
that only touches the last dimensions, and look up the size of a head for each rotation. Of the 2,272 nodes of
SmolLM2's decode step 900 did that. ONNX's Reshape says "keep this dimension" with a 0, so its shape can be a
constant; so can a size that shape inference knows.
Operator reference: ONNX, Reshape (allowzero=0).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trident_export.graphs.editing import constant, drop_unused, infer, numbers

KEPT = 2  # batch and sequence


def fold_shapes(model: ir.Model) -> int:
    """Both passes, in place; returns how many reshapes and sizes became constants.

    A graph with branches or loops stays as it is: what their bodies use does not show in the nodes' inputs.
    """
    if any(True for _ in model.graph.subgraphs()):
        return 0
    changed = fold_reshapes(model) + fold_sizes(model)
    drop_unused(model)
    return changed


def fold_sizes(model: ir.Model) -> int:
    """Replace Gather(Shape(x), index), where x has a known size there; returns how many were replaced."""
    types = infer(model)
    changed = 0
    for node in list(model.graph):
        index = _scalar(node.inputs[1]) if node.op_type == "Gather" and _made_by(node.inputs[0], "Shape") else None
        if index is None:
            continue
        shape = types[node.inputs[0].producer().inputs[0].name].shape or []
        if -len(shape) <= index < len(shape) and isinstance(shape[index], int) and shape[index] > 0:
            (value,) = node.outputs
            size = np.full(numbers(node.inputs[1]).shape, shape[index], np.int64)  # type: ignore[union-attr]
            value.replace_all_uses_with(constant(model.graph, value.name, size))
            changed += 1
    return changed


def fold_reshapes(model: ir.Model) -> int:
    """Give every reshape that keeps batch and sequence a constant shape; returns how many were changed.

    A reshape counts where its shape is put together from the first two sizes of a tensor and constants, and
    its data has three dimensions or more.
    """
    types = infer(model)
    changed = 0
    for node in model.graph:
        sizes = types[node.inputs[0].name].shape or [] if node.op_type == "Reshape" else []
        # Where the second is known, the data has no positions there: those of the shape are another tensor's.
        if len(sizes) <= KEPT or isinstance(sizes[1], int):
            continue
        shape = _kept_shape(node.inputs[1])
        if shape is not None:
            name = f"{node.outputs[0].name}_shape"
            node.replace_input_with(1, constant(model.graph, name, np.array(shape, np.int64)))
            changed += 1
    return changed


def _kept_shape(value: ir.Value) -> list[int] | None:
    """The shape as constants with zeros for batch and sequence; None where it is anything else."""
    if not _made_by(value, "Concat"):
        return None
    shape: list[int] = []
    for position, size in enumerate(value.producer().inputs):
        known = numbers(size)
        if position < KEPT:
            if _size_of(size) != position:
                return None
            shape.append(0)
        elif known is not None:
            shape += [int(number) for number in known.reshape(-1)]
        else:
            return None
    return shape if len(shape) > KEPT and 0 not in shape[KEPT:] else None


def _size_of(value: ir.Value) -> int | None:
    """Which dimension of some tensor this is the size of: Unsqueeze(Gather(Shape(x), index))."""
    index = None
    for wanted in ("Unsqueeze", "Gather", "Shape"):
        if not _made_by(value, wanted):
            return None
        node = value.producer()
        index = _scalar(node.inputs[1]) if wanted == "Gather" else index
        value = node.inputs[0]
    return index


def _made_by(value: ir.Value, kind: str) -> bool:
    return value.producer() is not None and value.producer().op_type == kind


def _scalar(value: ir.Value) -> int | None:
    found = numbers(value)
    return int(found.reshape(-1)[0]) if found is not None and found.size == 1 else None
