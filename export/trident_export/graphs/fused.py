"""Graph passes for encoders: several operators on the same tokens become one of ONNX Runtime's.

norms    LayerNormalization of a sum is SkipLayerNormalization, which also adds the bias of the matmul before it
GELU     the exact form, which is computed with Erf, is Gelu, or BiasGelu where a bias is added before it

ONNX Runtime fuses both by itself when it loads a graph of padded texts; packed tokens have other shapes than it looks
for. None changes what is computed. The tanh form of GELU is left to it.
Operator references: onnxruntime docs/ContribOperators.md, com.microsoft.SkipLayerNormalization, com.microsoft.BiasGelu.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from trident_export.graphs.editing import add_domain, drop_unused, make, numbers, rank_of_weight, replace
from trident_export.graphs.unpadding import is_packed


def fuse(model: ir.Model) -> None:
    """Both passes, in place, on a graph after `unpadding`."""
    fuse_norms(model)
    fuse_gelus(model)


def fuse_norms(model: ir.Model) -> int:
    """Fuse norms of the sum of two packed values; returns how many."""
    fused = 0
    for norm in [node for node in model.graph if node.op_type == "LayerNormalization"]:
        added = norm.inputs[0].producer()
        if added is None or added.op_type != "Add" or not all(is_packed(term.name) for term in added.inputs):
            continue
        if len(norm.inputs) < 2 or any(rank_of_weight(weight) != 1 for weight in norm.inputs[1:]):
            continue
        terms, bias = list(added.inputs), None
        for position, term in enumerate(terms):
            parts = _biased(term)
            if parts is not None:
                terms[position], bias = parts
                break
        (total,), (output,) = added.outputs, norm.outputs[:1]
        gamma, beta = [*norm.inputs[1:], None][:2]
        outputs = [ir.Value(name=output.name)]
        if len(total.uses()) > 1 or total.is_graph_output():
            outputs += [ir.Value(name=""), ir.Value(name=""), ir.Value(name=total.name)]
        inputs = [*terms, gamma, beta, bias]
        while inputs[-1] is None:
            inputs.pop()
        epsilon = norm.attributes.get_float("epsilon", 1e-5)
        made = ir.node(
            "SkipLayerNormalization",
            inputs,
            {"epsilon": epsilon},
            domain="com.microsoft",
            outputs=outputs,
            name=norm.name,
        )
        old, new = ([output], outputs[:1]) if len(outputs) == 1 else ([output, total], [outputs[0], outputs[3]])
        ir.convenience.replace_nodes_and_values(
            model.graph, added, [norm, added] if len(outputs) > 1 else [norm], [made], old, new
        )
        fused += 1
    if fused:
        add_domain(model)
        drop_unused(model)
    return fused


def fuse_gelus(model: ir.Model) -> int:
    """Fuse x (1 + erf(x / sqrt 2)) / 2; returns how many."""
    fused = 0
    for node in [node for node in model.graph if node.op_type == "Erf"]:
        last = _gelu(node)
        if last is None:
            continue
        source = node.inputs[0].producer().inputs[0]
        parts, (output,) = _biased(source, readers=2), last.outputs
        kind, inputs = ("Gelu", (source,)) if parts is None else ("BiasGelu", parts)
        replace(last, [make(kind, inputs, output.name, domain="com.microsoft")])
        fused += 1
    if fused:
        add_domain(model)
        drop_unused(model)
    return fused


def _gelu(erf: ir.Node) -> ir.Node | None:
    """The last node of an exact GELU."""
    scaled = erf.inputs[0].producer()
    if scaled is None or scaled.op_type not in ("Div", "Mul"):
        return None
    factor = _scalar(scaled.inputs[1])
    if factor is None or not math.isclose(factor, 2 ** (0.5 if scaled.op_type == "Div" else -0.5), rel_tol=1e-6):
        return None
    shifted = _reader(erf, "Add")
    weighted = _reader(shifted, "Mul") if shifted is not None and _other(shifted, erf.outputs[0]) == 1.0 else None
    if weighted is None or scaled.inputs[0] not in weighted.inputs:
        return None
    halved = _reader(weighted, "Mul")
    return halved if halved is not None and _other(halved, weighted.outputs[0]) == 0.5 else None


def _reader(node: ir.Node, kind: str) -> ir.Node | None:
    """The only node that reads another's output."""
    uses = node.outputs[0].uses()
    if len(uses) != 1 or node.outputs[0].is_graph_output():
        return None
    ((reader, _),) = uses
    return reader if reader.op_type == kind else None


def _other(node: ir.Node, term: ir.Value) -> float | None:
    """The number that a node of two inputs has beside one of them."""
    (other,) = [value for value in node.inputs if value is not term] or [None]
    return _scalar(other)


def _scalar(value: ir.Value | None) -> float | None:
    found = numbers(value)
    return float(found.reshape(-1)[0]) if found is not None and np.size(found) == 1 else None


def _biased(value: ir.Value, readers: int = 1) -> tuple[ir.Value, ir.Value] | None:
    """A packed value and the vector that was added to it, where nothing else reads the sum."""
    node = value.producer()
    if node is None or node.op_type != "Add" or len(value.uses()) != readers or value.is_graph_output():
        return None
    vectors = [term for term in node.inputs if rank_of_weight(term) == 1]
    others = [term for term in node.inputs if is_packed(term.name)]
    return (others[0], vectors[0]) if len(vectors) == len(others) == 1 and vectors[0].shape[0] > 1 else None
