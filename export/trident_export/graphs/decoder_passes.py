"""Graph passes for decoders: what torch's exporter can't write, and fewer, larger operators.

casts           to the type that a tensor has already go
query_seqlens   moved to its place among the attention operator's inputs, or taken out: ONNX Runtime 1.31, the last one
                for GPUs, does not know it
reshapes        one that is undone by the next goes
matmuls        queries, keys and values come from one matmul, in the packed form of the attention operator, and
                other matmuls of one input (gate and up projection) are joined too: one stream waits for the
                number of operators as much as for their arithmetic
norms           ONNX Runtime's fusions of RMS norms, with the addition of the residual before them

All work on the float32 graph, before weights are quantized, and none changes what is computed.
Operator references: onnxruntime docs/ContribOperators.md, GroupQueryAttention, SkipSimplifiedLayerNormalization.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.transformers.fusion_simplified_layernorm import (
    FusionSimplifiedLayerNormalization,
    FusionSkipSimplifiedLayerNormalization,
)
from onnxruntime.transformers.onnx_model import OnnxModel

from trident_export.graphs.shape_folding import fold_shapes, infer_types

_QUERY_SEQLENS = 16  # position among the attention operator's inputs


def optimize_file(path: Path, *, ragged: bool = True) -> None:
    """Constant shapes and all passes on the graph of a file, which may have its weights beside it; see `optimize`."""
    model = onnx.load(str(path))
    fold_shapes(model)
    optimize(model, ragged=ragged)
    data = path.with_name(path.name + ".optimized.data")
    large = model.ByteSize() > 2**31 - 2**20
    onnx.save(model, str(path), save_as_external_data=large, location=data.name)


def optimize(model: onnx.ModelProto, *, ragged: bool = True) -> None:
    """All passes, in place.

    Args:
        ragged: whether the rows of a run may have different numbers of tokens, which takes ONNX Runtime 1.32.
    """
    graph = OnnxModel(model)
    drop_idle_casts(graph)
    if ragged:
        place_query_seqlens(graph)
    else:
        drop_query_seqlens(graph)
    drop_reshape_pairs(graph)
    pack_attention(graph)
    join_matmuls(graph)
    fuse_norms(graph)


def fuse_norms(graph: OnnxModel) -> None:
    """ONNX Runtime's fusions of RMS norms, alone and with the addition before them."""
    FusionSimplifiedLayerNormalization(graph).apply()
    FusionSkipSimplifiedLayerNormalization(graph).apply()
    graph.prune_graph()
    graph.topological_sort()


def drop_idle_casts(graph: OnnxModel) -> None:
    """Casts to the type that a tensor has already, which hide norms from the fusions."""
    types = infer_types(graph.model)
    for node in graph.get_nodes_by_op_type("Cast"):
        found = types.get(node.input[0])
        if found is not None and found.elem_type == node.attribute[0].i:
            graph.replace_input_of_all_nodes(node.output[0], node.input[0])
    graph.prune_graph()


def place_query_seqlens(graph: OnnxModel) -> None:
    """Move the last input of each attention operator behind the absent ones before it."""
    for node in graph.get_nodes_by_op_type("GroupQueryAttention"):
        *first, lengths = node.input
        node.input[:] = [*first, *[""] * (_QUERY_SEQLENS - len(first)), lengths]


def drop_query_seqlens(graph: OnnxModel) -> None:
    """Take the last input of each attention operator away, and the graph's input that it comes from."""
    for node in graph.get_nodes_by_op_type("GroupQueryAttention"):
        del node.input[-1]
        while not node.input[-1]:
            del node.input[-1]
    kept = [value for value in graph.model.graph.input if value.name != "query_seqlens"]
    del graph.model.graph.input[:]
    graph.model.graph.input.extend(kept)


def drop_reshape_pairs(graph: OnnxModel) -> None:
    """A matmul's output that is split into heads, [0, 0, heads, size], and joined again, [0, 0, -1], is itself."""
    producers = graph.output_name_to_node()
    for node in graph.get_nodes_by_op_type("Reshape"):
        before = producers.get(node.input[0])
        if before is None or before.op_type != "Reshape":
            continue
        source = producers.get(before.input[0])
        if source is None or source.op_type not in ("MatMul", "Add", "GatherND"):
            continue  # of what rank it is does not show
        shape, split = (graph.get_constant_value(reshape.input[1]) for reshape in (node, before))
        if shape is None or split is None or len(split) != 4 or len(shape) != 3:
            continue
        if not any(shape[:2]) and not any(split[:2]) and shape[2] in (-1, split[2] * split[3]):
            graph.replace_input_of_all_nodes(node.output[0], before.input[0])
    graph.prune_graph()


