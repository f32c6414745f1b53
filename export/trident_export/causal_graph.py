"""Export of any transformers causal language model to one ONNX graph with an in-place KV cache.

The attention of the model is replaced, while it is traced, by ONNX Runtime's `GroupQueryAttention`
operator (com.microsoft), whose past and present tensors have the same shape. Bound to the same
buffer, the operator appends in place and every row of a batch has its own length: this is what
continuous batching needs, and it makes one engine serve every architecture.

The graph, for a model of L layers with H key-value heads of D numbers each:

    input_ids              int64   [batch, sequence]
    position_ids           int64   [batch, sequence]
    seqlens_k              int32   [batch]   tokens in the row's cache after this run, minus one
    total_sequence_length  int32   []        the largest of these counts
    logits_positions       int64   [kept]    which positions of `sequence` get logits
    past_key_values.<layer>.{key,value}   float32 [batch, H, capacity, D]
    -> logits              float32 [batch, kept, vocabulary]
    -> present.<layer>.{key,value}        float32 [batch, H, capacity, D]

This module traces; it does not load weights from a source, quantize, or check the result.
Operator reference: onnxruntime docs/ContribOperators.md, com.microsoft.GroupQueryAttention.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ATTENTION = "trident_group_query_attention"
OPSET = 17


class UnsupportedArchitecture(ValueError):
    """The model computes something that `GroupQueryAttention` does not express."""


@dataclass(frozen=True)
class AttentionGeometry:
    """Layers, query heads, key-value heads and numbers per head of a decoder."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> AttentionGeometry:
        """Read the geometry from a transformers configuration."""
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )


class _GroupQueryAttention(torch.autograd.Function):
    """Traced for its shapes, written to the graph as one operator."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, query, key, value, past_key, past_value, seqlens_k, total, geometry, scale, window, softcap
    ):
        return query.transpose(1, 2).clone(), past_key.clone(), past_value.clone()

    @staticmethod
    def symbolic(  # type: ignore[no-untyped-def]
        g, query, key, value, past_key, past_value, seqlens_k, total, geometry, scale, window, softcap
    ):
        # [batch, heads, sequence, head_dim] to [batch, sequence, heads x head_dim], by constants: torch would
        # write a dozen nodes that compute the same shape at every run.
        def merged(tensor):  # type: ignore[no-untyped-def]
            moved = g.op("Transpose", tensor, perm_i=[0, 2, 1, 3])
            return g.op("Reshape", moved, g.op("Constant", value_t=torch.tensor([0, 0, -1])))

        attention, present_key, present_value = g.op(
            "com.microsoft::GroupQueryAttention",
            *map(merged, (query, key, value)),
            past_key,
            past_value,
            seqlens_k,
            total,
            num_heads_i=geometry.heads,
            kv_num_heads_i=geometry.kv_heads,
            scale_f=scale,
            local_window_size_i=window,
            softcap_f=softcap,
            outputs=3,
        )
        split = torch.tensor([0, 0, geometry.heads, -1])
        attention = g.op("Reshape", attention, g.op("Constant", value_t=split))
        attention.setType(query.type().with_sizes([None, None, geometry.heads, geometry.head_dim]))
        present_key.setType(past_key.type())
        present_value.setType(past_value.type())
        return attention, present_key, present_value


@dataclass
class _Trace:
    """What the attention function needs while one forward pass is traced."""

    geometry: AttentionGeometry
    seqlens_k: torch.Tensor
    total: torch.Tensor
    past: list[tuple[torch.Tensor, torch.Tensor]]
    present: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """Transformers' attention interface: [batch, heads, sequence, head_dim] in, heads last but one out."""
        for name in ("s_aux", "position_bias", "head_mask"):
            if options.get(name) is not None:
                raise UnsupportedArchitecture(f"attention with {name!r} has no GroupQueryAttention form")
        geometry = self.geometry
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        scale = scaling if scaling is not None else geometry.head_dim**-0.5
        output, present_key, present_value = _GroupQueryAttention.apply(  # type: ignore[no-untyped-call]
            query,
            key,
            value,
            *self.past[layer],
            self.seqlens_k,
            self.total,
            geometry,
            float(scale),
            int(sliding_window) if sliding_window else -1,
            float(softcap or 0.0),
        )
        self.present[layer] = (present_key, present_value)
        return output, None


