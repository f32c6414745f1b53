"""States that a slot keeps beside its keys and values: short convolutions, gated delta nets, Mamba.

transformers' mixers of this kind have one form. They ask the cache for the layer's states, and call functions of
their own module for what runs along the text: a causal convolution, and a recurrence. While a model is traced, these
functions are replaced by ONNX Runtime's operators, which start from a slot's state and leave its next one; all else of
a mixer is traced as it is, on packed tokens.

    VarlenCausalConvWithState   a depthwise convolution, whose state is the last inputs
    LinearAttention             S = decay x S + key x update, read by the query; the update is the value (Mamba), or
                                beta x (value - what the state holds for the key) (delta nets)

Mamba-2 is this recurrence with B as the key, C as the query and dt x hidden as the value, a decay for each head;
Mamba has a head for each channel, with a decay for each number of its state. Lightning attention has a constant decay.

The convolution takes packed tokens and the states of those slots that have some. The recurrence takes a window of
slots, to which tokens are spread; a position without a token has no key and no decay, which leaves a state as it is to
the last bit. Both compute token after token, so a chunk of any size and any company give the same bits.

The graph has, beside the inputs that `causal` describes:

    state_tokens    int64    [slots, positions]      the token at each position of a slot, any where there is none
    state_mask      float32  [slots, positions, 1]   1 where there is one, else 0
    state_slots     int64    [slots with tokens]     which they are, in order
    state_starts    int32    [slots with tokens + 1] where the tokens of each begin, and where the last ones end
    past_states.<layer>.<kind>    float32  [slots, channels, kernel - 1] or [slots, heads, key size, value size]
    -> present_states.<layer>.<kind>       the same; may be the same memory

`kind` is `convolution_0` or `recurrent_0`; a second one of a layer would be `_1`.

Operator references: onnxruntime docs/ContribOperators.md. Gated delta nets: Yang et al., 2024; Mamba-2: Dao and Gu,
2024.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.activations import ACT2FN

from trident_export.errors import UnsupportedArchitecture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAST = "past_states."
PRESENT = "present_states."
_REPLACED = {
    "causal_conv1d_fn": "convolve",
    "torch_chunk_gated_delta_rule": "delta",
    "chunk_kimi_delta_attention": "delta",
    "mamba2_chunk_scan": "mamba2",
    "mamba_selective_scan": "mamba",
}
_FUSED = {None: "none", "silu": "silu", "swish": "silu"}
_EPSILON = 1e-6  # of transformers' normalization of queries and keys; the operator's own is another


class Places(NamedTuple):
    """The graph's inputs that say where tokens stand; see the module's docstring, and `causal` for the last one."""

    state_tokens: torch.Tensor
    state_mask: torch.Tensor
    state_slots: torch.Tensor
    state_starts: torch.Tensor
    attention_places: torch.Tensor


INPUTS = Places._fields[:-1]
# Slots with three tokens and with two.
EXAMPLE = (
    torch.tensor([[0, 1, 2], [3, 4, 4]]),
    torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])[..., None],
    torch.tensor([0, 1]),
    torch.tensor([0, 3, 5], dtype=torch.int32),
    torch.tensor([[[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]]),
)
AXES = {
    "state_tokens": {0: "rows", 1: "steps"},
    "state_mask": {0: "rows", 1: "steps"},
    "state_slots": {0: "used_rows"},
    "state_starts": {0: "row_ends"},
}


class States:
    """The states of one run of a model that is traced.

    Args:
        places: of the tokens; None of a model without states.
        past: the graph's states by name, `<layer>.<kind>`; None where they are to be found: then all are zeros.
    """

    def __init__(self, places: Places | None, past: dict[str, torch.Tensor] | None = None) -> None:
        self.present: dict[str, torch.Tensor] = {}
        self._places = places
        self._past = past
        self._layer = 0
        self._handed: torch.Tensor | None = None  # what a layer wants to keep of its convolution's input

    def of_layer(self, layer: int) -> None:
        """The layer that asks from now on."""
        self._layer = layer

    def handed(self, inputs: torch.Tensor) -> torch.Tensor:
        """A layer gives the inputs of its convolution to the cache, which would put older ones before them."""
        self.check_all_taken()
        self._handed = inputs
        return inputs

    def check_returned(self, state: torch.Tensor) -> None:
        """A layer gives a state to the cache; it must be one that an operator computed, or the layer's in a stack.

        Raises:
            UnsupportedArchitecture: it is another.
        """
        own = [known for name, known in self.present.items() if name.startswith(f"{self._layer}.recurrent_")]
        stacked = len(own) > 1 and torch.equal(state, torch.stack(own, dim=1))  # Zamba's, one for each head
        if not stacked and not any(state is known for known in self.present.values()):
            raise UnsupportedArchitecture(f"layer {self._layer} keeps a state of a kind that is not known here")

    def check_all_taken(self) -> None:
        """No layer may have kept inputs that no convolution has used.

        Raises:
            UnsupportedArchitecture: one has.
        """
        if self._handed is not None:
            raise UnsupportedArchitecture(f"layer {self._layer} keeps inputs of a kind that is not known here")

    def convolve(
        self,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """In place of `causal_conv1d_fn`: [1, channels, tokens] in and out, weight [channels, kernel]."""
        if self._handed is hidden_states:
            self._handed = None
        name, places, past = self._take("convolution", (weight.shape[0], weight.shape[1] - 1))
        fused = _FUSED.get(activation)
        output, self.present[name] = _Convolution.apply(  # type: ignore[no-untyped-call]
            *(fused or "none", int(weight.shape[0])),
            *(hidden_states, weight[:, None], *places[2:4], past),
            *(() if bias is None else (bias,)),
        )
        convolved: torch.Tensor = output if fused else ACT2FN[activation](output)
        return convolved

    def delta(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        use_qk_l2norm_in_kernel: bool = False,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """In place of gated delta rules: [1, tokens, heads, size]; decay [1, tokens, heads] or one for each number."""
        if use_qk_l2norm_in_kernel:
            query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + _EPSILON) for x in (query, key))
        return self._recur("gated_delta", int(query.shape[-1]) ** -0.5, query, key, value, g, beta)

    def mamba2(
        self,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """In place of `mamba2_chunk_scan`: hidden states [1, tokens, heads, size], dt [1, tokens, heads]."""
        dt = _step(dt, dt_bias, dt_softplus)
        low, high = dt_limit
        if high < float("inf") or low > 0 or not dt_softplus:  # a softplus is positive
            dt = torch.clamp(dt, low, high)
        output, state = self._recur("gated", 1.0, C, B, hidden_states * dt[..., None], A * dt)
        return _skip(output, hidden_states, D if D is None else D[:, None], z), state

    def mamba(
        self,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        delta_bias: torch.Tensor | None = None,
        delta_softplus: bool = False,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """In place of `mamba_selective_scan`: hidden states and dt [1, channels, tokens], B and C [1, size, tokens]."""
        hidden_states, dt, B, C = (tensor.transpose(1, 2) for tensor in (hidden_states, dt, B, C))
        dt = _step(dt, delta_bias, delta_softplus)[..., None]
        hidden_states = hidden_states[..., None]
        output, state = self._recur("gated", 1.0, C[:, :, None], B[:, :, None], hidden_states * dt, A * dt)
        gate = z if z is None else z.transpose(1, 2)[..., None]
        return _skip(output, hidden_states, D if D is None else D[:, None], gate)[..., 0].transpose(1, 2), state

    def decayed(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        """Linear attention whose states decay by a constant: [1, tokens, heads, size], log decay [heads]."""
        of_tokens = value[..., 0] * 0.0 + decay  # zeros_like would be a constant of the traced number of tokens
        return self._recur("gated", 1.0, query, key, value, of_tokens)[0]

    def _recur(
        self,
        rule: str,
        scale: float,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        heads, size = int(value.shape[2]), int(key.shape[3])
        if key.shape[2] != heads:
            key = key[:, :, :, None].expand(-1, -1, -1, heads // int(key.shape[2]), -1).flatten(2, 3)
        name, places, past = self._take("recurrent", (heads, size, int(value.shape[3])))
        tokens = [query, key, value, decay, *(() if beta is None else (beta,))]
        sizes = [
            [int(query.shape[2]), heads, int(value.shape[3])],
            *([math.prod(map(int, x.shape[2:]))] for x in tokens),
        ]
        output, present = _Recurrence.apply(rule, scale, sizes, *places[:2], places[4], past, *tokens)  # type: ignore[no-untyped-call]
        self.present[name] = present
        return output, present

    def _take(self, kind: str, shape: tuple[int, ...]) -> tuple[str, Places, torch.Tensor]:
        """The next state of a kind of the layer."""
        assert self._places is not None
        count = sum(name.startswith(f"{self._layer}.{kind}_") for name in self.present)
        name = f"{self._layer}.{kind}_{count}"
        past = torch.zeros(len(self._places.state_tokens), *shape) if self._past is None else self._past[name]
        return name, self._places, past


class StatesOfCache:
    """What mixers call of transformers' cache, for a cache that is one."""

    states: States

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Nothing is there: so a mixer takes the way for many tokens."""
        self.states.of_layer(layer_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """See `get_conv_state`."""
        self.states.of_layer(layer_idx)

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **options: Any
    ) -> torch.Tensor:
        """See `States.handed`."""
        self.states.of_layer(layer_idx)
        return self.states.handed(conv_states)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **options: Any
    ) -> torch.Tensor:
        """See `States.check_returned`."""
        self.states.check_returned(recurrent_states)
        return recurrent_states


def _found(model: PreTrainedModel) -> list[tuple[ModuleType, str]]:
    """The functions of a model that are replaced."""
    modules = [sys.modules[name] for name in sorted({type(module).__module__ for module in model.modules()})]
    return [(module, name) for module in modules for name in _REPLACED if hasattr(module, name)]


def keeps_states(model: PreTrainedModel) -> bool:
    """Whether a model's layers may keep other states than keys and values."""
    return bool(_found(model)) or any(_is_lightning(module) for module in model.modules())


