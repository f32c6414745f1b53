"""Export of any transformers causal language model to one ONNX graph with an in-place KV cache.

The attention of the model is replaced, while it is traced, by ONNX Runtime's `GroupQueryAttention`
operator (com.microsoft), whose past and present tensors have the same shape. Bound to the same
buffer, the operator appends in place and every slot of the cache has its own length: this is what
continuous batching needs, and it makes one engine serve every architecture. Where the operator can't do what a layer
does, the layer's own function attends over the same cache (`slot_attention`). A model that does not attend through
transformers' attention interface runs over slots as a whole, padding included. A first run with numbers finds the
layers and what each of them needs, and must give Hugging Face's logits.

The model runs on packed tokens: those of all slots stand one after another in a batch of one, so that no
matmul is computed for padding. Only around the operator they are spread over slots of the cache. A slot has any
number of tokens: a prompt's chunk, one token, a draft that is verified, or none.

The graph, for layers with H key-value heads of D numbers each, which may differ by layer:

    input_ids              int64   [1, tokens]
    position_ids           int64   [1, tokens]       where the architecture looks positions up
    attention_tokens       int64   [slots, positions, 2] the token at each position of a slot: (0, token)
    attention_places       int64   [1, tokens, 2]    where each token is: (slot, position)
    query_seqlens          int32   [slots]           positions of the slot that count; 0: idle. Not in
                                                     graphs for a GPU, see `decoder_passes`
    seqlens_k              int32   [slots]           tokens in the slot's cache after this run, minus one
    total_sequence_length  int32   []                at least the largest of these counts
    logits_tokens          int64   [kept]            which tokens get logits
    rotations              int64   [1, tokens]       0, or 1 for tokens of a text beyond the original context. Only in
                                                     graphs of models with two rotations, see `rotary`
    past_key_values.<layer>.{key,value}   float32 [slots, H, capacity, D]
    -> logits              float32 [1, kept, vocabulary]
    -> present.<layer>.{key,value}        float32 [slots, H, capacity, D]

Keys by which a layer chooses what it attends to are a layer of their own, one half of each as its key, the other as its
value.

The operator computes rotary embeddings where the model's own function computes the usual rotation, which is
checked with numbers; elsewhere they are traced.

This module traces; it does not load weights from a source, quantize, or check the result.
Operator reference: onnxruntime docs/ContribOperators.md, com.microsoft.GroupQueryAttention.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trident_export.errors import UnsupportedArchitecture
from trident_export.graphs import rotary, states
from trident_export.graphs.decoder_passes import QUERY_SEQLENS
from trident_export.graphs.editing import set_parts
from trident_export.graphs.experts import every_expert
from trident_export.graphs.slot_attention import Batch, MaskFunction, Slots, window_of
from trident_export.graphs.states import PAST, PRESENT, States, StatesOfCache, keeps_states, mixers_replaced
from trident_export.graphs.tracing import cause, running, trace
from trident_serving.generation.decoder import ORIGINAL_CONTEXT
from trident_serving.runtime.kv_cache import KEYS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "trident_slots"
_BIAS = "position_bias"  # an option of attentions
# Types whose attention asks the cache where tokens and keys are, to make biases of their distances.
_ASK_FOR_POSITIONS = ("inkling_text",)
HEAD_MULTIPLE = 8  # of a head's size, which the operator wants
# Of the first run's logits from Hugging Face's, in standard deviations of these. Another order of sums makes 1e-4 at
# most; a mistake in positions, masks or experts makes 0.1 and more.
_LARGEST_DIFFERENCE = 1e-2
_SUPPORTED = "choose another model"

_WEIGHTED = "weights its convolutions anew for every token, which Trident does not have"
_DRAFTS = "drafts for another model, whose keys and values it reads"
# Types that a first run would refuse, too, and what they do in a user's words.
_LACKING = {
    "blt": "reads bytes in patches, which another model in it cuts",
    "cpmant": "puts tokens of its own before every text",
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
    "inkling2_loop_text": _WEIGHTED,
    "inkling2_text": _WEIGHTED,
    "prophetnet": "predicts several tokens at once by attention of its own, which Trident does not have",
    "qwen4_exp_text": "looks up the tokens before each one and keeps an index of keys, which Trident does not have",
    "xlm": "reads what stands on both sides of a token",
    "xlstm": "keeps states of a recurrence that Trident does not have",
}

# The first run's places of tokens for states: five of one text, then three of another.
_FIRST_PLACES = (
    torch.tensor([[0, 1, 2, 3, 4], [5, 6, 7, 7, 7]]),
    torch.tensor([[1.0] * 5, [1.0, 1.0, 1.0, 0.0, 0.0]])[..., None],
    torch.tensor([0, 1]),
    torch.tensor([0, 5, 8], dtype=torch.int32),
)

Heads = tuple[int, int]  # how many, and numbers of each


@dataclass(frozen=True)
class Operator:
    """What the attention operator is told for one layer.

    Attributes:
        window: positions that a query sees at most; -1: all.
        softcap: 0: none.
        sinks: whether each head has a number that the softmax counts and that has no value.
        rotation: what it rotates queries and keys with.
    """

    heads: int
    kv_heads: int
    size: int
    scale: float
    window: int
    softcap: float
    sinks: bool
    rotation: rotary.Rotation | None


@dataclass(frozen=True)
class Layer:
    """One attention of the model, in the order of the run.

    Attributes:
        operator: None: the layer's own function attends.
    """

    key: Heads
    value: Heads
    operator: Operator | None = None


@dataclass(frozen=True)
class Plan:
    """How a model becomes a graph.

    Attributes:
        packed: tokens of all slots stand one after another; otherwise each slot has a row.
        first_position: what the model calls the first position.
        rotary_calls: calls of the rotating function that the operator makes up for.
        states: shapes of a slot's other states by name, see `states`.
        original_context: tokens up to which a text has the first of two rotations; 0: there is one.
    """

    packed: bool
    first_position: int
    layers: tuple[Layer, ...]
    rotary_calls: frozenset[int] = frozenset()
    states: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    original_context: int = 0


class _GroupQueryAttention(torch.autograd.Function):
    """Traced for its shapes, written to the graph as one operator between two gathers."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, operator, query, key, value, past_key, past_value, batch_tokens, batch_positions, *others
    ):
        return query.transpose(1, 2).clone(), past_key.clone(), past_value.clone()

    @staticmethod
    def symbolic(  # type: ignore[no-untyped-def]
        g, operator, query, key, value, past_key, past_value, batch_tokens, batch_positions, *others
    ):
        def constant(*values: int):  # type: ignore[no-untyped-def]
            return g.op("Constant", value_t=torch.tensor(values))

        # [1, heads, tokens, head_dim] to [slots, positions, heads x head_dim], by constants: torch would write a
        # dozen nodes that compute the same shape at every run.
        def spread(tensor):  # type: ignore[no-untyped-def]
            merged = g.op("Reshape", g.op("Transpose", tensor, perm_i=[0, 2, 1, 3]), constant(0, 0, -1))
            return g.op("GatherND", merged, batch_tokens)

        absent = g.op("prim::Constant")
        absent.setType(torch._C.OptionalType.ofTensor())
        query_seqlens, seqlens_k, total, *weights = others
        inputs = [*map(spread, (query, key, value)), past_key, past_value, seqlens_k, total]
        inputs += [weights.pop(0), weights.pop(0)] if operator.rotation else [absent] * 2
        inputs.append(weights.pop(0) if operator.rotation and operator.rotation.by_row else absent)
        inputs += [absent, weights.pop(0) if operator.sinks else absent]
        attention, present_key, present_value = g.op(
            "com.microsoft::GroupQueryAttention",
            *inputs,
            *[absent] * (QUERY_SEQLENS - len(inputs)),
            query_seqlens,
            outputs=3,
            num_heads_i=operator.heads,
            kv_num_heads_i=operator.kv_heads,
            scale_f=operator.scale,
            local_window_size_i=operator.window,
            softcap_f=operator.softcap,
            do_rotary_i=int(operator.rotation is not None),
            rotary_interleaved_i=int(operator.rotation is not None and operator.rotation.interleaved),
        )
        packed = g.op("GatherND", attention, batch_positions)
        attention = g.op("Reshape", packed, constant(0, 0, operator.heads, -1))
        attention.setType(query.type().with_sizes([None, None, operator.heads, operator.size]))
        present_key.setType(past_key.type())
        present_value.setType(past_value.type())
        return attention, present_key, present_value