class _PassThroughCache(Cache):
    """Hands keys and values on unchanged: the operator keeps the cache, not transformers."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):  # type: ignore[no-untyped-def]
        return key_states, value_states

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0

    def get_mask_sizes(self, cache_position: torch.Tensor, layer_idx: int) -> tuple[int, int]:
        return cache_position.shape[0], 0


class _CausalGraph(torch.nn.Module):
    """The model with flat tensors in and out, as ONNX wants it."""

    def __init__(self, model: PreTrainedModel, geometry: AttentionGeometry) -> None:
        super().__init__()
        self.model = model
        self.geometry = geometry

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        seqlens_k: torch.Tensor,
        total: torch.Tensor,
        logits_positions: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        trace = _Trace(self.geometry, seqlens_k, total, list(zip(past[::2], past[1::2], strict=True)))
        head = self.model.get_output_embeddings()
        if head is None:
            raise UnsupportedArchitecture(f"{type(self.model).__name__} has no output embedding")
        # Logits of the wanted positions alone: a prefill of 256 tokens needs one row of the head, not 256.
        hook = head.register_forward_pre_hook(lambda module, inputs: (inputs[0].index_select(1, logits_positions),))
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, trace.attend)
        try:
            logits = self.model(
                input_ids=input_ids,
                position_ids=position_ids,
                past_key_values=_PassThroughCache(),
                use_cache=True,
            ).logits
        finally:
            hook.remove()
        if len(trace.present) != self.geometry.layers:
            raise UnsupportedArchitecture(
                f"{type(self.model).__name__} has {self.geometry.layers} layers, "
                f"{len(trace.present)} of them attend through transformers' attention interface"
            )
        flat = [tensor for layer in range(self.geometry.layers) for tensor in trace.present[layer]]
        return (logits, *flat)


@contextmanager
def _attention_replaced(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, lambda *args, **kwargs: None)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, lambda *args, **kwargs: None)
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def export_causal_graph(model: PreTrainedModel, path: Path) -> None:
    """Write `model` (float32, in evaluation mode) to `path`; weights beyond 2 GB lie beside it.

    Raises:
        UnsupportedArchitecture: the model does not attend through transformers' attention interface, or
            uses a kind of attention that the operator lacks.
    """
    geometry = AttentionGeometry.of(model.config)
    batch, sequence, capacity = 2, 3, 16
    kv_shape = (batch, geometry.kv_heads, capacity, geometry.head_dim)
    arguments = (
        torch.zeros(batch, sequence, dtype=torch.long),
        torch.arange(sequence)[None].repeat(batch, 1),
        torch.full((batch,), sequence - 1, dtype=torch.int32),
        torch.tensor(sequence, dtype=torch.int32),
        torch.tensor([1, 2]),
        *(torch.zeros(kv_shape) for _ in range(2 * geometry.layers)),
    )
    inputs = ["input_ids", "position_ids", "seqlens_k", "total_sequence_length", "logits_positions"]
    outputs = ["logits"]
    axes: dict[str, dict[int, str]] = {
        "input_ids": {0: "batch", 1: "sequence"},
        "position_ids": {0: "batch", 1: "sequence"},
        "seqlens_k": {0: "batch"},
        "logits_positions": {0: "kept"},
        "logits": {0: "batch", 1: "kept"},
    }
    for layer in range(geometry.layers):
        for kind in ("key", "value"):
            inputs.append(f"past_key_values.{layer}.{kind}")
            outputs.append(f"present.{layer}.{kind}")
            axes[inputs[-1]] = axes[outputs[-1]] = {0: "batch", 2: "capacity"}
    with _attention_replaced(model), torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracer warnings about constants: shapes are checked by the gate
        torch.onnx.export(
            _CausalGraph(model, geometry).eval(),  # the exporter restores this mode on the model
            arguments,
            str(path),
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
            custom_opsets={"com.microsoft": 1},
        )