def _is_lightning(module: torch.nn.Module) -> bool:
    return type(module).__name__ == "MiniMaxLightningAttention"


def _run_lightning(
    states: States, module: Any, hidden_states: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, None]:
    """In place of MiniMax's linear attention, which runs over blocks and knows a cache of its own."""
    states.of_layer(module.layer_idx)
    heads = module.act_fn(module.qkv_proj(hidden_states)).unflatten(-1, (module.num_attention_heads, -1))
    query, key, value = heads.chunk(3, dim=-1)
    found = states.decayed(query, key, value, -module.slope_rate.flatten())
    return module.out_proj(module.output_gate(hidden_states).sigmoid() * module.norm(found.flatten(2))), None


@contextmanager
def mixers_replaced(model: PreTrainedModel, states: States) -> Iterator[None]:
    """While this holds, the model's functions that run along the text are those of `states`."""
    found = _found(model)
    before = [(module, name, getattr(module, name)) for module, name in found]
    if found:
        before.append((torch.nn.functional, "softplus", torch.nn.functional.softplus))
        torch.nn.functional.softplus = _softplus  # type: ignore[assignment]
    for module, name in found:
        setattr(module, name, getattr(states, _REPLACED[name]))
    lightning = [module for module in model.modules() if _is_lightning(module)]
    for layer in lightning:
        layer.forward = partial(_run_lightning, states, layer)
    try:
        yield
    finally:
        for layer in lightning:
            del layer.forward
        for module, name, function in before:
            setattr(module, name, function)


