"""Attention of encoders, text by text, over real tokens alone.

While a model is traced, its attention is written as one operator of our own, `TextAttention`. `unpadding` gives it the
real tokens of all texts, one after another, as it does with matmuls. `write_attention` then makes it a loop over the
texts, each of which is one `MultiHeadAttention` of its own length:

- Nothing is computed for padding, and a text's numbers do not depend on the texts beside it, nor on the length that it
  is padded to: the operator never sees either.
- Where padding is all that is masked, the operator gets no mask and takes ONNX Runtime's flash attention, which keeps
  no scores. Sliding windows, causal masks and biases of positions are handed on as its `attention_bias`, cut to the
  text's tokens.
- Queries, keys and values of one input come from one matmul, and their biases are added by the operator.

What the operator lacks (a cap of the scores, sinks, heads of keys that several heads of queries share) is traced as
plain operators over padded texts, as is an architecture that computes its attention by itself.
Operator references: onnxruntime docs/ContribOperators.md, com.microsoft.MultiHeadAttention; ONNX, Loop,
ConcatFromSequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from trident_export.graphs.editing import (
    add_domain,
    array,
    constant,
    drop_unused,
    infer,
    make,
    rank_of_weight,
    replace,
    side_by_side,
)
from trident_export.graphs.unpadding import TEXT_ATTENTION, packed

_DOMAIN = "trident"
_PREFIX = "texts"
_HEADS_INSIDE = [0, 2, 1, 3]  # [batch, heads, tokens, size] to [batch, tokens, heads, size], and back


@dataclass(frozen=True)
class _Form:
    """What the operator is told besides its tensors.

    Attributes:
        heads: of queries, keys and values alike.
        size: of one head of the values.
        scale: of the scores.
        masked: whether a mask of padding follows the values, which no text's own tokens need.
        biased: whether a bias of the scores follows, [1 or batch, 1 or heads, tokens, tokens].
        shared: whether all texts have the same bias.
    """

    heads: int
    size: int
    scale: float
    masked: bool
    biased: bool
    shared: bool


class _TextAttention(torch.autograd.Function):
    """Computed plainly when the model runs, written to the graph as one operator on [batch, tokens, features]."""

    @staticmethod
    def forward(ctx, form, query, key, value, *masks):  # type: ignore[no-untyped-def]
        scores = torch.matmul(query * form.scale, key.transpose(-2, -1))
        for mask in masks:
            scores = scores + mask
        return torch.matmul(scores.softmax(dim=-1), value).transpose(1, 2).contiguous()

    @staticmethod
    def symbolic(g, form, query, key, value, *masks):  # type: ignore[no-untyped-def]
        def constant(*values: int):  # type: ignore[no-untyped-def]
            return g.op("Constant", value_t=torch.tensor(values))

        def flat(heads):  # type: ignore[no-untyped-def]
            return g.op("Reshape", g.op("Transpose", heads, perm_i=_HEADS_INSIDE), constant(0, 0, -1))

        found = g.op(
            f"{_DOMAIN}::{TEXT_ATTENTION}",
            *map(flat, (query, key, value)),
            *masks,
            num_heads_i=form.heads,
            size_i=form.size,
            scale_f=form.scale,
            bias_i=3 + form.masked if form.biased else 0,
            shared_i=int(form.shared),
        )
        found = g.op("Reshape", found, constant(0, 0, form.heads, form.size))
        found.setType(query.type().with_sizes([None, None, form.heads, form.size]))
        return found


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Attention that is traced as one operator.

    Args:
        query: [batch, heads, tokens, size], as are `key` and `value`, whose last size may be another.
        mask: of padding alone, [batch, 1, 1, tokens]: 0, and the lowest number for padding.
        bias: added to the scores, [1 or batch, 1 or heads, tokens, tokens]; it may mask padding, too.
        scale: the queries are multiplied by it.

    Returns:
        [batch, tokens, heads, size].
    """
    shared = bias is not None and int(bias.shape[0]) == 1
    form = _Form(int(query.shape[1]), int(value.shape[-1]), float(scale), mask is not None, bias is not None, shared)
    given = [tensor for tensor in (mask, bias) if tensor is not None]
    found: torch.Tensor = _TextAttention.apply(form, query, key, value, *given)  # type: ignore[no-untyped-call]
    return found


def attention_nodes(model: ir.Model) -> list[ir.Node]:
    """Nodes of our own operator."""
    return [node for node in model.graph if node.op_type == TEXT_ATTENTION]


