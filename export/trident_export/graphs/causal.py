"""Export of any transformers causal language model to one ONNX graph with an in-place KV cache.

The attention of the model is replaced, while it is traced, by ONNX Runtime's `GroupQueryAttention`
operator (com.microsoft), whose past and present tensors have the same shape. Bound to the same
buffer, the operator appends in place and every slot of the cache has its own length: this is what
continuous batching needs, and it makes one engine serve every architecture.

The model runs on packed tokens: those of all slots stand one after another in a batch of one, so that no
matmul is computed for padding. Only around the operator they are spread over slots of the cache. A slot has any
number of tokens: a prompt's chunk, one token, a draft that is verified, or none.

The graph, for a model of L layers with H key-value heads of D numbers each:

    input_ids              int64   [1, tokens]
    position_ids           int64   [1, tokens]       where the architecture looks positions up
    attention_tokens       int64   [slots, positions, 2] the token at each position of a slot: (0, token)
    attention_places       int64   [1, tokens, 2]    where each token is: (slot, position)
    query_seqlens          int32   [slots]           positions of the slot that count; 0: idle. Not in
                                                     graphs for a GPU, see `decoder_passes`
    seqlens_k              int32   [slots]           tokens in the slot's cache after this run, minus one
    total_sequence_length  int32   []                at least the largest of these counts
    logits_tokens          int64   [kept]            which tokens get logits
    past_key_values.<layer>.{key,value}   float32 [slots, H, capacity, D] of layers that attend
    state_*, past_states.<layer>.<kind>        of layers that keep other states, see `states`
    -> logits              float32 [1, kept, vocabulary]
    -> present.<layer>.{key,value}        float32 [slots, H, capacity, D]

The operator computes rotary embeddings where the model's own function computes the usual rotation, which is
checked with numbers; elsewhere they are traced.

This module traces; it does not load weights from a source, quantize, or check the result.
Operator reference: onnxruntime docs/ContribOperators.md, com.microsoft.GroupQueryAttention.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import onnx_ir as ir
import torch
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trident_export.errors import UnsupportedArchitecture
from trident_export.graphs import rotary, states
from trident_export.graphs.states import PAST, PRESENT, States, StatesOfCache, keeps_states, mixers_replaced
from trident_export.graphs.tracing import running, trace

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ATTENTION = "trident_group_query_attention"
STATELESS = ("mlp", "moe")  # layers of hybrids that keep nothing, as their configurations call them
_SUPPORTED = "choose a decoder that attends through transformers' attention interface (Llama, Qwen, Gemma, GPT-2, ...)"


@dataclass(frozen=True)
class AttentionGeometry:
    """Layers, query heads, key-value heads and numbers per head of a decoder."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> AttentionGeometry:
        """Read the geometry from a transformers configuration.

        Raises:
            UnsupportedArchitecture: it has no attention heads, as state-space and recurrent models have none.
        """
        if not getattr(config, "num_attention_heads", None):
            raise UnsupportedArchitecture(f"models of type {config.model_type!r} have no attention heads: {_SUPPORTED}")
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )


def _cache_name(model: PreTrainedModel) -> str:
    """The argument that takes the cache, which transformers renamed."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class Layers(NamedTuple):
    """What the layers of a model keep.

    Attributes:
        attending: layers with keys and values.
        states: shapes of a slot's other states by name, see `states`.
    """

    attending: list[int]
    states: dict[str, tuple[int, ...]]


class _GroupQueryAttention(torch.autograd.Function):
    """Traced for its shapes, written to the graph as one operator between two gathers.

    `query_seqlens` is written as the operator's last input: `decoder_passes` moves it to its position, behind
    optional inputs that are absent here and that torch's exporter can't leave out.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, geometry, options, query, key, value, past_key, past_value, tokens, positions, *others
    ):
        return query.transpose(1, 2).clone(), past_key.clone(), past_value.clone()

    @staticmethod
    def symbolic(  # type: ignore[no-untyped-def]
        g, geometry, options, query, key, value, past_key, past_value, tokens, positions, *others
    ):
        def constant(*values: int):  # type: ignore[no-untyped-def]
            return g.op("Constant", value_t=torch.tensor(values))

        # [1, heads, tokens, head_dim] to [slots, positions, heads x head_dim], by constants: torch would write a
        # dozen nodes that compute the same shape at every run.
        def spread(tensor):  # type: ignore[no-untyped-def]
            merged = g.op("Reshape", g.op("Transpose", tensor, perm_i=[0, 2, 1, 3]), constant(0, 0, -1))
            return g.op("GatherND", merged, tokens)

        attention, present_key, present_value = g.op(
            "com.microsoft::GroupQueryAttention",
            *map(spread, (query, key, value)),
            past_key,
            past_value,
            *others,
            num_heads_i=geometry.heads,
            kv_num_heads_i=geometry.kv_heads,
            outputs=3,
            **options,
        )
        packed = g.op("GatherND", attention, positions)
        attention = g.op("Reshape", packed, constant(0, 0, geometry.heads, -1))
        attention.setType(query.type().with_sizes([None, None, geometry.heads, geometry.head_dim]))
        present_key.setType(past_key.type())
        present_value.setType(past_value.type())
        return attention, present_key, present_value


