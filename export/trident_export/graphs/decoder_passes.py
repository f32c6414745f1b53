"""Graph passes for decoders: what torch's exporter can't write, and fewer, larger operators.

casts           a cast to the type that a tensor has already goes
query_seqlens   goes from graphs for GPUs: ONNX Runtime 1.31, the last one for them, does not know it
reshapes        one that the next undoes goes
weights         come second in a matmul: with tokens as its columns it would sum in another order for a single one
matmuls         queries, keys and values come from one matmul, in the packed form of the attention operator, and
                two other matmuls of one input (gate and up projection) are joined, too: one stream waits for the
                number of operators as much as for their arithmetic
adapters        are put beside the matmuls of their layers, see `lora`
norms           ONNX Runtime's fusions of RMS norms, with the addition of the residual before them

scores          of large heads are summed alike, see `sum_scores_alike`; the last of a graph's passes

All others work on the float32 graph, before weights are quantized, and none changes what is computed.
Operator references: onnxruntime docs/ContribOperators.md, GroupQueryAttention, SkipSimplifiedLayerNormalization.
"""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from trident_export.graphs import editing
from trident_export.graphs.editing import array, constant, drop_unused, numbers, parts_of, set_parts, side_by_side
from trident_export.graphs.lora import Lora, add_adapters
from trident_export.graphs.shape_folding import fold_shapes
from trident_serving.runtime.kv_cache import LARGEST_PART

# Positions among the attention operator's inputs.
QUERY_SEQLENS = 16
_PAST_KEY, _SINKS = 3, 11

_NO_SINK = -1e30  # as a score; its exponential is 0


def optimize(model: ir.Model, *, ragged: bool = True, adapters: Sequence[Lora] = ()) -> ir.Model:
    """Constant shapes and all passes; the model that is given may be changed.

    Args:
        ragged: whether the slots of a run may have different numbers of tokens, which takes ONNX Runtime 1.32.
        adapters: that each token may choose from.

    Raises:
        UnsupportedArchitecture: an adapter's layer is no matmul of the packed tokens.
    """
    fold_shapes(model)
    drop_idle_casts(model)
    if not ragged:
        drop_query_seqlens(model)
    drop_reshape_pairs(model)
    put_weights_second(model)
    pack_attention(model)
    join_matmuls(model)
    add_adapters(model, adapters)
    return fuse_norms(model)


def sum_scores_alike(model: ir.Model) -> int:
    """Make a score of a large head the same sum wherever its key stands; returns for how many attentions.

    ONNX Runtime's attention for the CPU goes through the keys in blocks, and how its matmul sums more than
    `LARGEST_PART` numbers depends on the keys that are left for the last one. With sinks it has all keys at once. These
    add nothing to the softmax; the runtime sees to it that a slot has at least `MIN_KEYS` keys.
    """
    sinks: dict[int, ir.Value] = {}
    nodes = []
    for node in attention_nodes(model):
        inputs = [*node.inputs, *[None] * (QUERY_SEQLENS + 1 - len(node.inputs))]
        size = inputs[_PAST_KEY].shape[3] if inputs[_PAST_KEY] is not None and inputs[_PAST_KEY].shape else 0
        rounded = node.attributes.get_int("kv_cache_bit_width", 0) > 0
        if inputs[QUERY_SEQLENS] is None or inputs[_SINKS] is not None or rounded or not size > LARGEST_PART:
            continue
        heads = node.attributes.get_int("num_heads")
        if heads not in sinks:
            sinks[heads] = constant(model.graph, f"no_sinks_{heads}", np.full(heads, _NO_SINK, np.float32))
        node.replace_input_with(_SINKS, sinks[heads])
        nodes.append(node)
    return len(nodes)


def attention_nodes(model: ir.Model) -> list[ir.Node]:
    """Nodes of the attention operator."""
    return [node for node in model.graph if node.op_type == "GroupQueryAttention"]


