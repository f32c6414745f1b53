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

While the model is traced, its attention is a plain one in few operators; an architecture that does not attend through
transformers' attention interface is traced as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trident_export.errors import UnsupportedArchitecture
from trident_export.graphs.editing import constant, make, reduced, save
from trident_export.graphs.tracing import running, trace
from trident_export.graphs.unpadding import unpad
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_serving.encoders.pooling import Pooling

ATTENTION = "trident_encoder_attention"
TOKEN_TYPES = "token_type_ids"
_INPUTS = ("input_ids", "attention_mask", TOKEN_TYPES)
_OUTPUTS = ("last_hidden_state", "logits", "start_logits", "end_logits")
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
) -> None:
    """Write the graph of the Hugging Face folder `source` to `path`, in float32.

    Args:
        head: the Auto class of transformers for the task.
        inputs: names that the graph must have, as above.
        outputs: so too.
        finish: adds the outputs that the model itself does not give.

    Raises:
        UnsupportedArchitecture: there is no such head, or it can't be traced, or gives other outputs.
        UnreadableSource: the weights are missing or damaged.
    """
    model, taken = _load(source, head)
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
    graph = trace(traced, tensors, inputs=names, outputs=traced.wanted, axes=axes, of=said, operators=False)
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
    unpad(graph)
    save(graph, path)


def _load(source: HuggingFaceFolder, head: Any) -> tuple[PreTrainedModel, list[str]]:
    """The model with the attention that is traced, and which of the graph's inputs it reads.

    Raises:
        UnsupportedArchitecture: the architecture has no such head, or reads no text.
        UnreadableSource: the weights are missing or damaged.
    """
    model = source.load(head)
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
        ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, eager_mask)
        model.set_attn_implementation(ATTENTION)
    return model, names


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
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    # Scaled queries, not scores: there are fewer.
    scores = torch.matmul(query * (query.shape[-1] ** -0.5 if scaling is None else scaling), key.transpose(2, 3))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    return torch.matmul(scores.softmax(dim=-1), value).transpose(1, 2).contiguous(), None


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


def with_pooling(model: ir.Model, pooling: Pooling) -> None:
    """Add the output `pooled`; the numbers are those of `encoders.pooling.pool` for padding on the right."""
    graph = model.graph
    hidden = next(value for value in graph.outputs if value.name == "last_hidden_state")
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    zero, one, two, lowest = (
        constant(graph, f"pooling/{name}", value)
        for name, value in (
            ("zero", np.array(0, np.int64)),
            ("one", np.array([1], np.int64)),
            ("two", np.array([2], np.int64)),
            ("lowest", np.array(np.finfo(np.float32).min, np.float32)),
        )
    )

    def add(kind: str, inputs: list[ir.Value], output: str, **attributes: Any) -> ir.Value:
        graph.append(make(kind, inputs, output, **attributes))
        return graph[-1].outputs[0]

    if pooling is Pooling.CLS:
        pooled = add("Gather", [hidden, zero], "pooled", axis=1)
    elif pooling is Pooling.LAST_TOKEN:
        lengths = add("ReduceSum", [mask, one], "pooling/lengths", keepdims=1)
        ends = add("Sub", [lengths, one], "pooling/ends")
        pooled = add("GatherND", [hidden, ends], "pooled", batch_dims=1)
    elif pooling is Pooling.MAX:
        column = add("Unsqueeze", [mask, two], "pooling/column")
        real = add("Cast", [column], "pooling/real", to=ir.DataType.BOOL)
        kept = add("Where", [real, hidden, lowest], "pooling/kept")
        inputs, axis = reduced(model, kept, one)
        pooled = add("ReduceMax", inputs, "pooled", keepdims=0, **axis)
    else:
        weights = add("Cast", [mask], "pooling/weights", to=ir.DataType.FLOAT)
        row = add("Unsqueeze", [weights, one], "pooling/row")
        summed = add("MatMul", [row, hidden], "pooling/sum")
        total = add("Squeeze", [summed, one], "pooling/total")
        count = add("ReduceSum", [weights, one], "pooling/count", keepdims=1)
        pooled = add("Div", [total, count], "pooled")
    pooled.type, pooled.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", hidden.shape[2]])
    graph.outputs.append(pooled)
