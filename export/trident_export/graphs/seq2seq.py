"""Export of transformers' encoder-decoder models to two ONNX graphs: encode once, decode many beams together.

The encoder gives the keys and values of every decoder layer's cross-attention, computed once for a text:

    input_ids            int64   [texts, sequence]     texts of one length, without padding
    -> cross.<layer>.key     float32 [texts, H, D, sequence]   transposed, as the matmul with the queries reads it
    -> cross.<layer>.value   float32 [texts, H, sequence, D]

The decoder appends one token to each row. A row is a beam; its self-attention is ONNX Runtime's `GroupQueryAttention`
with a cache that is bound in place, so every beam has its own length. The beams of one text share the text's keys and
values: around the cross-attention the rows are spread over (text, position).

    input_ids              int64   [rows, 1]
    positions              int64   [rows]            of the token in its row, from 0
    seqlens_k              int32   [rows]            the same, as the operator reads it
    total_sequence_length  int32   []                the capacity
    cross_rows             int64   [texts, places]   which row is at each position of a text
    cross_places           int64   [rows]            where each row is: text x places + position
    cross_mask             float32 [texts, 1, 1, L]  0 for the text's tokens, a large negative number behind them
    cross.<layer>.key      float32 [texts, H, D, L]
    cross.<layer>.value    float32 [texts, H, L, D]
    past.<layer>.{key,value}      float32 [rows, H, capacity, D]
    -> logits              float32 [rows, vocabulary]
    -> present.<layer>.{key,value}

While the decoder is traced its attention modules are replaced by functions of their projections, which two shapes of
modules share: BART's (Marian, mBART, Pegasus, M2M100) and T5's, whose relative positions become the operator's
`attention_bias`. Operator reference: onnxruntime docs/ContribOperators.md, com.microsoft.GroupQueryAttention.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput

from trident_export.errors import UnsupportedArchitecture
from trident_export.graphs import editing
from trident_export.graphs.decoder_passes import attention_nodes, drop_idle_casts, fuse_norms
from trident_export.graphs.shape_folding import fold_shapes
from trident_export.graphs.tracing import trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BIAS = 10  # position of `attention_bias` among the attention operator's inputs


@dataclass(frozen=True)
class Attention:
    """One attention module of a decoder layer, whatever its architecture calls its projections."""

    module: torch.nn.Module
    query: torch.nn.Linear
    key: torch.nn.Linear
    value: torch.nn.Linear
    output: torch.nn.Linear
    heads: int
    head_dim: int
    scale: float

    @classmethod
    def of(cls, module: Any) -> Attention:
        """Read a module of BART's or of T5's shape.

        Raises:
            UnsupportedArchitecture: it has neither.
        """
        if all(hasattr(module, name) for name in ("q_proj", "k_proj", "v_proj", "out_proj", "num_heads", "head_dim")):
            scale = float(module.scaling)
            parts = (module.q_proj, module.k_proj, module.v_proj, module.out_proj)
            return cls(module, *parts, module.num_heads, module.head_dim, scale)
        if all(hasattr(module, name) for name in ("q", "k", "v", "o", "n_heads", "key_value_proj_dim")):
            return cls(module, module.q, module.k, module.v, module.o, module.n_heads, module.key_value_proj_dim, 1.0)
        raise UnsupportedArchitecture(
            f"{type(module).__name__} is no attention of BART's or T5's kind, which Trident exports"
        )


def decoder_attentions(model: PreTrainedModel) -> list[tuple[Attention, Attention]]:
    """Self- and cross-attention of each decoder layer.

    Raises:
        UnsupportedArchitecture: the layers have another shape.
    """
    if getattr(model.config, "attention_type", "") == "block_sparse":
        raise UnsupportedArchitecture(
            f"{type(model).__name__} attends to blocks of long texts, which a graph does not: set attention_type to "
            "original_full in its config.json, or choose another model"
        )
    decoder = model.get_decoder()
    if hasattr(decoder, "block"):
        return [
            (Attention.of(b.layer[0].SelfAttention), Attention.of(b.layer[1].EncDecAttention)) for b in decoder.block
        ]
    layers = getattr(decoder, "layers", None)
    if layers is None or not all(hasattr(layer, "encoder_attn") for layer in layers):
        raise UnsupportedArchitecture(f"{type(model).__name__} has no decoder layers with cross-attention")
    return [(Attention.of(layer.self_attn), Attention.of(layer.encoder_attn)) for layer in layers]


class _Encoder(torch.nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.encoder = model.get_encoder()
        self.attentions = [cross for _, cross in decoder_attentions(model)]
        self.projections = torch.nn.ModuleList([part for a in self.attentions for part in (a.key, a.value)])

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = self.encoder(input_ids=input_ids).last_hidden_state
        flat = []
        for attention in self.attentions:
            key, value = (
                part(hidden).view(*hidden.shape[:2], attention.heads, attention.head_dim)
                for part in (attention.key, attention.value)
            )
            flat += [key.permute(0, 2, 3, 1), value.transpose(1, 2)]
        return tuple(flat)


class _SelfAttention(torch.autograd.Function):
    """Traced for its shapes, written to the graph as one operator; `place_inputs` moves its inputs."""

    @staticmethod
    def forward(ctx, heads, head_dim, scale, packed, past_key, past_value, seqlens_k, total, *bias):  # type: ignore[no-untyped-def]
        return packed[..., : packed.shape[-1] // 3].clone(), past_key.clone(), past_value.clone()

    @staticmethod
    def symbolic(g, heads, head_dim, scale, packed, past_key, past_value, seqlens_k, total, *bias):  # type: ignore[no-untyped-def]
        attention, present_key, present_value = g.op(
            "com.microsoft::GroupQueryAttention",
            packed,
            past_key,
            past_value,
            seqlens_k,
            total,
            *bias,
            num_heads_i=heads,
            kv_num_heads_i=heads,
            scale_f=scale,
            outputs=3,
        )
        attention.setType(packed.type().with_sizes([None, 1, heads * head_dim]))
        present_key.setType(past_key.type())
        present_value.setType(past_value.type())
        return attention, present_key, present_value


class _Decoder(torch.nn.Module):
    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        super().__init__()
        self.model = model
        self.attentions = decoder_attentions(model)
        for layer, (own, _) in enumerate(self.attentions):
            parts = (own.query, own.key, own.value)
            self.register_buffer(f"weight_{layer}", torch.cat([part.weight for part in parts]))
            biased = all(part.bias is not None for part in parts)
            self.register_buffer(f"bias_{layer}", torch.cat([part.bias for part in parts]) if biased else None)
        table = _position_table(model, capacity)
        self.register_buffer("position_table", table)
        # T5's first layer has the bias of all layers, each of UMT5's its own.
        tables = [_relative_bias(own.module, capacity) for own, _ in self.attentions]
        for layer, relative in enumerate(tables):
            self.register_buffer(f"relative_{layer}", relative)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, *others: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        seqlens_k, total, rows, places, mask, *flat = others
        count = 2 * len(self.attentions)
        cross, past = flat[:count], flat[count:]
        biases = self._biases(positions)
        present: list[torch.Tensor] = []

        def attend(layer: int, hidden: torch.Tensor) -> torch.Tensor:
            own = self.attentions[layer][0]
            packed = functional.linear(hidden, getattr(self, f"weight_{layer}"), getattr(self, f"bias_{layer}"))
            output, key, value = _SelfAttention.apply(  # type: ignore[no-untyped-call]
                own.heads,
                own.head_dim,
                own.scale,
                packed,
                past[2 * layer],
                past[2 * layer + 1],
                seqlens_k,
                total,
                *biases[layer],
            )
            present.extend((key, value))
            projected: torch.Tensor = own.output(output)
            return projected

        def read(layer: int, hidden: torch.Tensor) -> torch.Tensor:
            own = self.attentions[layer][1]
            width = own.heads * own.head_dim
            query = (own.query(hidden) * own.scale).view(-1, width)
            spread = query.index_select(0, rows.reshape(-1)).view(*rows.shape, own.heads, own.head_dim).transpose(1, 2)
            weights = torch.softmax(torch.matmul(spread, cross[2 * layer]) + mask, dim=-1)
            found = torch.matmul(weights, cross[2 * layer + 1]).transpose(1, 2).reshape(-1, width)
            projected: torch.Tensor = own.output(found.index_select(0, places).unsqueeze(1))
            return projected

        table: torch.Tensor | None = self.position_table  # type: ignore[assignment]
        with _replaced(self.model, self.attentions, attend, read, table, positions):
            logits = self.model(
                decoder_input_ids=input_ids,
                encoder_outputs=BaseModelOutput(
                    torch.zeros(1, 1, self.model.config.hidden_size).expand(input_ids.shape[0], 1, -1)
                ),
                use_cache=False,
            ).logits
        return (logits[:, -1], *present)

    def _biases(self, positions: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """Each layer's relative bias of the rows' tokens, [rows, heads, 1, capacity]; what is ahead is masked."""
        found: list[tuple[torch.Tensor, ...]] = []
        for layer in range(len(self.attentions)):
            table: torch.Tensor | None = getattr(self, f"relative_{layer}")
            if table is None:
                found.append(found[0] if found else ())
                continue
            distance = (positions[:, None] - torch.arange(table.shape[0])[None]).clamp(min=0)
            found.append((table[distance].permute(0, 2, 1).unsqueeze(2),))
        return found


@contextmanager
def _replaced(
    model: PreTrainedModel,
    attentions: list[tuple[Attention, Attention]],
    attend: Any,
    read: Any,
    table: torch.Tensor | None,
    positions: torch.Tensor,
) -> Iterator[None]:
    """The decoder's attention modules and its positions, for one forward pass."""

    def forward(function: Any, layer: int) -> Any:
        # T5's layers want a position bias and weights back, BART's weights, which nothing uses.
        unused = (torch.zeros(1), None) if hasattr(attentions[0][0].module, "key_value_proj_dim") else (None,)
        return lambda self, hidden_states, *args, **kwargs: (function(layer, hidden_states), *unused)

    modules = [own.module for pair in attentions for own in pair]
    for layer, (own, cross) in enumerate(attentions):
        own.module.forward = types.MethodType(forward(attend, layer), own.module)
        cross.module.forward = types.MethodType(forward(read, layer), cross.module)
    if table is not None:
        embed = model.get_decoder().embed_positions
        modules.append(embed)
        embed.forward = types.MethodType(lambda self, *args, **kwargs: table[positions].unsqueeze(1), embed)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _position_table(model: PreTrainedModel, capacity: int) -> torch.Tensor | None:
    """The decoder's embedding of each position, [capacity, width]; None where it has none."""
    embed: Any = getattr(model.get_decoder(), "embed_positions", None)
    if embed is None:
        return None
    offset = getattr(embed, "offset", 0)
    if hasattr(embed, "get_embedding"):  # M2M100 computes them, from behind the padding token on
        first = embed.padding_idx + 1
        weights: torch.Tensor = embed.get_embedding(first + capacity, embed.embedding_dim, embed.padding_idx)
        return weights[first : first + capacity].float()
    if getattr(embed, "weight", None) is None:
        raise UnsupportedArchitecture(
            f"{type(embed).__name__} computes positions in a way that Trident does not have: choose another model"
        )
    weights = embed.weight.detach()
    if weights.shape[0] < capacity + offset:
        raise UnsupportedArchitecture(
            f"the decoder has {weights.shape[0] - offset} positions, {capacity} are asked for"
        )
    return weights[offset : offset + capacity]


