"""Export of an encoder, with one contract for every architecture.

The graph has the inputs `input_ids` and `attention_mask`, and for tasks that read pairs of texts
`token_type_ids`, int64 [batch, sequence] each, whether or not the architecture has token types; where a task reads
single texts, models with token types get zeros for them inside the graph. Its outputs, all float32 but for `top_ids`:

    feature-extraction                     pooled [batch, hidden], one vector a text, not normalized
    text-classification, text-ranking,
    zero-shot-classification               logits [batch, labels]
    token-classification                   logits [batch, sequence, labels]
    question-answering                     start_logits, end_logits [batch, sequence]
    fill-mask                              top_scores, top_ids [batch, sequence, k], log_normalizer [batch, sequence]:
                                           the k largest logits, and the logarithm of the sum of all their powers

While the model is traced, its attention is one operator, which becomes a loop over the texts (see `attention`), or a
plain one in few operators, where it can't be; an architecture that does not attend through transformers' attention
interface is traced as it is, but for MPNet.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention

from trident_export.errors import UnsupportedArchitecture
from trident_export.graphs.attention import attend, drop_heads, write_attention
from trident_export.graphs.editing import constant, make, reduced, save
from trident_export.graphs.experts import every_expert
from trident_export.graphs.fused import fuse
from trident_export.graphs.tracing import running, trace
from trident_export.graphs.two_rows import with_two_rows
from trident_export.graphs.unpadding import unpad
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.huggingface.sentence_transformers import Dense, Layer, LayerNorm, Truncate
from trident_serving.encoders.pooling import Pooling

ATTENTION = "trident_encoder_attention"
TOKEN_TYPES = "token_type_ids"
# Where a prompt is left out of the pooling (see `with_marked_prompt`): what is no padding, and what is pooled.
REAL_TOKENS = "real_tokens"
COUNTED_TOKENS = "counted_tokens"
_INPUTS = ("input_ids", "attention_mask", TOKEN_TYPES)
_OUTPUTS = ("last_hidden_state", "logits", "start_logits", "end_logits", "pooled")
# What is computed once, when the graph is traced, must not be taken for the same at other lengths: no two are equal.
_BATCH, _LENGTH = 2, 7


def export_encoder_graph(
    source: HuggingFaceFolder,
    path: Path,
    head: Any,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    finish: Callable[[ir.Model], None],
    prepare: Callable[[PreTrainedModel], None] = lambda model: None,
    part: Callable[[PreTrainedModel], Any] | None = None,
) -> None:
    """Write the graph of the Hugging Face folder `source` to `path`, in float32.

    Args:
        head: the Auto class of transformers for the task.
        inputs: names that the graph must have, as above.
        outputs: so too.
        finish: adds the outputs that the model itself does not give.
        prepare: changes the model before it is traced.
        part: gives what of the model is traced, whose output is a row for each text; None: all of it.

    Raises:
        UnsupportedArchitecture: there is no such head, or it can't be traced, or gives other outputs.
        UnreadableSource: the weights are missing or damaged.
    """
    model, taken = _load(source, head, part)
    prepare(model)
    names = [name for name in taken if name in inputs]
    arguments = _arguments(names)
    traced = _Encoder(model, names, zeros=names != taken)
    said = f"{source}, a {type(model).__name__},"
    with running(said), torch.inference_mode():
        given = model(**arguments)
    traced.wanted = [name for name in _OUTPUTS if isinstance(given.get(name), torch.Tensor)]
    batch: dict[int, str] = {0: "batch"}
    whole = batch | {1: "sequence"}
    axes = dict.fromkeys(names, whole)
    axes |= {name: whole if given[name].shape[1:2] == (_LENGTH,) else batch for name in traced.wanted}
    tensors = list(arguments.values())
    with every_expert(model):
        graph = trace(traced, tensors, inputs=names, outputs=traced.wanted, axes=axes, of=said, operators=False)
    if lost := sorted({"input_ids", "attention_mask"} - {value.name for value in graph.graph.inputs}):
        raise UnsupportedArchitecture(
            f"{said} reads no {' and no '.join(lost)} in the run that was traced, so padding would change its answers: "
            "choose another model"
        )
    for value in graph.graph.outputs:  # the exporter knows no shapes behind an operator of ours
        sizes = axes[value.name]
        value.shape = ir.Shape([sizes.get(axis, size) for axis, size in enumerate(given[value.name].shape)])
    if TOKEN_TYPES in inputs:
        with_token_types(graph)
    finish(graph)
    found = {value.name: value for value in graph.graph.outputs}
    if not set(outputs) <= set(found):
        raise UnsupportedArchitecture(
            f"{source} gives a graph with the outputs {', '.join(found)}, and what is asked of it is served with "
            f"{', '.join(outputs)}: choose a model for that task"
        )
    graph.graph.outputs.clear()
    graph.graph.outputs.extend(found[name] for name in outputs)
    mask = REAL_TOKENS if REAL_TOKENS in ir.convenience.create_value_mapping(graph.graph) else "attention_mask"
    drop_heads(graph)
    unpad(graph, mask)
    write_attention(graph, mask)
    fuse(graph)
    if part is not None:
        with_two_rows(graph)
    save(graph, path)


def _load(source: HuggingFaceFolder, head: Any, part: Callable[[PreTrainedModel], Any] | None) -> tuple[Any, list[str]]:
    """The model with the attention that is traced, and which of the graph's inputs it reads.

    Raises:
        UnsupportedArchitecture: the architecture has no such head, or reads no text.
        UnreadableSource: the weights are missing or damaged.
    """
    model = source.load(head) if part is None else part(source.load(head))
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = False
    taken = inspect.signature(type(model).forward).parameters
    names = [name for name in _INPUTS if name in taken]
    if "input_ids" not in names or "attention_mask" not in names:
        raise UnsupportedArchitecture(
            f"{source} is a {type(model).__name__}, which reads no texts with an attention mask: choose another"
        )
    if TOKEN_TYPES not in source.tokenizer.model_input_names:  # then Hugging Face leaves them to the model
        names = [name for name in names if name != TOKEN_TYPES]
    if model._supports_attention_backend:
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, _mask)
        model.set_attn_implementation(ATTENTION)
    for module in model.modules():
        if isinstance(module, MPNetSelfAttention):
            module.forward = types.MethodType(_attend_mpnet, module)
    return model, names


def _mask(*sizes: Any, **options: Any) -> torch.Tensor | None:
    """Transformers' eager mask, computed from positions: the exporter can't record `vmap`.

    One of padding alone is [batch, 1, 1, tokens], by which `_attend` knows it.
    """
    padding = options.get("attention_mask")
    if options.get("mask_function") is bidirectional_mask_function and padding is not None:
        zero = torch.zeros((), dtype=options["dtype"])
        return torch.where(padding[:, None, None, :], zero, torch.finfo(options["dtype"]).min)
    mask: torch.Tensor | None = eager_mask(*sizes, **(options | {"use_vmap": False}))
    return mask


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface: [batch, heads, tokens, head_dim] in, heads last but one out.

    Raises:
        UnsupportedArchitecture: it is asked for what it lacks.
    """
    for name in ("s_aux", "position_bias", "head_mask"):
        if options.get(name) is not None:
            raise UnsupportedArchitecture(f"attention with {name!r} is not supported in encoders: choose another model")
    groups = int(query.shape[1]) // int(key.shape[1])
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None and groups == 1 and softcap is None and _is_of_texts(query, key):
        of_padding = attention_mask.shape[-2] == 1
        mask, bias = (attention_mask, None) if of_padding else (None, attention_mask)
        return attend(query, key, value, mask, bias, scaling), None
    return attend_plainly(query, key, value, attention_mask, scaling, softcap), None