def drop_heads(model: ir.Model) -> None:
    """Let the operator read matmuls directly, and matmuls read it: it splits features into heads by itself."""
    for node in attention_nodes(model):  # what inference does not know
        (found,) = node.outputs
        width = node.attributes["num_heads"].as_int() * node.attributes["size"].as_int()
        found.type, found.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "sequence", width])
    types = infer(model)

    def rank(value: ir.Value) -> int:
        shape = types[value.name].shape if value.name in types else None
        return -1 if shape is None else len(shape)

    for node in attention_nodes(model):
        for position in range(3):
            source = _joined_heads(node.inputs[position])
            if source is not None and rank(source) == 3:
                node.replace_input_with(position, source)
        (found,) = node.outputs
        while (after := _only_reader(found, "Reshape")) is not None:
            found = after.outputs[0]
        if found is not node.outputs[0] and rank(found) == 3 and not found.is_graph_output():
            found.replace_all_uses_with(node.outputs[0])
    drop_unused(model)


def _joined_heads(value: ir.Value) -> ir.Value | None:
    """[batch, tokens, features] that were split into heads and joined again; None for anything else."""
    kinds = []
    while (node := value.producer()) is not None and node.op_type in ("Reshape", "Transpose"):
        if node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) != _HEADS_INSIDE:
            return None
        kinds.append(node.op_type)
        value = node.inputs[0]
    return value if kinds in (["Reshape"] * 2, ["Reshape", "Transpose", "Transpose", "Reshape"]) else None


def _only_reader(value: ir.Value, kind: str) -> ir.Node | None:
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    ((node, position),) = uses
    return node if node.op_type == kind and position == 0 else None


def write_attention(model: ir.Model, mask: str) -> int:
    """Make each of our operators, which read packed tokens, a loop over the texts; returns how many there were.

    Args:
        mask: the value that is 1 for tokens and 0 for padding.
    """
    graph, found = model.graph, attention_nodes(model)
    if not found:
        return 0
    where = _texts(graph, mask)
    for node in found:
        replace(node, _loop(node, where))
    add_domain(model)
    model.opset_imports.pop(_DOMAIN, None)
    drop_unused(model)
    return len(found)