def _relative_bias(module: Any, capacity: int) -> torch.Tensor | None:
    """T5's bias by distance of one attention module, [capacity, heads]; None where it has none."""
    if not getattr(module, "has_relative_attention_bias", False):
        return None
    distances, weight = -torch.arange(capacity), module.relative_attention_bias.weight.detach()
    if "num_buckets" in inspect.signature(module._relative_position_bucket).parameters:
        buckets = module._relative_position_bucket(
            distances,
            bidirectional=False,
            num_buckets=module.relative_attention_num_buckets,
            max_distance=module.relative_attention_max_distance,
        )
    else:  # UMT5's knows these itself
        buckets = module._relative_position_bucket(distances)
    found: torch.Tensor = weight[buckets]
    return found


def export_encoder(model: PreTrainedModel, path: Path) -> None:
    """Write the encoder's graph."""
    layers = len(decoder_attentions(model))
    outputs = [f"cross.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    axes = {"input_ids": {0: "texts", 1: "sequence"}}
    axes |= {name: {0: "texts", 3 if name.endswith("key") else 2: "sequence"} for name in outputs}
    _export(_Encoder(model), (torch.ones(2, 5, dtype=torch.long),), path, ["input_ids"], outputs, axes)


def export_decoder(model: PreTrainedModel, path: Path, capacity: int) -> None:
    """Write the decoder's graph.

    Args:
        capacity: positions of a row of the cache that the graph will be used with.

    Raises:
        UnsupportedArchitecture: it has a shape that is not known, or fewer positions.
    """
    attentions = decoder_attentions(model)
    own = attentions[0][0]
    rows, texts, length = 3, 2, 7
    shapes = {
        "key": ((texts, own.heads, own.head_dim, length), {0: "texts", 3: "length"}),
        "value": ((texts, own.heads, length, own.head_dim), {0: "texts", 2: "length"}),
    }
    names = ["input_ids", "positions", "seqlens_k", "total_sequence_length", "cross_rows", "cross_places", "cross_mask"]
    arguments = [
        torch.ones(rows, 1, dtype=torch.long),
        torch.tensor([1, 0, 2]),
        torch.tensor([1, 0, 2], dtype=torch.int32),
        torch.tensor(capacity, dtype=torch.int32),
        torch.tensor([[0, 0], [1, 2]]),
        torch.tensor([0, 2, 3]),
        torch.zeros(texts, 1, 1, length),
    ]
    axes: dict[str, dict[int, str]] = {
        "input_ids": {0: "rows"},
        "positions": {0: "rows"},
        "seqlens_k": {0: "rows"},
        "cross_rows": {0: "texts", 1: "places"},
        "cross_places": {0: "rows"},
        "cross_mask": {0: "texts", 3: "length"},
        "logits": {0: "rows"},
    }
    outputs = ["logits"]
    for layer in range(len(attentions)):
        for kind, (shape, axis) in shapes.items():
            names.append(f"cross.{layer}.{kind}")
            arguments.append(torch.zeros(shape))
            axes[names[-1]] = axis
    for layer in range(len(attentions)):
        for kind in ("key", "value"):
            names.append(f"past.{layer}.{kind}")
            outputs.append(f"present.{layer}.{kind}")
            arguments.append(torch.zeros(rows, own.heads, capacity, own.head_dim))
            axes[names[-1]] = axes[outputs[-1]] = {0: "rows"}
    _export(_Decoder(model, capacity), tuple(arguments), path, names, outputs, axes)


def _export(
    module: torch.nn.Module,
    arguments: tuple[torch.Tensor, ...],
    path: Path,
    inputs: list[str],
    outputs: list[str],
    axes: dict[str, dict[int, str]],
) -> None:
    said, operators = f"a {type(module.model).__name__}", isinstance(module, _Decoder)
    graph = trace(module, arguments, inputs=inputs, outputs=outputs, axes=axes, of=said, operators=operators)
    for node in attention_nodes(graph):
        place_inputs(node)
    fold_shapes(graph)
    drop_idle_casts(graph)
    editing.save(fuse_norms(graph), path)


def place_inputs(node: ir.Node) -> None:
    """Move the attention operator's inputs to their positions behind optional ones that are absent."""
    packed, past_key, past_value, seqlens_k, total, *bias = node.inputs
    placed = [packed, None, None, past_key, past_value, seqlens_k, total]
    editing.set_inputs(node, [*placed, *[None] * (_BIAS - len(placed)), *bias] if bias else placed)