@dataclass
class _Trace:
    """What the attention function needs while one forward pass is traced."""

    geometry: AttentionGeometry
    batch: _Batch
    rotary: tuple[torch.Tensor, torch.Tensor] | None
    past: dict[int, tuple[torch.Tensor, torch.Tensor]]
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
        """Transformers' attention interface: [1, heads, tokens, head_dim] in, heads last but one out."""
        for name in ("s_aux", "position_bias", "head_mask"):
            if options.get(name) is not None:
                raise UnsupportedArchitecture(f"attention with {name!r} has no GroupQueryAttention form: {_SUPPORTED}")
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        scale = scaling if scaling is not None else self.geometry.head_dim**-0.5
        attributes = {
            "scale_f": float(scale),
            "local_window_size_i": int(sliding_window) if sliding_window else -1,
            "softcap_f": float(softcap or 0.0),
            "do_rotary_i": int(self.rotary is not None),
        }
        batch = self.batch
        lengths = (batch.seqlens_k, batch.total, *(self.rotary or ()), batch.query_seqlens)
        output, present_key, present_value = _GroupQueryAttention.apply(  # type: ignore[no-untyped-call]
            self.geometry,
            attributes,
            query,
            key,
            value,
            *self.past[layer],
            batch.tokens,
            batch.positions,
            *lengths,
        )
        self.present[layer] = (present_key, present_value)
        return output, None


class _Batch(NamedTuple):
    """The graph's inputs that say where tokens stand; see the module's docstring."""

    tokens: torch.Tensor
    positions: torch.Tensor
    query_seqlens: torch.Tensor
    seqlens_k: torch.Tensor
    total: torch.Tensor


class _PassThroughCache(StatesOfCache, Cache):
    """Hands keys and values on unchanged: the operator keeps the cache, not transformers."""

    def __init__(self, kept: States) -> None:
        super().__init__(layers=[])
        self.states = kept

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):  # type: ignore[no-untyped-def]
        return key_states, value_states

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


class _CausalGraph(torch.nn.Module):
    """The model with flat tensors in and out, as ONNX wants it."""

    def __init__(
        self,
        model: PreTrainedModel,
        geometry: AttentionGeometry,
        layers: Layers,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.geometry = geometry
        self.layers = layers
        self.has_rotary = rotary is not None
        if rotary is not None:
            self.register_buffer("cos_cache", rotary[0])
            self.register_buffer("sin_cache", rotary[1])

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, *others: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        attending = self.layers.attending
        states_begin = 6 + 2 * len(attending)
        batch, logits_tokens, past, kept = _Batch(*others[:5]), others[5], others[6:states_begin], others[states_begin:]
        rotary = (self.cos_cache, self.sin_cache) if self.has_rotary else None
        pairs = dict(zip(attending, zip(past[::2], past[1::2], strict=True), strict=True))
        trace = _Trace(self.geometry, batch, rotary, pairs)  # type: ignore[arg-type]
        count = len(states.INPUTS)
        places = states.Places._make((*kept[:count], batch.positions)) if kept else None
        kept_states = States(places, dict(zip(self.layers.states, kept[count:], strict=True)))
        head = self.model.get_output_embeddings()
        if head is None:
            raise UnsupportedArchitecture(f"{type(self.model).__name__} has no output embedding: {_SUPPORTED}")
        # Only the wanted tokens get logits: a prefill of 256 tokens needs one row of the head, not 256.
        hook = head.register_forward_pre_hook(lambda module, inputs: (inputs[0].index_select(1, logits_tokens),))
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, trace.attend)
        try:
            with mixers_replaced(self.model, kept_states):
                logits = self.model(
                    input_ids=input_ids,
                    position_ids=position_ids,
                    use_cache=True,
                    **{_cache_name(self.model): _PassThroughCache(kept_states)},
                ).logits
        finally:
            hook.remove()
        if set(trace.present) != set(attending):
            raise UnsupportedArchitecture(
                f"{type(self.model).__name__} has {len(attending)} layers, "
                f"{len(trace.present)} of them attend through transformers' attention interface: {_SUPPORTED}"
            )
        flat = [tensor for layer in attending for tensor in trace.present[layer]]
        return (logits, *flat, *(kept_states.present[name] for name in self.layers.states))