@dataclass
class _Run:
    """One forward pass of the model over slots: what its attention, masks and cache need."""

    packed: bool
    batch: Batch
    past: Sequence[tuple[torch.Tensor, torch.Tensor]] | None
    states: States
    layers: tuple[Layer, ...] = ()
    tables: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    present: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    masks: list[tuple[MaskFunction, torch.Tensor]] = field(default_factory=list)
    updates: int = 0

    def __post_init__(self) -> None:
        self.slots = Slots(self.batch)

    def mask(self, *, mask_function: MaskFunction = causal_mask_function, **options: Any) -> torch.Tensor:
        """Transformers' mask interface; sizes and offsets that it gives are those of a packed run, and not used."""
        mask = self.slots.mask(mask_function)
        self.masks.append((mask_function, mask))
        return mask

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """Transformers' attention interface: [1, heads, tokens, size] in, heads last but one out."""
        operator = self.layers[len(self.present)].operator
        if operator is not None:
            return self._fused(operator, query, key, value, options), None
        new_query, new_key, new_value = self.spread_heads(query, key, value)
        keys, values = self.append(new_key, new_value)
        if attention_mask is None:
            attention_mask = self.mask()
        options = self.spread_bias(options)
        attention = own_attention(module)(module, new_query, keys, values, attention_mask, **options)[0]
        return self.slots.packed(attention), None

    def spread_heads(self, *packed: torch.Tensor) -> list[torch.Tensor]:
        """[1, heads, tokens, size] each, to [slots, heads, width, size]."""
        return [self.slots.spread(tensor.transpose(1, 2)).transpose(1, 2) for tensor in packed]

    def spread_bias(self, options: dict[str, Any]) -> dict[str, Any]:
        """An attention's options, with a bias of each token for each key where its slot has it."""
        bias = options.get(_BIAS)
        return options if bias is None else options | {_BIAS: self.spread_heads(bias)[0]}

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the next layer's new keys and values, [slots, heads, width, size], and read what is attended to."""
        past = self.past[len(self.present)] if self.past is not None else tuple(map(_empty_cache, (key, value)))
        present = self.slots.append(past[0], key), self.slots.append(past[1], value)
        self.present.append(present)
        return self.slots.seen(present[0]), self.slots.seen(present[1])

    def _fused(
        self, operator: Operator, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        batch = self.batch
        assert self.past is not None
        weights = list(self.tables[id(operator.rotation)]) if operator.rotation else []
        if operator.sinks:
            weights.append(options["s_aux"].float())
        heads = (query, key, value, *self.past[len(self.present)], batch.tokens, batch.positions)
        lengths = (batch.query_seqlens, batch.seqlens_k, batch.total)
        output, *present = _GroupQueryAttention.apply(operator, *heads, *lengths, *weights)  # type: ignore[no-untyped-call]
        self.present.append((present[0], present[1]))
        return output  # type: ignore[no-any-return]


@dataclass
class _FirstRun(_Run):
    """A run with numbers from an empty cache, which finds the layers."""

    watched: rotary.Watched | None = None
    positions: int = 0
    rotary_calls: set[int] = field(default_factory=set)

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """See `_Run.attend`."""
        heads = self.spread_heads(query, key, value)
        new_query, (keys, values) = heads[0], self.append(*heads[1:])
        attention_mask = self.mask() if attention_mask is None else attention_mask
        options = self.spread_bias(options)
        own = own_attention(module)(module, new_query, keys, values, attention_mask, **options)[0]
        call = self.watched.call_of(query, key) if self.watched else None
        operator = self._operator((new_query, keys, values), attention_mask, own, options, call)
        if operator is not None and operator.rotation is not None:
            assert call is not None
            self.rotary_calls.add(call)
        self._add(key, value, operator)
        return self.slots.packed(own), None

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `_Run.append`."""
        if not self.packed:
            self._add(key, value, None)
        return super().append(key, value)

    def _add(self, key: torch.Tensor, value: torch.Tensor, operator: Operator | None) -> None:
        sizes = [(tensor.shape[1], tensor.shape[3]) for tensor in (key, value)]
        self.layers += (Layer(sizes[0], sizes[1], operator),)

    def _operator(
        self,
        heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
        own: torch.Tensor,
        options: dict[str, Any],
        call: int | None,
    ) -> Operator | None:
        """The operator, where it is shown to give what the layer's own function gives."""
        query, key, value = heads
        size = query.shape[-1]
        if (
            _BIAS in options
            or size % HEAD_MULTIPLE
            or size != key.shape[-1]
            or size != value.shape[-1]
            or query.shape[1] % key.shape[1]
        ):
            return None
        function = next((function for function, made in self.masks if made is mask), None)
        window = window_of(function, self.positions) if function is not None else None
        if window is None:
            return None
        scale, softcap = options.get("scaling"), float(options.get("softcap") or 0.0)
        scale = float(size**-0.5 if scale is None else scale)
        sinks = options.get("s_aux")
        scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(2, 3) * scale
        scores = (torch.tanh(scores / softcap) * softcap if softcap else scores) + mask
        if sinks is not None:
            column = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, column), -1)
        weights = scores.softmax(-1)[..., : key.shape[2]]
        computed = (weights @ value.repeat_interleave(query.shape[1] // key.shape[1], 1)).transpose(1, 2)
        if computed.shape != own.shape or not torch.allclose(
            computed, own, atol=1e-4 * float(own.abs().max()), rtol=1e-4
        ):
            return None
        rotation = self.watched.rotations[call] if self.watched is not None and call is not None else None
        if rotation is not None and size % rotary.MULTIPLE:
            rotation = None
        return Operator(query.shape[1], key.shape[1], size, scale, window, softcap, sinks is not None, rotation)


def own_attention(module: torch.nn.Module) -> Callable[..., tuple[torch.Tensor, Any]]:
    """The function that a layer attends with where no other is chosen ("eager")."""
    found = inspect.unwrap(type(module).forward).__globals__.get("eager_attention_forward")
    return found if found is not None else _plain_attention


def _plain_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, None]:
    weights = (query @ key.transpose(2, 3) * scaling + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2), None


def _attend_gpt_neo(
    run: _Run,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, None]:
    """Its mask is a table of whole texts, and only its class knows which layers look at a window."""
    local = module.attention_type == "local"
    function = sliding_window_causal_mask_function(module.config.window_size) if local else causal_mask_function
    output, _ = run.attend(module, query, key, value, run.mask(mask_function=function), scaling=1.0)
    return output.transpose(1, 2), None


def _rotate_roformer(run: _Run, module: Any, positions: torch.Tensor, *heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Its table of positions, looked up for each slot, stands in a batch of heads of one text."""
    return type(module).apply_rotary_position_embeddings(positions[0, 0][:, None], *heads)  # type: ignore[no-any-return]


def _attend_openai_gpt(
    run: _Run, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *options: Any
) -> list[torch.Tensor]:
    """It knows no cache; its keys come as [1, heads, size, tokens]."""
    scaling = value.shape[-1] ** -0.5 if module.scale else 1.0
    output, _ = run.attend(module, query, key.transpose(2, 3), value, run.mask(), scaling=scaling)
    return [output.transpose(1, 2)]


# Methods of attention classes outside transformers' interface, and what takes their place. Those that attend do so in
# a packed run only.
_OWN_WAYS: dict[tuple[str, str], tuple[str, Callable[..., Any]]] = {
    ("gpt_neo", "GPTNeoSelfAttention"): ("_attn", _attend_gpt_neo),
    ("openai", "Attention"): ("_attn", _attend_openai_gpt),
    ("roformer", "RoFormerSelfAttention"): ("apply_rotary_position_embeddings", _rotate_roformer),
}


def _empty_cache(new: torch.Tensor) -> torch.Tensor:
    return torch.zeros(new.shape[0], new.shape[1], KEYS, new.shape[3])


class _NoLayers(list[Any]):
    """What a cache's layers are, for a model that looks for one of its own kind.

    Raises:
        UnsupportedArchitecture: it does.
    """

    def __getitem__(self, index: Any) -> Any:
        raise UnsupportedArchitecture("its layers keep caches of a kind of their own")


class _SlotCache(StatesOfCache, Cache):
    """What transformers' models know as their cache: `_Run` keeps it."""

    def __init__(self, run: _Run, positions: torch.Tensor | None = None) -> None:
        super().__init__(layers=_NoLayers())
        self.run, self.states = run, run.states
        self._positions = positions  # of a packed run's tokens, where they are asked for

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):  # type: ignore[no-untyped-def]
        """In a packed run the attention appends; otherwise keys and values are read from the cache here."""
        self.run.updates += 1
        return (key_states, value_states) if self.run.packed else self.run.append(key_states, value_states)

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Keys [slots, width, size] that choose what is attended to: a layer, of halves as its keys and values.

        Raises:
            UnsupportedArchitecture: in a packed run, where no function of transformers' attends to a choice.
        """
        if self.run.packed:
            raise UnsupportedArchitecture("it keeps an index of the keys that each query attends to")
        halves = indexer_key_states[:, None].tensor_split(2, dim=-1)
        return torch.cat(self.run.append(*halves), dim=-1)[:, 0]

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """Tokens before this run's, as far as sizes go."""
        return 0 if self.run.packed else self.run.slots.keys - self.run.slots.places.shape[1]  # type: ignore[return-value]

    def get_query_offset(self, *args: Any, **kwargs: Any) -> Any:
        """Of each token, from its place in the run to its position; the mask does not use it."""
        return 0 if self._positions is None else self._positions - torch.arange(self._positions.shape[0])

    def get_mask_sizes(self, query_length: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Keys, and what they begin with."""
        packed = self.run.packed and self._positions is None
        return (query_length if packed else self.run.slots.keys), 0  # type: ignore[return-value]


class _CausalGraph(torch.nn.Module):
    """The model with flat tensors in and out, as ONNX wants it."""

    def __init__(self, model: PreTrainedModel, plan: Plan) -> None:
        super().__init__()
        self.model = model
        self.plan = plan
        rotations = {id(layer.operator.rotation): layer.operator.rotation for layer in plan.layers if layer.operator}
        self._tables: dict[int, str] = {}
        for key, rotation in rotations.items():
            if rotation is not None:
                name = f"cos_cache_{len(self._tables)}" if self._tables else "cos_cache"
                self._tables[key] = name
                self.register_buffer(name, rotation.cos)
                self.register_buffer(name.replace("cos", "sin"), rotation.sin)

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, *others: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        begin = 6 + 2 * len(self.plan.layers)
        past, kept = list(zip(others[6:begin:2], others[7:begin:2], strict=True)), others[begin:]
        batch, count = Batch(*others[:5]), len(states.INPUTS)
        places = states.Places._make((*kept[:count], batch.positions)) if self.plan.states else None
        found = States(places, dict(zip(self.plan.states, kept[count:], strict=False)))
        run = _Run(self.plan.packed, batch, past, found, self.plan.layers)
        rows = position_ids + self.plan.first_position
        if self.plan.original_context:
            rows = rows + kept[-1] * self.plan.original_context
        for key, name in self._tables.items():
            by_row = (run.slots.spread(rows),) if self.plan.original_context else ()
            run.tables[key] = (getattr(self, name), getattr(self, name.replace("cos", "sin")), *by_row)
        logits = logits_of(self.model, run, input_ids, rows, others[5])
        flat = [tensor for layer in run.present for tensor in layer]
        return (logits, *flat, *(found.present[name] for name in self.plan.states))


def logits_of(
    model: PreTrainedModel, run: _Run, input_ids: torch.Tensor, position_ids: torch.Tensor, logits_tokens: torch.Tensor
) -> torch.Tensor:
    """Run the model; float32 [1, kept, vocabulary].

    Raises:
        UnsupportedArchitecture: the model has no output embedding.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedArchitecture(f"{type(model).__name__} has no output embedding: {_SUPPORTED}")
    if not run.packed:
        input_ids, position_ids = run.slots.spread(input_ids), run.slots.spread(position_ids)

    def wanted(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        # Only the wanted tokens get logits: a prefill of 256 tokens needs one row of the head, not 256.
        packed = inputs[0] if run.packed else run.slots.packed(inputs[0])
        return (packed.index_select(1, logits_tokens),)

    def placed(module: torch.nn.Module, arguments: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return arguments, options | {"position_ids": position_ids}

    def flat(module: torch.nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        return output[0] if output.ndim > 3 else output  # some take positions of a text, and add the batch

    takes = inspect.signature(model.forward).parameters
    asked = position_ids[0] if run.packed and model.config.get_text_config().model_type in _ASK_FOR_POSITIONS else None
    options: dict[str, Any] = {"cache" if "cache" in takes else "past_key_values": _SlotCache(run, asked)}
    if (
        "lang_ids" in takes and model.config.default_language is not None
    ):  # for each token, as the number of tokens varies
        options["lang_ids"] = torch.full_like(input_ids, model.config.languages.index(model.config.default_language))
    positions = "position_ids" in takes or any(taken.kind is taken.VAR_KEYWORD for taken in takes.values())
    if positions:
        options["position_ids"] = position_ids
    with ExitStack() as stack:
        stack.callback(head.register_forward_pre_hook(wanted).remove)
        tables = [module for module in model.modules() if "position" in type(module).__name__.lower()]
        for module in tables if "position_ids" not in takes else ():
            if "position_ids" in inspect.signature(module.forward).parameters:
                stack.callback(module.register_forward_pre_hook(placed, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(flat).remove)
        stack.enter_context(_interfaces(run))
        stack.enter_context(mixers_replaced(model, run.states))
        for module in model.modules():
            if (own := (type(module).__module__.split(".")[-2], type(module).__name__)) in _OWN_WAYS:
                name, function = _OWN_WAYS[own]
                if name == "_attn" and not run.packed:
                    continue
                setattr(module, name, partial(function, run, module))
                stack.callback(module.__delattr__, name)
        use_cache = model.config.model_type != "minimax"  # which else insists on a cache of its own class
        logits: torch.Tensor = model(input_ids=input_ids, use_cache=use_cache, **options).logits
    return logits


@contextmanager
def _interfaces(run: _Run) -> Iterator[None]:
    """While this holds, the model's masks, and in a packed run its attention, are those of a run."""
    name = ATTENTION if run.packed else "eager"
    before = ALL_MASK_ATTENTION_FUNCTIONS["eager"]
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, run.mask)
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, run.attend)
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS.register("eager", before)


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


@contextmanager
def _longer_biases(model: PreTrainedModel, positions: int) -> Iterator[None]:
    """MPT makes its biases of positions, which are relative, for its longest text; here they are for a cache."""
    before = getattr(model.config, "max_seq_len", None)
    if model.config.model_type == "mpt" and before is not None:
        model.config.max_seq_len = max(before, -(-positions // KEYS) * KEYS)
    try:
        yield
    finally:
        if before is not None:
            model.config.max_seq_len = before


@contextmanager
def _traced_choice(model: PreTrainedModel) -> Iterator[None]:
    """While this holds, a choice of keys can be traced, and is one of the keys that there are when the graph runs.

    Of a count and a number of keys, Python's own `min` would choose once, for the traced number. A mask of the choice
    is written with a truth value, which torch's tracer takes as a number only.
    """
    scatter = torch.Tensor.scatter

    def of_numbers(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        numbers: list[Any] = [int(one) if isinstance(one, bool) else one for one in arguments]
        return scatter(tensor, *numbers, **options)

    modules = {type(module).__module__ for module in model.modules() if type(module).__name__.endswith("Indexer")}
    with ExitStack() as stack:
        for name in modules:
            stack.enter_context(mock.patch.object(sys.modules[name], "min", _minimum, create=True))
            stack.enter_context(mock.patch.object(torch.Tensor, "scatter", of_numbers))
        yield


def _minimum(*values: Any) -> Any:
    if len(values) == 2 and any(isinstance(value, torch.Tensor) for value in values):
        return torch.minimum(torch.as_tensor(values[0]), torch.as_tensor(values[1]))
    return min(*values)


def plan_of(model: PreTrainedModel, positions: int, original: int = 0) -> Plan:
    """Run the model over slots, packed if possible, and find what its layers need.

    Args:
        original: see `Plan.original_context`.

    Raises:
        UnsupportedArchitecture: in no way it gives its own logits.
    """
    name = type(model).__name__
    for kind in (model.config.model_type, model.config.get_text_config().model_type):
        if kind in _LACKING:
            raise UnsupportedArchitecture(f"a {name} is not supported: it {_LACKING[kind]}: {_SUPPORTED}")
    texts, arguments = _first_texts(model)
    with running(f"a {name}", "be run"), torch.inference_mode():
        expected = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float() for ids in texts]
    spread = float(torch.cat(expected).std())
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    firsts = [0] if padding is None else [0, padding + 1]
    said, before = "", _tensors_of_modules(model)
    for packed in (True,) if keeps_states(model) else (True, False):
        for first in firsts:
            try:
                plan, logits = _first_run(model, arguments, positions, packed, first, original)
            except Exception as error:  # a model's own code can raise anything
                said = f"it can't run over slots of a KV cache: {cause(error)}"
                break
            found = torch.split(logits[0].float(), [len(ids) for ids in texts])
            off = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) / spread
            if _tensors_of_modules(model) - before:
                said = "it keeps states outside its cache"
            elif off <= _LARGEST_DIFFERENCE:
                return plan
            else:
                said = f"over slots of a KV cache its logits are {off:.2g} standard deviations off"
    raise UnsupportedArchitecture(f"a {name} is not supported: {said}: {_SUPPORTED}")


def _first_run(
    model: PreTrainedModel, arguments: Sequence[torch.Tensor], positions: int, packed: bool, first: int, original: int
) -> tuple[Plan, torch.Tensor]:
    input_ids, places, *others = arguments
    with ExitStack() as stack:
        if packed:
            stack.enter_context(_attention_replaced(model))
        stack.enter_context(torch.inference_mode())
        rows = original + positions + first
        watched = stack.enter_context(rotary.watched(model, places[0] + first, rows, by_row=original > 0))
        batch = Batch(*others[:5])
        found = States(states.Places(*_FIRST_PLACES, batch.positions) if keeps_states(model) else None)
        run = _FirstRun(packed, batch, None, found, watched=watched, positions=positions)
        logits = logits_of(model, run, input_ids, places + first, others[5])
    found.check_all_taken()
    if not run.layers and not found.present:
        raise UnsupportedArchitecture("it keeps no keys and values")
    shapes = {name: tuple(state.shape[1:]) for name, state in found.present.items()}
    return Plan(packed, first, run.layers, frozenset(run.rotary_calls), shapes, original), logits


def _tensors_of_modules(model: PreTrainedModel) -> set[tuple[str, str]]:
    """Names of tensors that are neither weights nor buffers."""
    return {
        (name, key)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    }


def _first_texts(model: PreTrainedModel) -> tuple[list[list[int]], tuple[torch.Tensor, ...]]:
    """Two texts of 5 and 3 tokens, and the graph's inputs that run both from an empty cache; all get logits.

    Their tokens alternate: a model that counts positions by itself would be right where each text stands together.
    But states are computed of tokens that do, see `states`.
    """
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size // 4, config.vocab_size // 2, (8,), generator=generator)
    places = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1], [0, 2], [1, 2], [0, 3], [0, 4]])
    first, second = [0, 2, 4, 6, 7], [1, 3, 5]
    if keeps_states(model):
        places = torch.tensor([*((0, place) for place in range(5)), *((1, place) for place in range(3))])
        first, second = [0, 1, 2, 3, 4], [5, 6, 7]
    tokens = torch.tensor([first, [*second, second[-1], second[-1]]])
    return [ids[first].tolist(), ids[second].tolist()], (
        ids[None],
        places[None, :, 1],
        torch.stack((torch.zeros_like(tokens), tokens), -1),
        places[None],
        torch.tensor([5, 3], dtype=torch.int32),
        torch.tensor([4, 2], dtype=torch.int32),
        torch.tensor(KEYS, dtype=torch.int32),
        torch.tensor(first + second),
    )


def name_layers(graph: ir.Model, model: torch.nn.Module) -> None:
    """Note which linear layer each matmul of a traced graph is.

    They are told by their weights, which are the model's own numbers: torch names a node by the calls that led to it,
    and those can leave out a part of the layer's name.
    """
    layers = {
        module.weight.data_ptr(): (name, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    for node in graph.graph:
        weight = node.inputs[1].const_value if node.op_type == "MatMul" else None
        if isinstance(weight, TorchTensor) and (layer := layers.get(weight.raw.data_ptr())) is not None:
            set_parts(node, [layer])


def export_causal_graph(
    model: PreTrainedModel, positions: int, longest: int | None = None, *, adapted: bool = False
) -> ir.Model:
    """The graph of `model` (float32, in evaluation mode), whose numbers are the model's own; see `tracing`.

    Args:
        positions: the largest capacity of a cache that the graph will be used with.
        longest: tokens of a text at most; None: `positions`.
        adapted: whether adapters are to be put beside its layers, which needs packed tokens.

    Raises:
        UnsupportedArchitecture: the model can't be run over slots of a KV cache, or not be written as a graph.
    """
    original = rotary.original_context(model) or 0
    if (longest or positions) <= original:
        original = 0
    with ExitStack() as around:
        around.enter_context(every_expert(model))
        if original:
            around.enter_context(rotary.with_both_rotations(model, original, positions))
        else:
            around.enter_context(rotary.with_fixed_frequencies(model))
        around.enter_context(rotary.without_complex_numbers(model))
        around.enter_context(_longer_biases(model, positions))
        around.enter_context(_traced_choice(model))
        plan = plan_of(model, positions, original)
        if adapted and not plan.packed:
            raise UnsupportedArchitecture(
                f"a {type(model).__name__} does not run packed, so its requests can't have adapters of their own: "
                "merge each by a table of its own, source = { ..., adapter = ... }"
            )
        arguments = [*_first_texts(model)[1]]
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
        for number, layer in enumerate(plan.layers):
            for kind, (heads, size) in (("key", layer.key), ("value", layer.value)):
                inputs.append(f"past_key_values.{number}.{kind}")
                outputs.append(f"present.{number}.{kind}")
                axes[inputs[-1]] = axes[outputs[-1]] = {0: "rows", 2: "capacity"}
                arguments.append(torch.zeros(2, heads, KEYS, size))
        if plan.states:
            inputs += states.INPUTS
            axes |= states.AXES
            arguments += _FIRST_PLACES
        for name, shape in plan.states.items():
            inputs.append(PAST + name)
            outputs.append(PRESENT + name)
            axes[inputs[-1]] = axes[outputs[-1]] = {0: "rows"}
            arguments.append(torch.zeros(2, *shape))
        if plan.original_context:
            inputs.append("rotations")
            axes["rotations"] = axes["position_ids"]
            arguments.append(torch.zeros_like(arguments[1]))
        with ExitStack() as stack:
            if plan.packed:
                stack.enter_context(_attention_replaced(model))
            stack.enter_context(rotary.left_to_operator(model, set(plan.rotary_calls)))
            graph = _CausalGraph(model, plan)
            made = trace(graph, arguments, inputs=inputs, outputs=outputs, axes=axes, of=f"a {type(model).__name__}")
        if adapted:
            name_layers(made, model)
        if plan.original_context:
            made.metadata_props[ORIGINAL_CONTEXT] = str(plan.original_context)
        return made