def pack_attention(graph: OnnxModel) -> None:
    """Queries, keys and values of one input from one matmul, spread over the cache's rows together."""
    producers = graph.output_name_to_node()
    for node in graph.get_nodes_by_op_type("GroupQueryAttention"):
        chains = [_projection(graph, name, producers) for name in node.input[:3]]
        projections = [chain for chain in chains if chain is not None]
        inputs = {projection.matmul.input[0] for projection in projections}
        if len(projections) != 3 or len(inputs) != 1 or len({p.bias is None for p in projections}) != 1:
            continue
        output = _join(graph, [projection.matmul for projection in projections], "qkv_proj")
        if projections[0].bias is not None:
            bias = np.concatenate([_weight(graph, str(projection.bias)) for projection in projections])
            graph.add_initializer(numpy_helper.from_array(bias, f"{output}_bias"))
            graph.add_node(helper.make_node("Add", [output, f"{output}_bias"], [f"{output}_sum"], name=f"{output}_sum"))
            output = f"{output}_sum"
        projections[0].gather.input[0] = output
        node.input[1] = node.input[2] = ""
    graph.prune_graph()
    graph.topological_sort()


def join_matmuls(graph: OnnxModel) -> None:
    """Two matmuls of one input, with weights of one shape, are computed as one and split."""
    by_input: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.get_nodes_by_op_type("MatMul"):
        if graph.get_initializer(node.input[1]) is not None:
            by_input[node.input[0]].append(node)
    for nodes in by_input.values():
        shapes = {tuple(graph.get_initializer(node.input[1]).dims) for node in nodes}
        if len(nodes) != 2 or len(shapes) != 1:
            continue
        outputs = [node.output[0] for node in nodes]
        joined = _join(graph, nodes, "gate_up_proj")
        for node in nodes:
            node.output[0] += "_unused"
        graph.add_node(helper.make_node("Split", [joined], outputs, name=f"{joined}_split", axis=-1))
    graph.prune_graph()
    graph.topological_sort()


@dataclass(frozen=True)
class _Projection:
    """A matmul, its bias, and the gather that spreads its output over the cache's rows."""

    matmul: onnx.NodeProto
    bias: str | None
    gather: onnx.NodeProto


def _projection(graph: OnnxModel, name: str, producers: dict[str, onnx.NodeProto]) -> _Projection | None:
    gather = producers.get(name)
    matmul = producers.get(gather.input[0]) if gather is not None and gather.op_type == "GatherND" else None
    if gather is None or matmul is None:
        return None
    bias = None
    if matmul.op_type == "Add":
        constant = [part for part in matmul.input if graph.get_initializer(part) is not None]
        computed = [part for part in matmul.input if part not in constant]
        if len(constant) != 1:
            return None
        bias, matmul = constant[0], producers.get(computed[0])
    if matmul is None or matmul.op_type != "MatMul" or graph.get_initializer(matmul.input[1]) is None:
        return None
    return _Projection(matmul, bias, gather)


def _join(graph: OnnxModel, nodes: Sequence[onnx.NodeProto], name: str) -> str:
    """One matmul in place of several of the same input; returns its output, theirs side by side."""
    path = f"{nodes[0].name.rsplit('/', 2)[0]}/{name}"
    weight = np.concatenate([_weight(graph, node.input[1]) for node in nodes], axis=1)
    graph.add_initializer(numpy_helper.from_array(weight, f"{path}/weight"))
    output = f"{path}/output"
    graph.add_node(helper.make_node("MatMul", [nodes[0].input[0], f"{path}/weight"], [output], name=f"{path}/MatMul"))
    return output


def _weight(graph: OnnxModel, name: str) -> NDArray[Any]:
    weight: NDArray[Any] = numpy_helper.to_array(graph.get_initializer(name))
    return weight
