"""LED's encoder as a graph for texts of any length.

transformers pads a text to a multiple of the window and cuts it into chunks, whose number the traced text would fix.
Here a query's block of positions sees the block itself and those before and behind it; what is further than half a
window away, or outside the text, is masked. A text has no tokens that all see: `generate` is asked for none.
Longformer's sliding windows: Beltagy et al., 2020.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION, _ENCODER = "LEDEncoderSelfAttention", "LEDEncoder"


@contextmanager
def windows_of_any_length(model: PreTrainedModel) -> Iterator[None]:
    """While this holds, the encoder of an LED takes texts as they are; other models are left alone."""
    with ExitStack() as stack:
        for module in model.modules():
            if type(module).__name__ == _ATTENTION:
                module.forward = partial(_attend, module)
                stack.callback(vars(module).pop, "forward")
            elif type(module).__name__ == _ENCODER:
                vars(module)["_pad_to_window_size"] = _not_padded
                stack.callback(vars(module).pop, "_pad_to_window_size")
        yield


def _not_padded(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, inputs_embeds: torch.Tensor, pad_token_id: int
) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
    return 0, input_ids, attention_mask, inputs_embeds


def _attend(module: Any, hidden_states: torch.Tensor, *masks: Any, **options: Any) -> tuple[torch.Tensor]:
    """Hidden states [texts, tokens, width] in and out."""
    length = torch.as_tensor(hidden_states.shape[1])
    reach = module.one_sided_attn_window_size
    block = torch.minimum(length, torch.tensor(reach))
    blocks = (length + block - 1) // block
    starts = torch.arange(blocks)[:, None] * block  # type: ignore[call-overload]
    queries = starts + torch.arange(block)[None]  # type: ignore[call-overload]
    keys = starts - block + torch.arange(3 * block)[None]  # type: ignore[call-overload]
    last = length - 1
    sees = (queries[:, :, None] - keys[:, None]).abs() <= reach
    sees = sees & (keys >= 0)[:, None] & (keys <= last)[:, None]
    scale = module.head_dim**-0.5

    def heads(part: torch.nn.Linear, places: torch.Tensor) -> torch.Tensor:
        """[texts, blocks, heads, positions of a block, numbers of a head]."""
        found = part(hidden_states)[:, torch.minimum(places, last).clamp(min=0)]
        return found.unflatten(-1, (module.num_heads, module.head_dim)).transpose(2, 3)  # type: ignore[no-any-return]

    scores = heads(module.query, queries) * scale @ heads(module.key, keys).transpose(3, 4)
    weights = torch.where(sees[None, :, None], scores, torch.finfo(scores.dtype).min).softmax(-1)
    found = (weights @ heads(module.value, keys)).transpose(2, 3).flatten(3).flatten(1, 2)
    return (found[:, : hidden_states.shape[1]],)