def fuse_norms(model: ir.Model) -> ir.Model:
    """The model after ONNX Runtime's fusions of RMS norms, and of these with the addition before them."""
    # Imported here: its shape inference takes a second to import, and few commands trace.
    from onnxruntime.transformers import fusion_simplified_layernorm as fusions
    from onnxruntime.transformers.onnx_model import OnnxModel

    message, weights = editing.light(model)
    graph = OnnxModel(message)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where it says that it knows no shapes
            fusions.FusionSimplifiedLayerNormalization(graph).apply()
            fusions.FusionSkipSimplifiedLayerNormalization(graph).apply()
            graph.topological_sort()
    except Exception:  # it takes norms without a weight for ones with it, and leaves a graph that is none
        return model
    fused = editing.restored(message, weights)
    drop_unused(fused, inputs=True)
    return fused


def drop_idle_casts(model: ir.Model) -> None:
    """Drop casts to the type that a tensor has already, which hide norms from the fusions."""
    types = editing.infer(model)
    for node in model.graph:
        if node.op_type != "Cast" or node.outputs[0].is_graph_output():  # whose name is kept
            continue
        if types[node.inputs[0].name].dtype == node.attributes["to"].as_int():
            node.outputs[0].replace_all_uses_with(node.inputs[0])
    drop_unused(model, inputs=True)


def drop_query_seqlens(model: ir.Model) -> None:
    """Take the input away from each attention operator, and from the graph.

    Attention by plain operators uses it, too: without it every slot of a run has as many tokens as the widest.
    """
    for node in attention_nodes(model):
        inputs = [*node.inputs[:QUERY_SEQLENS]]
        while inputs[-1] is None:
            inputs.pop()
        editing.set_inputs(node, inputs)
    lengths, tokens, rows = (
        next(value for value in model.graph.inputs if value.name == name)
        for name in ("query_seqlens", "attention_tokens", "seqlens_k")
    )
    if lengths.uses():
        shapes = [editing.make("Shape", [value], f"{value.name}_shape") for value in (tokens, rows)]
        one = constant(model.graph, "second_axis", np.array([1], np.int64))
        width = editing.make("Gather", [shapes[0].outputs[0], one], "places_of_a_slot")
        wide = editing.make("Expand", [width.outputs[0], shapes[1].outputs[0]], "places_of_slots")
        cast = editing.make("Cast", [wide.outputs[0]], "every_query_seqlens", to=ir.DataType.INT32)
        model.graph.insert_before(model.graph[0], [*shapes, width, wide, cast])
        lengths.replace_all_uses_with(cast.outputs[0])
    drop_unused(model, inputs=True)


def drop_reshape_pairs(model: ir.Model) -> None:
    """Drop the split of a matmul's output into heads, [0, 0, heads, size], where [0, 0, -1] joins them again."""
    for node in model.graph:
        before = node.inputs[0].producer() if node.op_type == "Reshape" else None
        if before is None or before.op_type != "Reshape":
            continue
        source = before.inputs[0].producer()
        if source is None or source.op_type not in ("MatMul", "Add", "GatherND"):
            continue  # the rank of any other is not known here
        shape, split = (numbers(reshape.inputs[1]) for reshape in (node, before))
        if shape is None or split is None or len(split) != 4 or len(shape) != 3:
            continue
        if not any(shape[:2]) and not any(split[:2]) and shape[2] in (-1, split[2] * split[3]):
            node.outputs[0].replace_all_uses_with(before.inputs[0])
    drop_unused(model, inputs=True)


def put_weights_second(model: ir.Model) -> None:
    """A matmul of a weight and transposed tokens becomes one of tokens and the transposed weight."""
    for node in [node for node in model.graph if node.op_type == "MatMul"]:
        weight, tokens = node.inputs[0], node.inputs[1].producer()
        if not weight.is_initializer() or len(weight.shape) != 2 or tokens is None or tokens.op_type != "Transpose":
            continue
        if list(tokens.attributes["perm"].as_ints()) != [0, 2, 1]:
            continue
        (output,) = node.outputs
        turned = constant(model.graph, f"{weight.name}_turned", np.ascontiguousarray(array(weight).T))
        product = editing.make("MatMul", [tokens.inputs[0], turned], f"{output.name}_turned", name=node.name)
        editing.replace(node, [product, editing.make("Transpose", product.outputs, output.name, perm=[0, 2, 1])])
    drop_unused(model, inputs=True)