def _texts(graph: ir.Graph, mask: str) -> dict[str, ir.Value]:
    """Where each text begins and ends among the packed tokens, [texts, 1], and how many texts there are."""
    values = {"mask": ir.convenience.create_value_mapping(graph)[mask]}
    for name, number in (("all", [-1]), ("first", [0]), ("second", [1]), ("axis", 0)):
        values[name] = constant(graph, f"{_PREFIX}/{name}", np.array(number, np.int64))
    made = []

    def add(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        made.append(make(kind, [values[name] for name in inputs], f"{_PREFIX}/{output}", **attributes))
        values[output] = made[-1].outputs[0]

    add("ReduceSum", ("mask", "second"), "lengths", keepdims=1)
    add("CumSum", ("lengths", "axis"), "ends")
    add("Sub", ("ends", "lengths"), "begins")
    add("Shape", ("mask",), "count", start=0, end=1)
    made.append(ir.node("SequenceEmpty", [], {"dtype": ir.DataType.FLOAT}, outputs=[ir.Value(name=f"{_PREFIX}/none")]))
    values["none"] = made[-1].outputs[0]
    values["none"].type = ir.SequenceType(ir.TensorType(ir.DataType.FLOAT))
    made_by = values["mask"].producer()
    if made_by is None:
        graph.insert_before(graph[0], made)
    else:
        made_by.append(made)
    return values


def _loop(node: ir.Node, where: dict[str, ir.Value]) -> list[ir.Node]:
    path = f"{_PREFIX}/{node.outputs[0].name}"
    made, tokens, widths, bias = _packed_inputs(node, path, where)
    which = ir.val(f"{path}/text", ir.DataType.INT64, [])
    go = ir.val(f"{path}/go", ir.DataType.BOOL, [])
    before = ir.Value(name=f"{path}/before", type=where["none"].type)
    inner: list[ir.Node] = []

    def add(kind: str, inputs: Sequence[ir.Value | None], output: str, domain: str = "", **attributes: Any) -> ir.Value:
        inner.append(make(kind, inputs, f"{path}/{output}", domain=domain, **attributes))
        return inner[-1].outputs[0]

    begin, end = (add("Gather", [where[f"{name}s"], which], name) for name in ("begin", "end"))
    cut = [add("Slice", [tensor, begin, end, where["second"]], f"own_{index}") for index, tensor in enumerate(tokens)]
    if widths is not None:
        outputs = [ir.Value(name=f"{path}/own_{name}") for name in ("query", "key", "value")]
        inner.append(ir.node("Split", [*cut, widths], {"axis": 2}, outputs=outputs, name=f"{path}/split"))
        cut = outputs
    parts: list[ir.Value | None] = [*cut, bias]
    if (position := node.attributes["bias"].as_int()) > 0:
        scores = node.inputs[position]
        if not node.attributes["shared"].as_int():
            row = add("Unsqueeze", [which, where["first"]], "row")
            scores = add("Gather", [scores, row], "own_bias")
        real = add("NonZero", [add("Gather", [where["mask"], which], "own_mask")], "real")
        places = add("Reshape", [real, where["all"]], "places")
        rows = add("Gather", [scores, places], "bias_rows", axis=2)
        parts += [None, add("Gather", [rows, places], "bias_of_tokens", axis=3)]
    options = {name: node.attributes[name].value for name in ("num_heads", "scale")}
    found = add("MultiHeadAttention", parts, "attention", domain="com.microsoft", **options)
    after = add("SequenceInsert", [before, found], "after")
    after.type = before.type
    same = add("Identity", [go], "go_on")
    same.type, same.shape = go.type, go.shape
    body = ir.Graph([which, go, before], [same, after], nodes=inner, name=f"{path}/body")
    loop = make("Loop", [where["count"], None, where["none"]], f"{path}/answers", body=body)
    joined = make("ConcatFromSequence", list(loop.outputs), f"{path}/joined", axis=1)
    (output,) = node.outputs
    return [*made, loop, joined, make("Squeeze", [*joined.outputs, where["first"]], output.name)]


def _packed_inputs(
    node: ir.Node, path: str, where: dict[str, ir.Value]
) -> tuple[list[ir.Node], list[ir.Value], ir.Value | None, ir.Value | None]:
    """Nodes that give queries, keys and values, and these, [1, tokens, features].

    They are one value where they come from one matmul: then their widths and their bias follow.
    """
    projections = [_projection(value) for value in node.inputs[:3]]
    chosen = [projection for projection in projections if projection is not None]
    if len(chosen) != 3 or len({projection.matmul.inputs[0] for projection in chosen}) != 1:
        made = [
            make("Unsqueeze", [value, where["first"]], f"{path}/{name}")
            for name, value in zip(("query", "key", "value"), node.inputs, strict=False)
        ]
        return made, [unsqueezed.outputs[0] for unsqueezed in made], None, None
    graph = node.graph
    widths = [projection.weight.shape[1] for projection in chosen]
    layer = f"{chosen[0].matmul.name.rsplit('/', 2)[0]}/qkv_proj"
    weight = side_by_side(graph, f"{layer}/weight", [projection.weight for projection in chosen], axis=1)
    bias = None
    if any(projection.bias is not None for projection in chosen):
        numbers = [
            array(projection.bias) if projection.bias is not None else np.zeros(width, np.float32)
            for projection, width in zip(chosen, widths, strict=True)
        ]
        bias = constant(graph, f"{layer}/bias", np.concatenate(numbers))
    source = chosen[0].matmul.inputs[0]
    product = make("MatMul", [source, weight], packed(f"{layer}/output"), name=f"{layer}/MatMul")
    whole = make("Unsqueeze", [*product.outputs, where["first"]], f"{path}/whole")
    sizes = constant(graph, f"{_PREFIX}/widths_{'_'.join(map(str, widths))}", np.array(widths, np.int64))
    return [product, whole], list(whole.outputs), sizes, bias


@dataclass(frozen=True)
class _Projection:
    """A matmul that gives queries, keys or values and nothing else, its weight, and its bias."""

    matmul: ir.Node
    weight: ir.Value
    bias: ir.Value | None


def _projection(value: ir.Value) -> _Projection | None:
    """None where the value is anything else, or the weight is one that layers share: it is stored once."""
    bias, node = None, value.producer()
    if node is not None and node.op_type == "Add":
        vectors = [term for term in node.inputs if rank_of_weight(term) == 1]
        computed = [term for term in node.inputs if not term.is_initializer()]
        if len(vectors) != 1 or len(computed) != 1 or len(value.uses()) != 1:
            return None
        bias, value = vectors[0], computed[0]
        node = value.producer()
    if node is None or node.op_type != "MatMul" or len(value.uses()) != 1:
        return None
    weight = node.inputs[1]
    if rank_of_weight(weight) != 2 or len(weight.uses()) != 1:
        return None
    return _Projection(node, weight, bias)
