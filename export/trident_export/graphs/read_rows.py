"""A graph pass for decoders: behind the last attention only the tokens whose logits are wanted are computed.

A prompt needs the keys and values of all its tokens in every layer, and logits of its last token. So what stands
between the last layer's attention and the logits (output projection, residual, norms, the MLP) has one row to compute
and not as many as the prompt has tokens; of a chunk that does not end its prompt it has none. In the traced graph the
choice of the wanted tokens stands before the head. Here it moves up, over nodes that compute each row from that row
only and whose output nothing else reads, up to the layer's attention and its residual.

It is the last pass of all, so calibration sees the layer's every row, and no other pass has to know of it.
"""

from __future__ import annotations

import onnx_ir as ir

from trident_export.graphs.editing import drop_unused, make, numbers

_SELECTION, _PLACES = "logits_tokens", "attention_places"
_PREFIX = "read_rows"
# Inputs and outputs have their rows on one axis, whichever that is.
_ROW_BY_ROW = frozenset(
    """
    Abs Add Cast Div Erf Exp FastGelu Gelu Identity Mul Neg Pow QuickGelu Reciprocal Relu Sigmoid
    SimplifiedLayerNormalization SkipSimplifiedLayerNormalization SkipLayerNormalization Softplus Sqrt Sub Tanh Where
    """.split()  # noqa: SIM905  (one name a line would hide the rest of the module)
)
_LAST_AXIS = frozenset(("Concat", "LayerNormalization", "Softmax", "Split"))  # where `axis` says so
_PRODUCTS = frozenset(("MatMul", "MatMulIntegerToFloat", "MatMulNBits"))  # of rows and a constant matrix


def compute_read_rows(model: ir.Model) -> int:
    """Move the choice of the wanted tokens up, in place; returns over how many nodes.

    A graph that has it elsewhere than before its head, as one that does not run packed, is left as it is.
    """
    graph = model.graph
    chosen = next((value for value in graph.inputs if value.name == _SELECTION), None)
    readers = [] if chosen is None else list(chosen.consumers())
    if len(readers) != 1 or readers[0].op_type != "Gather" or readers[0].attributes.get_int("axis", 0) != 1:
        return 0
    (choice,) = readers
    given = _from_tokens(graph)
    rows = {choice.inputs[0]: 1}  # values that are to have the wanted rows only, with the axis of these
    region: set[ir.Node] = set()
    for node in reversed(list(graph)):
        outputs = [value for value in node.outputs if value.uses()]
        axes = {rows[value] for value in outputs if value in rows}
        if not axes or len(axes) > 1 or any(value.is_graph_output() for value in node.outputs):
            continue
        if any(reader not in region and reader is not choice for value in outputs for reader in value.consumers()):
            continue
        (axis,) = axes
        needed = _inputs_by_row(node, axis, given)
        if needed is None or any(rows.get(value, at) != at for value, at in needed.items()):
            continue
        region.add(node)
        rows |= needed
    if not region:
        return 0
    _rewrite(graph, choice, chosen, region, rows)
    drop_unused(model)
    return len(region)


def _rewrite(
    graph: ir.Graph, choice: ir.Node, chosen: ir.Value, region: set[ir.Node], rows: dict[ir.Value, int]
) -> None:
    made: dict[ir.Value, ir.Value] = {}
    for node in [node for node in graph if node in region]:
        for position, value in enumerate(node.inputs):
            if value is None or value not in rows or value.producer() in region:
                continue
            if node.op_type == "GatherND" and value.name != _PLACES:
                continue
            if value not in made:
                gather = make("Gather", [value, chosen], f"{_PREFIX}/{value.name}", axis=rows[value])
                if value.producer() is None:
                    graph.insert_before(graph[0], [gather])
                else:
                    value.producer().append(gather)
                made[value] = gather.outputs[0]
            node.replace_input_with(position, made[value])
    choice.outputs[0].replace_all_uses_with(choice.inputs[0])
    graph.remove(choice, safe=True)
    graph.sort()


def _inputs_by_row(node: ir.Node, axis: int, given: set[ir.Value]) -> dict[ir.Value, int] | None:
    """Which inputs have a row for each row of the output, and on which axis; None where that is not known.

    Args:
        axis: of the output's rows.
        given: values that are computed from the tokens; others are the same for all of them.
    """
    kind, (first, *others) = node.op_type, node.inputs
    varying = [value for value in node.inputs if value in given]
    if kind == "GatherND":
        return {others[0]: 1} if axis == 1 and others[0].name == _PLACES else None
    if kind == "Gather":  # the table's rows of some indices
        return {others[0]: axis} if first not in given and not node.attributes.get_int("axis", 0) else None
    if kind in _PRODUCTS:
        return {first: axis} if varying == [first] else None
    if kind in _ROW_BY_ROW or (kind in _LAST_AXIS and node.attributes.get_int("axis", 0) == -1):
        return dict.fromkeys(varying, axis)
    if kind == "Slice":
        axes = numbers(others[2]) if len(others) > 2 else None
        return {first: axis} if varying == [first] and axes is not None and axes.tolist() in ([-1], [2]) else None
    if kind in ("ReduceMax", "ReduceMean"):
        axes = numbers(others[0]) if others else node.attributes.get_ints("axes", [])
        last = axes is not None and list(axes) == [-1] and node.attributes.get_int("keepdims", 1) == 1
        return {first: axis} if last else None
    if kind == "Reshape":  # [1, rows, 1] to [rows]
        shape = numbers(others[0])
        return {first: 1} if axis == 0 and shape is not None and shape.tolist() == [-1] else None
    if kind == "QuantizeLinear":  # each row with a scale and a zero point of its own
        own = node.attributes.get_int("axis", 1) == axis == 1 and all(value in given for value in others)
        return {first: 1} | dict.fromkeys(others, 0) if own else None
    return None


def _from_tokens(graph: ir.Graph) -> set[ir.Value]:
    found = set(graph.inputs)
    for node in graph:
        if not found.isdisjoint(node.inputs):
            found.update(node.outputs)
    return found
