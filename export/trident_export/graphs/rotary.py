"""Rotary embeddings that the attention operator computes, where the model's are the usual ones.

transformers' models rotate queries and keys with a function of their own module, `apply_rotary_pos_emb`, by cosines
and sines that a rotary module computes from positions. Where numbers show that this function rotates the two
halves of the first numbers of each head (Su et al., RoFormer, 2021, in GPT-NeoX's layout), the operator does the same
with `do_rotary`: then the function hands queries and keys on unchanged while the model is traced. Frequencies that
depend on the length of the text can't be a table, and are traced; so are heads of a size that the operator refuses.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FUNCTION = "apply_rotary_pos_emb"
HEAD_MULTIPLE = 16  # of a head's size, which the operator wants if it rotates
_VARIABLE = ("dynamic", "longrope")

Tables = tuple[torch.Tensor, torch.Tensor]


@contextmanager
def fuse_rotary(model: PreTrainedModel, head_dim: int, positions: int) -> Iterator[Tables | None]:
    """While this holds, the model does not rotate; None and no change where the operator can't do it.

    Yields:
        Cosines and sines, float32 [positions, rotated numbers of a head / 2] each.
    """
    module = sys.modules[type(model).__module__]
    function = getattr(module, FUNCTION, None)
    possible = function is not None and head_dim % HEAD_MULTIPLE == 0
    tables = _tables(model, positions) if possible else None
    if function is None or tables is None or not _is_usual(function, head_dim, tables):
        yield None
        return
    setattr(module, FUNCTION, lambda query, key, *arguments, **options: (query, key))
    try:
        yield tables[0][:, : tables[0].shape[1] // 2].contiguous(), tables[1][:, : tables[1].shape[1] // 2].contiguous()
    finally:
        setattr(module, FUNCTION, function)


def _tables(model: PreTrainedModel, positions: int) -> Tables | None:
    """Cosines and sines as the model's only rotary module gives them; [positions, rotated numbers]."""
    modules = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    kinds = {getattr(module, "rope_type", "default") for module in modules}
    if len(modules) != 1 or kinds & set(_VARIABLE):
        return None
    with torch.inference_mode():
        cos, sin = modules[0](torch.zeros(1, 1, 1), torch.arange(positions)[None])
    return cos[0].float(), sin[0].float()


def _is_usual(function: Any, head_dim: int, tables: Tables) -> bool:
    """Whether the model's function gives what the operator computes, on random numbers."""
    length = min(8, tables[0].shape[0])
    cos, sin = (table[:length] for table in tables)
    size = cos.shape[1]
    # Some models hand the function only the rotated part of a head, others the whole head.
    for width in {size, head_dim}:
        generator = torch.Generator().manual_seed(0)
        query, key = (torch.randn(1, heads, length, width, generator=generator) for heads in (2, 1))
        try:
            with torch.inference_mode():
                found = function(query, key, cos[None], sin[None])
        except (RuntimeError, TypeError, ValueError):
            continue
        expected = (_rotated(tensor, cos, sin) for tensor in (query, key))
        if all(a.shape == b.shape and torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True)):
            return True
    return False


def _rotated(tensor: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """What the operator does: the first numbers of a head are rotated as two halves, the others kept."""
    half = cos.shape[1] // 2
    cos, sin = cos[:, :half], sin[:, :half]
    first, second, rest = tensor[..., :half], tensor[..., half : 2 * half], tensor[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