def attend_plainly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention in few operators: [batch, heads, tokens, head_dim] in, heads last but one out."""
    heads, groups = int(key.shape[1]), int(query.shape[1]) // int(key.shape[1])
    # Scaled queries, not scores: there are fewer.
    query = query * scaling
    if groups > 1:  # several heads of queries for one of keys: [batch, heads, groups, tokens, head_dim]
        query = torch.unflatten(query, 1, (heads, groups))
        key, value = key[:, :, None], value[:, :, None]
        attention_mask = attention_mask[:, :, None] if attention_mask is not None else None
    scores = torch.matmul(query, key.transpose(-2, -1))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    found = torch.matmul(scores.softmax(dim=-1), value)
    return (found.flatten(1, 2) if groups > 1 else found).transpose(1, 2).contiguous()


def _is_of_texts(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether each token of a text asks each of the same text, in the run that is traced."""
    return (int(query.shape[0]), int(query.shape[2]), int(key.shape[2])) == (_BATCH, _LENGTH, _LENGTH)


def _attend_mpnet(
    self: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor]:
    """MPNet's attention, which transformers' interface does not know; all texts have the same bias of positions."""
    heads = (*hidden_states.shape[:-1], self.num_attention_heads, self.attention_head_size)
    query, key, value = (layer(hidden_states).view(heads).transpose(1, 2) for layer in (self.q, self.k, self.v))
    bias = position_bias[:1] if position_bias is not None else None
    found = attend(query, key, value, attention_mask, bias, self.attention_head_size**-0.5)
    return (self.o(found.flatten(2)),)