def _softplus(x: torch.Tensor, *options: Any) -> torch.Tensor:
    """ONNX Runtime's own gives other bits at the end of a tensor than within, so with other company.

    log(1 + t) = 2 atanh(t / (2 + t)), with t = exp(-|x|).
    """
    small = torch.exp(-x.abs())
    near: torch.Tensor = _Atanh.apply(small / (2.0 + small))  # type: ignore[no-untyped-call]
    return torch.relu(x) + 2.0 * near


def _step(dt: torch.Tensor, bias: torch.Tensor | None, softplus: bool) -> torch.Tensor:
    dt = dt if bias is None else dt + bias
    return _softplus(dt) if softplus else dt


def _skip(
    output: torch.Tensor, hidden_states: torch.Tensor, weight: torch.Tensor | None, gate: torch.Tensor | None
) -> torch.Tensor:
    """Mamba's way around the recurrence, and its gate."""
    output = output if weight is None else output + hidden_states * weight
    return output if gate is None else output * torch.nn.functional.silu(gate)


def _constant(g: Any, *values: int) -> Any:
    return g.op("Constant", value_t=torch.tensor(values))


class _Atanh(torch.autograd.Function):
    """torch's exporter does not know it."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return torch.atanh(x)

    @staticmethod
    def symbolic(g, x):  # type: ignore[no-untyped-def]
        return g.op("Atanh", x).setType(x.type())


class _Convolution(torch.autograd.Function):
    """Computed by torch, written to the graph as one operator."""

    @staticmethod
    def forward(ctx, activation, channels, hidden_states, weight, slots, starts, past, *bias):  # type: ignore[no-untyped-def]
        output, present, taps = hidden_states.clone(), past.clone(), weight.shape[2] - 1
        offset = bias[0] if bias else None
        for slot, (start, end) in zip(slots.tolist(), pairwise(starts.tolist()), strict=True):
            inputs = torch.cat((past[slot], hidden_states[0, :, start:end]), dim=1)
            output[0, :, start:end] = torch.nn.functional.conv1d(inputs[None], weight, offset, groups=channels)[0]
            present[slot] = inputs[:, inputs.shape[1] - taps :]
        return torch.nn.functional.silu(output) if activation == "silu" else output, present

    @staticmethod
    def symbolic(g, activation, channels, hidden_states, weight, slots, starts, past, *bias):  # type: ignore[no-untyped-def]
        tokens = g.op("Reshape", g.op("Transpose", hidden_states, perm_i=[0, 2, 1]), _constant(g, -1, channels))
        output, state = g.op(
            "com.microsoft::VarlenCausalConvWithState",
            *(tokens, weight, starts, *(bias or (_absent(g),)), g.op("Gather", past, slots)),
            activation_s=activation,
            outputs=2,
        )
        present = g.op("ScatterND", past, g.op("Unsqueeze", slots, _constant(g, 1)), state)
        output = g.op("Transpose", g.op("Reshape", output, _constant(g, 1, -1, channels)), perm_i=[0, 2, 1])
        output.setType(hidden_states.type().with_sizes([1, channels, None]))
        present.setType(past.type())
        return output, present


class _Recurrence(torch.autograd.Function):
    """Computed by torch, written to the graph as one operator.

    `sizes` are the heads of the query, those of the value, and its size; then the numbers of a token in each of the
    tensors [1, tokens, heads, ...]: query, key, value, decay, and beta or none.
    """

    @staticmethod
    def forward(ctx, rule, scale, sizes, tokens, mask, places, past, query, key, value, decay, *others):  # type: ignore[no-untyped-def]
        output, present = value.clone(), past.clone()
        (query_heads, heads, _), *_ = sizes
        query = query.repeat_interleave(heads // query_heads, dim=2)
        decay = decay.exp().reshape(*decay.shape[:2], heads, -1, 1)
        for slot, step in mask[..., 0].nonzero().tolist():
            token = int(tokens[slot, step])
            state = present[slot] * decay[0, token]
            update = value[0, token]
            for beta in others:
                update = (update - torch.einsum("hkv,hk->hv", state, key[0, token])) * beta[0, token][:, None]
            present[slot] = state + key[0, token][:, :, None] * update[:, None, :]
            output[0, token] = scale * torch.einsum("hkv,hk->hv", present[slot], query[0, token])
        return output, present

    @staticmethod
    def symbolic(g, rule, scale, sizes, tokens, mask, places, past, *tensors):  # type: ignore[no-untyped-def]
        (query_heads, heads, size), *widths = sizes
        query, key, value, decay, *beta = (
            g.op("Gather", g.op("Reshape", tensor, _constant(g, -1, *width)), tokens)
            for tensor, width in zip(tensors, widths, strict=True)
        )
        key, decay = (g.op("Mul", tensor, mask) for tensor in (key, decay))
        output, present = g.op(
            "com.microsoft::LinearAttention",
            *(query, key, value, past, decay, *beta),
            update_rule_s=rule,
            scale_f=scale,
            q_num_heads_i=query_heads,
            kv_num_heads_i=heads,
            outputs=2,
        )
        output = g.op("Reshape", g.op("GatherND", output, places), _constant(g, 1, -1, heads, size))
        output.setType(tensors[2].type().with_sizes([1, None, heads, size]))
        present.setType(past.type())
        return output, present


def _absent(g: Any) -> Any:
    value = g.op("prim::Constant")
    value.setType(torch.OptionalType.ofTensor())
    return value