@contextmanager
def _attention_replaced(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, lambda *args, **kwargs: None)
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def look_at(model: PreTrainedModel) -> tuple[AttentionGeometry, Layers]:
    """The geometry of a model's attention, and what its layers keep; from a run, where some keep other states.

    Raises:
        UnsupportedArchitecture: a layer of the run neither attends nor keeps a state that is known.
    """
    if not keeps_states(model):
        geometry = AttentionGeometry.of(model.config)
        return geometry, Layers(list(range(geometry.layers)), {})
    found = States(states.Places(*states.EXAMPLE))
    seen: dict[int, AttentionGeometry] = {}

    def attend(module, query, key, value, *arguments, **options):  # type: ignore[no-untyped-def]
        seen[int(module.layer_idx)] = AttentionGeometry(0, query.shape[1], key.shape[1], key.shape[3])
        return torch.zeros(1, query.shape[2], query.shape[1], value.shape[3]), None

    tokens = torch.zeros(1, 5, dtype=torch.long)
    with running(f"a {type(model).__name__}"), _attention_replaced(model), torch.inference_mode():
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
        with mixers_replaced(model, found):
            model(input_ids=tokens, use_cache=True, **{_cache_name(model): _PassThroughCache(found)})
    found.check_all_taken()
    kinds = getattr(model.config, "layer_types", None) or {}
    count = model.config.num_hidden_layers
    without = set(range(count)) - set(seen) - {int(name.split(".")[0]) for name in found.present}
    odd = [layer for layer in without if not kinds or kinds[layer] not in STATELESS]
    if odd or len(set(seen.values())) > 1:
        raise UnsupportedArchitecture(
            f"{type(model).__name__} has {count} layers; {len(odd)} of them neither attend through transformers' "
            f"attention interface nor keep a known state; heads have {len(set(seen.values()))} sizes: {_SUPPORTED}"
        )
    geometry = next(iter(seen.values()), AttentionGeometry(0, 1, 1, 1))
    return geometry, Layers(sorted(seen), {name: tuple(state.shape[1:]) for name, state in found.present.items()})


def export_causal_graph(model: PreTrainedModel, positions: int) -> ir.Model:
    """The graph of `model` (float32, in evaluation mode), whose numbers are the model's own; see `tracing`.

    Args:
        positions: the largest capacity of a cache that the graph will be used with.

    Raises:
        UnsupportedArchitecture: the model does not attend through transformers' attention interface, or
            uses a kind of attention that the operator lacks.
    """
    geometry, layers = look_at(model)
    slots, positions_in_slot, tokens, capacity = 2, 3, 5, 16
    kv_shape = (slots, geometry.kv_heads, capacity, geometry.head_dim)
    arguments = (
        torch.zeros(1, tokens, dtype=torch.long),
        torch.arange(tokens)[None],
        torch.tensor([[[0, 0], [0, 1], [0, 2]], [[0, 3], [0, 4], [0, 4]]]),
        torch.tensor([[[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]]),
        torch.tensor([3, 2], dtype=torch.int32),
        torch.tensor([2, 1], dtype=torch.int32),
        torch.tensor(positions_in_slot, dtype=torch.int32),
        torch.tensor([2, 4, 3]),
        *(torch.zeros(kv_shape) for _ in range(2 * len(layers.attending))),
        *(states.EXAMPLE[:-1] if layers.states else ()),
        *(torch.zeros(slots, *shape) for shape in layers.states.values()),
    )
    inputs = ["input_ids", "position_ids", "attention_tokens", "attention_places", "query_seqlens", "seqlens_k"]
    inputs += ["total_sequence_length", "logits_tokens"]
    outputs = ["logits"]
    axes: dict[str, dict[int, str]] = {
        "input_ids": {1: "tokens"},
        "position_ids": {1: "tokens"},
        "attention_tokens": {0: "rows", 1: "places"},
        "attention_places": {1: "tokens"},
        "query_seqlens": {0: "rows"},
        "seqlens_k": {0: "rows"},
        "logits_tokens": {0: "kept"},
        "logits": {1: "kept"},
    }
    for layer in layers.attending:
        for kind in ("key", "value"):
            inputs.append(f"past_key_values.{layer}.{kind}")
            outputs.append(f"present.{layer}.{kind}")
            axes[inputs[-1]] = axes[outputs[-1]] = {0: "rows", 2: "capacity"}
    if layers.states:
        inputs += states.INPUTS
        axes |= states.AXES
    for name in layers.states:
        inputs.append(PAST + name)
        outputs.append(PRESENT + name)
        axes[inputs[-1]] = axes[outputs[-1]] = {0: "rows"}
    with rotary.fuse_rotary(model, geometry.head_dim, positions) as caches, _attention_replaced(model):
        graph = _CausalGraph(model, geometry, layers, caches)
        return trace(graph, arguments, inputs=inputs, outputs=outputs, axes=axes, of=f"a {type(model).__name__}")