def _arguments(names: Sequence[str]) -> dict[str, torch.Tensor]:
    """A batch to trace with; the second text is shorter."""
    mask = torch.ones(_BATCH, _LENGTH, dtype=torch.long)
    mask[1, _LENGTH - 2 :] = 0
    values = {"input_ids": torch.ones_like(mask), "attention_mask": mask, TOKEN_TYPES: torch.zeros_like(mask)}
    return {name: values[name] for name in names}


class _Encoder(torch.nn.Module):
    """The model with flat tensors in and out."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str], *, zeros: bool) -> None:
        super().__init__()
        self.model, self.names, self.zeros = model, names, zeros
        self.wanted: list[str] = []

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip(self.names, tensors, strict=True))
        if self.zeros:
            given[TOKEN_TYPES] = given["input_ids"] - given["input_ids"]
        found = self.model(**given)
        return tuple(found[name] for name in self.wanted)


def with_token_types(model: ir.Model) -> None:
    """Add the input `token_type_ids` where the architecture has none; nothing reads it then."""
    inputs = {value.name: value for value in model.graph.inputs}
    if TOKEN_TYPES not in inputs:
        ids = inputs["input_ids"]
        model.graph.inputs.append(ir.Value(name=TOKEN_TYPES, type=ids.type, shape=ids.shape))


def with_top_logits(model: ir.Model, k: int) -> None:
    """Add the outputs of fill-mask: a vocabulary of logits for every token is too much to hand from stage to stage."""
    graph = model.graph
    logits = next(value for value in graph.outputs if value.name == "logits")
    axes: list[int | str] = ["batch", "sequence"]
    scores = ir.val("top_scores", ir.DataType.FLOAT, [*axes, k])
    ids = ir.val("top_ids", ir.DataType.INT64, [*axes, k])
    count = constant(graph, "top_k", np.array([k], np.int64))
    top = ir.node("TopK", [logits, count], {"axis": -1}, outputs=[scores, ids], name="top_logits")
    last = constant(graph, "last_axis", np.array([-1], np.int64))
    inputs, axis = reduced(model, logits, last)
    normalizer = make("ReduceLogSumExp", inputs, "log_normalizer", keepdims=0, **axis)
    graph.extend([top, normalizer])
    normalizer.outputs[0].type, normalizer.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(axes)
    graph.outputs.extend([scores, ids, *normalizer.outputs])


def with_pooling(model: ir.Model, pooling: Pooling, *more: Pooling) -> None:
    """Add the output `pooled`; the numbers are those of `encoders.pooling.pool` for padding on the right.

    Args:
        more: further poolings, whose vectors follow the first one's.
    """
    graph = model.graph
    hidden = next(value for value in graph.outputs if value.name == "last_hidden_state")
    made = [_pooled(model, hidden, kind, "pooled" if not more else f"pooled/{kind}") for kind in (pooling, *more)]
    if more:
        graph.append(make("Concat", made, "pooled", axis=-1))
        made = list(graph[-1].outputs)
    width = hidden.shape[2]
    width = width * (1 + len(more)) if isinstance(width, int) else None
    made[0].type, made[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", width])
    graph.outputs.append(made[0])


def _pooled(model: ir.Model, hidden: ir.Value, pooling: Pooling, output: str) -> ir.Value:
    graph = model.graph
    given = ir.convenience.create_value_mapping(graph)
    real = given.get(REAL_TOKENS, given["attention_mask"])
    mask = given.get(COUNTED_TOKENS, real)
    zero, one, two, lowest = (
        constant(graph, f"pooling/{name}", value)
        for name, value in (
            ("zero", np.array(0, np.int64)),
            ("one", np.array([1], np.int64)),
            ("two", np.array([2], np.int64)),
            ("lowest", np.array(np.finfo(np.float32).min, np.float32)),
        )
    )
    path = "pooling" if output == "pooled" else f"pooling/{pooling}"

    def add(kind: str, inputs: list[ir.Value], output: str, **attributes: Any) -> ir.Value:
        graph.append(make(kind, inputs, output, **attributes))
        return graph[-1].outputs[0]

    if pooling is Pooling.CLS:
        if mask is real:
            return add("Gather", [hidden, zero], output, axis=1)
        first = add("ArgMax", [mask], f"{path}/first", axis=1, keepdims=1)
        return add("GatherND", [hidden, first], output, batch_dims=1)
    if pooling is Pooling.LAST_TOKEN:
        lengths = add("ReduceSum", [real, one], f"{path}/lengths", keepdims=1)
        ends = add("Sub", [lengths, one], f"{path}/ends")
        return add("GatherND", [hidden, ends], output, batch_dims=1)
    if pooling is Pooling.MAX:
        column = add("Unsqueeze", [mask, two], f"{path}/column")
        kept = add(
            "Where", [add("Cast", [column], f"{path}/real", to=ir.DataType.BOOL), hidden, lowest], f"{path}/kept"
        )
        inputs, axis = reduced(model, kept, one)
        return add("ReduceMax", inputs, output, keepdims=0, **axis)
    if pooling is Pooling.WEIGHTED_MEAN:
        mask = add("Mul", [add("CumSum", [real, one], f"{path}/positions"), mask], f"{path}/weighted")
    weights = add("Cast", [mask], f"{path}/weights", to=ir.DataType.FLOAT)
    row = add("Unsqueeze", [weights, one], f"{path}/row")
    summed = add("MatMul", [row, hidden], f"{path}/sum")
    total = add("Squeeze", [summed, one], f"{path}/total")
    count = add("ReduceSum", [weights, one], f"{path}/count", keepdims=1)
    if pooling is Pooling.MEAN_BY_ROOT:
        count = add("Sqrt", [count], f"{path}/root")
    return add("Div", [total, count], output)


def with_last_score(model: ir.Model) -> None:
    """Let `logits` be one number a text: at its last token the first logit, less the second where there are two."""
    graph = model.graph
    logits = graph.outputs.pop([found.name for found in graph.outputs].index("logits"))
    logits.name = "token_logits"
    one = constant(graph, "score/one", np.array([1], np.int64))
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    length = make("ReduceSum", [mask, one], "score/length", keepdims=1)
    end = make("Sub", [*length.outputs, one], "score/end")
    last = make("GatherND", [logits, *end.outputs], "score/last", batch_dims=1)
    answers = logits.shape[2]
    signs = constant(graph, "score/signs", np.array([[1.0], [-1.0]][:answers], np.float32))
    score = make("MatMul", [*last.outputs, signs], "logits")
    graph.extend([length, end, last, score])
    score.outputs[0].type, score.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", 1])
    graph.outputs.extend(score.outputs)


def with_best_logits(model: ir.Model, layers: int = 1, *, summed: bool = False) -> None:
    """Add the output `pooled`, float32 [batch, vocabulary]: the largest logit of each token of the vocabulary.

    It is that of log(1 + relu(logit)), applied `layers` times, over a text's tokens; or the sum of them.
    """
    graph = model.graph
    logits = graph.outputs[[found.name for found in graph.outputs].index("logits")]
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    one, two = (constant(graph, f"sparse/{n}", np.array([n], np.int64)) for n in (1, 2))
    double = constant(graph, "sparse/double", np.array(2, np.float32))

    def add(kind: str, inputs: list[ir.Value], output: str = "", **attributes: Any) -> ir.Value:
        graph.append(make(kind, inputs, output or f"sparse/{kind}_{len(graph)}", **attributes))
        return graph[-1].outputs[0]

    def weight(value: ir.Value) -> ir.Value:
        value = add("Relu", [value])
        for _ in range(layers):  # log(1 + x) = 2 atanh(x / (x + 2)), which loses nothing of a small x
            share = add("Div", [value, add("Add", [value, double])])
            value = add("Mul", [add("Atanh", [share]), double])
        return value

    column = add("Cast", [add("Unsqueeze", [mask, two])], to=ir.DataType.FLOAT)
    kept = add("Mul", [weight(logits) if summed else logits, column])
    if summed:
        found = add("ReduceSum", [kept, one], keepdims=0)
    else:  # what grows keeps the order: the weights of the largest logits are the largest weights
        inputs, axis = reduced(model, kept, one)
        found = weight(add("ReduceMax", inputs, keepdims=0, **axis))
    found.name = "pooled"
    found.type, found.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", logits.shape[2]])
    graph.outputs.append(found)


def with_token_weights(model: ir.Model, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> None:
    """Add the output `token_weights`, float32 [batch, sequence]: what a linear layer gives above 0.

    Args:
        weight: float32 [1, hidden].
        bias: float32 [1].
    """
    graph = model.graph
    hidden = next(value for value in graph.outputs if value.name == "last_hidden_state")
    product = make("MatMul", [hidden, constant(graph, "weights/weight", weight.T.copy())], "weights/product")
    shifted = make("Add", [*product.outputs, constant(graph, "weights/bias", bias)], "weights/shifted")
    above = make("Relu", list(shifted.outputs), "weights/above")
    last = constant(graph, "weights/last", np.array([-1], np.int64))
    found = make("Squeeze", [*above.outputs, last], "token_weights")
    graph.extend([product, shifted, above, found])
    found.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    found.outputs[0].shape = ir.Shape(["batch", "sequence"])
    graph.outputs.extend(found.outputs)


def with_marked_prompt(model: ir.Model) -> None:
    """Let `attention_mask` say 2 for tokens of a prompt: they are attended to, and left out of the pooling."""
    graph = model.graph
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    readers = list(mask.uses())
    real = make("Sign", [mask], REAL_TOKENS)
    same = make("Equal", [mask, constant(graph, "pooling/counted", np.array(1, np.int64))], f"{COUNTED_TOKENS}/same")
    counted = make("Cast", list(same.outputs), COUNTED_TOKENS, to=ir.DataType.INT64)
    graph.insert_before(graph[0], [real, same, counted])
    for node, position in readers:
        node.replace_input_with(position, real.outputs[0])


def with_layers(model: ir.Model, layers: Sequence[Layer]) -> None:
    """Let the output `pooled` go through layers; the numbers are those of `sentence_transformers.applied`."""
    if not layers:
        return
    graph = model.graph
    value = graph.outputs.pop([found.name for found in graph.outputs].index("pooled"))
    value.name = "layers/pooled"
    epsilon, axis, begin = (
        constant(graph, f"layers/{name}", number)
        for name, number in (
            ("epsilon", np.array(1e-12, np.float32)),
            ("axis", np.array([-1], np.int64)),
            ("begin", np.array([0], np.int64)),
        )
    )

    def add(kind: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
        graph.append(make(kind, inputs, f"layers/{len(graph)}", **attributes))
        return graph[-1].outputs[0]

    for index, layer in enumerate(layers):
        path = f"layers/{index}"
        if isinstance(layer, Dense):
            given = value
            weights = [constant(graph, f"{path}/weight", layer.weight)]
            weights += [] if layer.bias is None else [constant(graph, f"{path}/bias", layer.bias)]
            value = _activated(add, add("Gemm", [given, *weights], transB=1), layer.activation, graph)
            if layer.residual is not None:
                given = add("Gemm", [given, constant(graph, f"{path}/residual", layer.residual)], transB=1)
            value = add("Add", [value, given]) if layer.residual is not None or layer.adds_input else value
        elif isinstance(layer, LayerNorm):
            weights = [constant(graph, f"{path}/weight", layer.weight), constant(graph, f"{path}/bias", layer.bias)]
            value = add("LayerNormalization", [value, *weights], axis=-1, epsilon=layer.epsilon)
        elif isinstance(layer, Truncate):
            end = constant(graph, f"{path}/end", np.array([layer.size], np.int64))
            value = add("Slice", [value, begin, end, axis])
        else:
            inputs, attributes = reduced(model, value, axis)
            length = add("Max", [add("ReduceL2", inputs, keepdims=1, **attributes), epsilon])
            value = add("Div", [value, length])
    value.name = "pooled"
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", None])
    graph.outputs.append(value)


def _activated(add: Callable[..., ir.Value], value: ir.Value, activation: str, graph: ir.Graph) -> ir.Value:
    if activation == "Identity":
        return value
    if activation == "GELU":
        root, one, half = (
            constant(graph, f"layers/{name}", np.array(number, np.float32))
            for name, number in (("root", 2**0.5), ("one", 1.0), ("half", 0.5))
        )
        share = add("Add", [add("Erf", [add("Div", [value, root])]), one])
        return add("Mul", [add("Mul", [value, share]), half])
    if activation == "SiLU":
        return add("Mul", [value, add("Sigmoid", [value])])
    return add({"ReLU": "Relu"}.get(activation, activation), [value])
