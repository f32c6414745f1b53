"""Mixtures of experts as a graph that has every expert, whatever the traced tokens chose.

transformers' own functions run the experts that some token chose, one after the other, or gather a copy of the chosen
weights for every token. Here each expert is in the graph with matmuls of its own, so that passes quantize them as any
other; it runs on the tokens that chose it, which may be none, and a token's numbers do not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from trident_export.errors import UnsupportedArchitecture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPERTS = "trident_every_expert"
_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")

Expert = Callable[[int, torch.Tensor], torch.Tensor]
"""The number of an expert and rows for it, to what it makes of them."""


@contextmanager
def every_expert(model: PreTrainedModel) -> Iterator[None]:
    """While this holds, the model's experts run as `run_experts` does.

    Raises:
        UnsupportedArchitecture: it has experts that run in a way of their own.
    """
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _interface)
    modules: list[Any] = list(model.modules())
    with ExitStack() as stack:
        for module in modules:
            name = type(module).__name__
            if hasattr(module, "_is_expert_parallel"):
                stack.callback(_restore, module.config, module.config._experts_implementation)
                module.config._experts_implementation = EXPERTS
                for weights in _WEIGHTS:
                    if hasattr(module, weights):
                        _split(stack, module, weights, getattr(module, weights))
            elif name in _OWN_WAYS:
                prepare, forward = _OWN_WAYS[name]
                prepare(stack, module)
                module.forward = partial(forward, module)
                stack.callback(module.__delattr__, "forward")
            elif name.endswith("Experts") and "Shared" not in name:  # those run for every token
                raise UnsupportedArchitecture(
                    f"a {type(model).__name__} runs its experts ({name}) in a way that makes no graph of all of them: "
                    "choose another model"
                )
        yield


def _restore(config: Any, before: str | None) -> None:
    config._experts_implementation = before


def _split(stack: ExitStack, module: Any, name: str, weights: torch.Tensor) -> None:
    """A view for each expert, `each_<name>`: a slice of the whole would be computed at every run."""
    views = (torch.nn.Parameter(weight, requires_grad=False) for weight in weights.detach())
    module.register_module(f"each_{name}", torch.nn.ParameterList(views))
    stack.callback(module.__delattr__, f"each_{name}")


def run_experts(
    expert: Expert, count: int, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of what each token's experts make of it, [tokens, hidden].

    Args:
        hidden_states: [tokens, hidden].
        top_k_index: the experts of each token, [tokens, k]; numbers from `count` on give zeros.
        top_k_weights: their weights.
    """
    choices = top_k_index.flatten()
    places, results = [], []
    for number in range(count):
        chosen = (choices == number).nonzero()[:, 0]
        places.append(chosen)
        results.append(expert(number, hidden_states[chosen // top_k_index.shape[1]]))
    empty = hidden_states.new_zeros(choices.shape[0], hidden_states.shape[1])
    found = empty.index_put((torch.cat(places),), torch.cat(results).to(empty.dtype))
    weighted = found.view(*top_k_index.shape, -1) * top_k_weights[..., None]
    return weighted.sum(1).to(hidden_states.dtype)


def _interface(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Transformers' experts interface."""
    first = "gate_up_proj" if module.has_gate else "up_proj"

    def expert(number: int, rows: torch.Tensor) -> torch.Tensor:
        found = _linear(module, first, number, rows)
        found = module._apply_gate(found) if module.has_gate else module.act_fn(found)
        found = _linear(module, "down_proj", number, found)
        return module.post_expert_norm(found) if module.has_post_expert_norm else found

    return run_experts(expert, module.num_experts, hidden_states, top_k_index, top_k_weights)


def _linear(module: Any, name: str, number: int, rows: torch.Tensor) -> torch.Tensor:
    weight: torch.Tensor = getattr(module, f"each_{name}")[number]
    found = rows @ (weight if module.is_transposed else weight.t())
    if module.has_bias:
        found = found + getattr(module, f"{name}_bias")[number]
    return found


def _split_dbrx(stack: ExitStack, module: Any) -> None:
    for name in ("v1", "w1", "w2"):
        weights = getattr(module.mlp, name).detach()
        _split(stack, module, name, weights.view(-1, module.ffn_hidden_size, module.hidden_size))


def _run_dbrx(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    def expert(number: int, rows: torch.Tensor) -> torch.Tensor:
        weights = (getattr(module, f"each_{name}")[number] for name in ("w1", "v1", "w2"))
        return module.mlp(rows, *weights)  # type: ignore[no-any-return]

    rows = hidden_states.flatten(0, -2)
    return run_experts(expert, module.num_experts, rows, top_k_index, top_k_weights).view_as(hidden_states)


def _split_gated(stack: ExitStack, module: Any) -> None:
    for name in ("gate_up_proj", "down_proj"):
        _split(stack, module, name, getattr(module, name))


def _run_longcat(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Some of the experts hand on what they get."""

    def expert(number: int, rows: torch.Tensor) -> torch.Tensor:
        gate, up = functional.linear(rows, module.each_gate_up_proj[number]).chunk(2, dim=-1)
        return functional.linear(module.act_fn(gate) * up, module.each_down_proj[number])

    count = module.num_routed_experts
    kept: torch.Tensor = (top_k_weights * (top_k_index >= count)).sum(-1, keepdim=True)
    return run_experts(expert, count, hidden_states, top_k_index, top_k_weights) + hidden_states * kept


def _run_llama4(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """It gets every token for every expert, [experts x tokens, hidden], zeros where the token did not choose it."""
    results = []
    for number, rows in enumerate(hidden_states.view(module.num_experts, -1, module.hidden_size).unbind(0)):
        chosen = (rows != 0).any(-1).nonzero()[:, 0]
        gate, up = (rows[chosen] @ module.each_gate_up_proj[number]).chunk(2, dim=-1)
        found = (up * module.act_fn(gate)) @ module.each_down_proj[number]
        results.append(torch.zeros_like(rows).index_put((chosen,), found))
    return torch.cat(results)


def _run_switch(
    module: Any, hidden_states: torch.Tensor, selected_experts: torch.Tensor, routing_weights: torch.Tensor
) -> torch.Tensor:
    """Each token has one expert, [tokens, 1, experts], or none where too many tokens before it chose the same."""
    count = module.num_experts
    chosen = selected_experts.argmax(-1) + (1 - selected_experts.sum(-1)) * count

    def expert(number: int, rows: torch.Tensor) -> torch.Tensor:
        return module[f"expert_{number}"](rows)  # type: ignore[no-any-return]

    return run_experts(expert, count, hidden_states, chosen, routing_weights)


def _refuse_nllb(stack: ExitStack, module: Any) -> None:
    raise UnsupportedArchitecture(
        f"transformers {transformers.__version__} runs the first two experts of an NLLB mixture for every token, "
        "whatever was chosen, so nothing tells whether a graph is right: choose an NLLB model without experts"
    )


def _choose_jetmoe(module: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """It sorts tokens by expert and counts them, which would be constants; here they stay in order."""
    logits = module.layer(hidden_states).float()
    weights, experts = logits.topk(module.top_k, dim=1)
    order = torch.arange(experts.shape[0] * module.top_k)
    return order, order // module.top_k, weights.softmax(1).flatten(), experts.flatten(), logits


def _run_jetmoe(module: Any, inputs: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    found = inputs.new_zeros(inputs.shape[0], module.output_size)
    for number in range(module.num_experts):
        chosen = (experts == number).nonzero()[:, 0]
        found = found.index_put((chosen,), functional.linear(inputs[chosen], module.each_weight[number]))
    return found


# Experts outside transformers' interface: what is prepared, and what runs them.
_OWN_WAYS: dict[str, tuple[Callable[[ExitStack, Any], None], Callable[..., Any]]] = {
    "DbrxExperts": (_split_dbrx, _run_dbrx),
    "LongcatFlashExperts": (_split_gated, _run_longcat),
    "Llama4TextExperts": (_split_gated, _run_llama4),
    "JetMoeParallelExperts": (lambda stack, module: _split(stack, module, "weight", module.weight), _run_jetmoe),
    "SwitchTransformersExperts": (lambda stack, module: None, _run_switch),
    "NllbMoeExperts": (_refuse_nllb, _run_switch),
    "JetMoeTopKGating": (lambda stack, module: None, _choose_jetmoe),
}