def pack_attention(model: ir.Model) -> None:
    """Queries, keys and values of one input come from one matmul, and one gather spreads them over the slots."""
    for node in attention_nodes(model):
        projections = [found for found in map(_projection, node.inputs[:3]) if found is not None]
        inputs = {projection.matmul.inputs[0] for projection in projections}
        if len(projections) != 3 or len(inputs) != 1 or len({p.bias is None for p in projections}) != 1:
            continue
        output = _join([projection.matmul for projection in projections], "qkv_proj")
        if projections[0].bias is not None:
            bias = constant(model.graph, f"{output.name}_bias", np.concatenate([array(p.bias) for p in projections]))
            added = editing.make("Add", [output, bias], f"{output.name}_sum")
            output.producer().append(added)
            output = added.outputs[0]
        projections[0].gather.replace_input_with(0, output)
        node.replace_input_with(1, None)
        node.replace_input_with(2, None)
    drop_unused(model, inputs=True)
    model.graph.sort()


def join_matmuls(model: ir.Model) -> None:
    """Two matmuls of one input, with matrices of one shape, are computed as one and split."""
    by_input: dict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in model.graph:
        if node.op_type == "MatMul" and node.inputs[1].is_initializer():
            by_input[node.inputs[0]].append(node)
    for nodes in by_input.values():
        if len(nodes) != 2 or nodes[0].inputs[1].shape != nodes[1].inputs[1].shape:
            continue
        if len(nodes[0].inputs[1].shape) != 2:  # one for each expert
            continue
        joined = _join(
            nodes, nodes[0].name.rsplit("/", 1)[-1].replace("MatMul", "gate_up_proj")
        )  # a module may have several
        names = [node.outputs[0].name for node in nodes]
        outputs = [ir.Value(name=name) for name in names]
        split = ir.node("Split", [joined], {"axis": -1}, outputs=outputs, name=f"{joined.name}_split")
        joined.producer().append(split)
        for node, output in zip(nodes, outputs, strict=True):
            node.outputs[0].replace_all_uses_with(output)
    drop_unused(model, inputs=True)
    model.graph.sort()


@dataclass(frozen=True)
class _Projection:
    """A matmul, its bias, and the gather that spreads its output over the cache's slots."""

    matmul: ir.Node
    bias: ir.Value | None
    gather: ir.Node


def _projection(value: ir.Value | None) -> _Projection | None:
    gather = value.producer() if value is not None else None
    matmul = gather.inputs[0].producer() if gather is not None and gather.op_type == "GatherND" else None
    if matmul is None:
        return None
    bias = None
    if matmul.op_type == "Add":
        constants = [term for term in matmul.inputs if term.is_initializer()]
        if len(constants) != 1:
            return None
        (computed,) = (term for term in matmul.inputs if term not in constants)
        bias, matmul = constants[0], computed.producer()
    if matmul is None or matmul.op_type != "MatMul" or not matmul.inputs[1].is_initializer():
        return None
    return _Projection(matmul, bias, gather)


def _join(nodes: Sequence[ir.Node], name: str) -> ir.Value:
    """The output of one matmul in place of several of the same input; theirs stand in it side by side."""
    path = f"{nodes[0].name.rsplit('/', 2)[0]}/{name}"
    while f"{path}/weight" in nodes[0].graph.initializers:  # experts of one module
        path += "_next"
    weight = side_by_side(nodes[0].graph, f"{path}/weight", [node.inputs[1] for node in nodes], axis=1)
    joined = editing.make("MatMul", [nodes[0].inputs[0], weight], f"{path}/output", name=f"{path}/MatMul")
    set_parts(joined, [part for node in nodes for part in parts_of(node)])
    nodes[0].prepend(joined)
    return joined.outputs[0]
