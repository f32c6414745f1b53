"""A graph pass for encoders: nothing is computed for padding.

A batch of texts is padded to one length, and on a CPU the padding costs as much as the texts. What an encoder does
token by token (matmuls with weights, biases, activations, norms, residuals) is computed for the real tokens, one
after another. So is attention that is traced as an operator (see `attention`); where it is not, the tokens are spread
over the batch again. The graph's inputs and outputs stay as they were. Behind a text's last token its outputs repeat
that token's.

Which nodes those are is found from the matmuls and tables: a matmul of a three-dimensional activation with a
two-dimensional weight works on [batch, sequence, features], a table's rows are read for [batch, sequence] ids, and from
there the region grows over operators that do not mix tokens.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trident_export.graphs.editing import constant, infer, make

_ELEMENTWISE = frozenset(
    ("Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Erf", "Tanh", "Relu", "Sigmoid", "Gelu", "Softplus", "Identity", "Neg")
)
_LAST_AXIS = frozenset(("LayerNormalization", "TopK", "ReduceLogSumExp", "ReduceMean", "Softmax"))
_PREFIX = "unpadded"
# Our own operator, see `attention`: it reads the real tokens of all texts, and knows by itself where each text ends.
TEXT_ATTENTION = "TextAttention"
_HEADS = 3  # queries, keys and values


def unpad(model: ir.Model, mask: str = "attention_mask", begin: ir.Node | None = None) -> int:
    """Apply the pass in place; returns how many nodes work on real tokens only.

    Args:
        mask: the value that is 1 for tokens and 0 for padding.
        begin: what gives the first numbers that are [batch, sequence, features]; None: what reads `input_ids`.
    """
    graph = model.graph
    types = infer(model)
    sources = begin.outputs if begin is not None else [value for value in graph.inputs if value.name == "input_ids"]
    data = _depends_on(graph, set(sources))

    def is_matmul(node: ir.Node) -> bool:
        if node.op_type != "MatMul" or node.inputs[0] not in data or constant_rank(node.inputs[1]) != 2:
            return False
        shape = types[node.inputs[0].name].shape
        return shape is not None and len(shape) == 3

    def is_embedding(node: ir.Node) -> bool:
        if node.op_type != "Gather" or node.attributes.get_int("axis", 0) or constant_rank(node.inputs[0]) != 2:
            return False
        shape = types[node.inputs[1].name].shape
        return shape is not None and shape == types[mask].shape  # not those of pairs of positions

    def is_row(value: ir.Value) -> bool:
        shape = types[value.name].shape
        if constant_rank(value) is not None or shape is None or len(shape) != 3:
            return False
        return shape[0] == 1 or _is_read_for_one_row(value)

    rows = {value for node in graph for value in node.outputs if is_row(value)}

    def grown(seeds: set[ir.Node]) -> set[ir.Node]:
        region, tokens = set(seeds), {value for node in seeds for value in node.outputs}
        tokens |= {value for node in seeds for value in _token_inputs(node)}  # known to be [batch, sequence, ...]
        grows = True
        while grows:
            grows = False
            for node in graph:
                if node not in region and _keeps_tokens_apart(node, tokens, rows):
                    region.add(node)
                    tokens.update(node.outputs)
                    grows = True
        return region

    core = grown({node for node in graph if node is begin or is_matmul(node) or node.op_type == TEXT_ATTENTION})
    region = grown(core | {node for node in graph if is_embedding(node)})
    later = _depends_on(graph, {value for node in core for value in node.outputs})
    for node in reversed([node for node in graph if node in region - core and later.isdisjoint(node.inputs)]):
        readers = [user for value in node.outputs for user, _ in value.uses()]
        if not region.issuperset(readers) or any(value.is_graph_output() for value in node.outputs):
            region.remove(node)  # it would be spread over the batch again, which gains nothing
    if region:
        _rewrite(graph, region, mask, rows)
    return len(region)


def _is_read_for_one_row(value: ir.Value) -> bool:
    """Whether these are rows of a table for the beginning of a constant row of ids, which inference does not see."""
    table = value.producer()
    if table is None or table.op_type != "Gather" or constant_rank(table.inputs[0]) != 2:
        return False
    cut = table.inputs[1].producer()
    if cut is None or cut.op_type != "Slice" or len(cut.inputs) < 4:
        return False
    ids, axes = (ir.convenience.get_const_tensor(cut.inputs[position]) for position in (0, 3))
    return ids is not None and axes is not None and ids.shape[0] == 1 and axes.numpy().tolist() == [1]


def _token_inputs(node: ir.Node) -> tuple[ir.Value, ...]:
    """What a node that the region grows from reads of tokens; ids are none, whose padding other nodes look for."""
    if node.op_type == "Gather":
        return ()
    return tuple(node.inputs[: _HEADS if node.op_type == TEXT_ATTENTION else 1])


def constant_rank(value: ir.Value | None) -> int | None:
    """Number of dimensions of a constant; None for anything else. A weight that two layers share is an Identity."""
    if value is not None and value.producer() is not None and value.producer().op_type == "Identity":
        return constant_rank(value.producer().inputs[0])
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else len(tensor.shape)


def _keeps_tokens_apart(node: ir.Node, known: set[ir.Value], rows: set[ir.Value]) -> bool:
    """Whether a node computes each token's output from that token only.

    Args:
        known: values that are [batch, sequence, ...].
        rows: values that are [1, sequence, features], such as vectors of positions.
    """
    if node.op_type in _LAST_AXIS:
        attributes = [node.attributes[name] for name in ("axis", "axes") if name in node.attributes]
        axes = [axis for a in attributes for axis in (a.as_ints() if a.name == "axes" else [a.as_int()])]
        # An axis that is an input, of later opsets, is -1 wherever this exporter writes one.
        keeps = node.op_type != "ReduceMean" or node.attributes.get_int("keepdims", 1) == 1
        return node.inputs[0] in known and all(axis == -1 for axis in axes) and keeps
    if node.op_type not in _ELEMENTWISE:
        return False
    inputs = [value for value in node.inputs if value is not None]
    return not known.isdisjoint(inputs) and all(
        value in known or value in rows or constant_rank(value) in (0, 1) for value in inputs
    )


def _depends_on(graph: ir.Graph, sources: set[ir.Value]) -> set[ir.Value]:
    """All values that depend on the numbers of some, not only on their shapes, and these."""
    found = set(sources)
    for node in graph:
        if node.op_type != "Shape" and found.intersection(node.inputs):
            found.update(node.outputs)
    return found


def _rewrite(graph: ir.Graph, region: set[ir.Node], mask: str, rows: set[ir.Value]) -> None:
    where = _indices(graph, mask)
    read: dict[ir.Value, ir.Value] = {}  # values from outside, to what the region reads instead
    inside = {output for node in region for output in node.outputs}
    for node in [node for node in graph if node in region]:
        for position, value in enumerate(node.inputs):
            if value is None or value in inside or constant_rank(value) is not None:
                continue
            if node.op_type == TEXT_ATTENTION and position >= _HEADS:  # of pairs of tokens, by text
                continue
            if value not in read:
                made = _pack(value, where, of_all_texts=value in rows)
                node.prepend(made)
                read[value] = made[-1].outputs[0]
            node.replace_input_with(position, read[value])
        for value in node.outputs:
            readers = [(user, position) for user, position in value.uses() if user not in region]
            if readers or value.is_graph_output():
                made = _spread(value, where)
                node.append(made)
                spread = made[-1].outputs[0]
                spread.type, spread.shape = value.type, value.shape
                for user, position in readers:
                    user.replace_input_with(position, spread)
                for position, output in enumerate(graph.outputs):
                    if output is value:
                        graph.outputs[position] = spread
            value.name = packed(value.name)
            value.type = value.shape = None  # what the file says is of the padded value


def packed(name: str) -> str:
    """What the pass calls a value that holds real tokens only."""
    return f"{_PREFIX}/{name}"


def is_packed(name: str) -> bool:
    """Whether a value of a graph after the pass holds real tokens only, [tokens, features]."""
    return name.startswith(f"{_PREFIX}/")


def moves_tokens(node: ir.Node) -> bool:
    """Whether a node of a graph after the pass only takes tokens out of the batch, or spreads them over it again."""
    return node.op_type in ("Gather", "Reshape") and is_packed(node.name)


def _indices(graph: ir.Graph, mask: str) -> dict[str, ir.Value]:
    """Where the real tokens are in the batch, and which of them each position of the batch shows."""
    values = {mask: ir.convenience.create_value_mapping(graph)[mask]}
    made_by = values[mask].producer()
    for name, number in (("all", [-1]), ("one", [1]), ("zero", [0]), ("axis", 0)):
        values[name] = constant(graph, packed(name), np.array(number, np.int64))
    made = []
    for kind, inputs, output in (
        ("Reshape", (mask, "all"), "flat_mask"),
        ("NonZero", ("flat_mask",), "places"),
        ("Reshape", ("places", "all"), "token_places"),
        ("CumSum", ("flat_mask", "axis"), "counts"),
        ("Sub", ("counts", "one"), "last_tokens"),
        ("Max", ("last_tokens", "zero"), "place_tokens"),
        ("Shape", (mask,), "batch_shape"),
    ):
        made.append(make(kind, [values[name] for name in inputs], packed(output)))
        values[output] = made[-1].outputs[0]
    if made_by is None:
        graph.insert_before(graph[0], made)
    else:
        made_by.append(made)
    return values


def _pack(value: ir.Value, where: dict[str, ir.Value], *, of_all_texts: bool) -> list[ir.Node]:
    """[batch, sequence, ...] to [tokens, ...]; of all texts, [1, sequence, ...]."""
    path = packed(value.name)
    shape = make("Shape", [value], f"{path}/shape", start=2)
    flat_shape = make("Concat", [where["all"], *shape.outputs], f"{path}/rows", axis=0)
    flat = make("Reshape", [value, *flat_shape.outputs], f"{path}/flat")
    made = [shape, flat_shape, flat]
    places = where["token_places"]
    if of_all_texts:
        length = make("Shape", [value], f"{path}/length", start=1, end=2)
        column = make("Mod", [places, *length.outputs], f"{path}/columns")
        made += [length, column]
        (places,) = column.outputs
    return [*made, make("Gather", [*flat.outputs, places], path, name=f"{path}/pack", axis=0)]


def _spread(value: ir.Value, where: dict[str, ir.Value]) -> list[ir.Node]:
    """[tokens, ...] to [batch, sequence, ...]."""
    path = packed(value.name)
    spread = make("Gather", [value, where["place_tokens"]], f"{path}/spread", axis=0)
    features = make("Shape", [value], f"{path}/features", start=1)
    shape = make("Concat", [where["batch_shape"], *features.outputs], f"{path}/whole", axis=0)
    batch = make("Reshape", [*spread.outputs, *shape.outputs], value.name, name=f"{path}/batch")
    return [spread, features, shape, batch]
