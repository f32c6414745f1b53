"""A graph pass: no matmul has a single row.

Some processors sum a single row in another order than several (decision 0007 has it of 4-bit weights), and a graph is
served on others than it was exported on. So where a matmul has a row for each image or text, each row runs twice: what
it gives then does not depend on whether the image is alone.
"""

from __future__ import annotations

import onnx_ir as ir

from trident_export.graphs.editing import make, rank_of_weight, replace
from trident_export.graphs.unpadding import is_packed
from trident_export.passes.base import ranks


def with_two_rows(model: ir.Model) -> int:
    """Let matmuls of a row for each image or text run on each row twice; returns how many there were."""
    graph, found = model.graph, 0
    known = ranks(model)
    for node in list(graph):
        if node.op_type not in ("MatMul", "Gemm") or rank_of_weight(node.inputs[1]) != 2:
            continue
        source, (output,) = node.inputs[0], node.outputs
        if is_packed(source.name) or known.get(source.name) != 2:
            continue
        name = output.name
        twice = make("Concat", [source, source], f"{name}/twice", axis=0)
        matmul = ir.Node(
            node.domain,
            node.op_type,
            [*twice.outputs, *node.inputs[1:]],
            list(node.attributes.values()),
            outputs=[ir.Value(name=f"{name}/both")],
            name=node.name,
        )
        halves = [ir.Value(name=name), ir.Value(name=f"{name}/again")]
        split = ir.node("Split", list(matmul.outputs), {"axis": 0}, outputs=halves, name=f"{name}/split")
        replace(node, [twice, matmul, split])
        found += 1
    return found
