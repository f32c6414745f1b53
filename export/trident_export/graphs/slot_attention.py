"""Attention over slots of the KV cache by plain operators, for what GroupQueryAttention can't express.

The new keys and values are scattered into the cache at their places, and attention runs over the cache's first
positions, up to the longest slot's end rounded up to `KEYS`. Which of them a query sees is the model's own mask
function, evaluated at each token's own position. A slot's numbers do not depend on its company: a sum over more keys
than another has zeros behind it, and `KEYS` is a multiple of every step in which ONNX Runtime adds. For the same reason
the runtime's capacity is a multiple of it.
Operator reference: ONNX, ScatterND and GatherND.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from trident_serving.runtime.kv_cache import KEYS

MaskFunction = Callable[..., torch.Tensor]
"""transformers' form: batch, head, query and key indices, tensors that broadcast, to what a query sees."""


class Batch(NamedTuple):
    """The graph's inputs that say where tokens stand; see the docstring of `causal`."""

    tokens: torch.Tensor
    positions: torch.Tensor
    query_seqlens: torch.Tensor
    seqlens_k: torch.Tensor
    total: torch.Tensor


class _Append(torch.autograd.Function):
    """The cache with new keys or values at their places, where `real`; what stands there elsewhere."""

    @staticmethod
    def forward(ctx, past, places, real, new):  # type: ignore[no-untyped-def]
        index = places.unbind(-1)
        return past.index_put(index, torch.where(real, new, past[index]))

    @staticmethod
    def symbolic(g, past, places, real, new):  # type: ignore[no-untyped-def]
        before = g.op("GatherND", past, places)
        present = g.op("ScatterND", past, places, g.op("Where", real, new, before))
        present.setType(past.type())
        return present


class Slots:
    """Where the tokens of a run stand in their slots. `width` is the positions that each slot takes part with."""

    def __init__(self, batch: Batch) -> None:
        width = torch.arange(batch.tokens.shape[1])[None]
        starts = batch.seqlens_k.long() + 1 - batch.query_seqlens.long()
        self._tokens = batch.tokens[..., 1]
        self._flat = batch.positions[0, :, 0] * batch.tokens.shape[1] + batch.positions[0, :, 1]
        self.real = width < batch.query_seqlens[:, None]
        self.places = starts[:, None] + width
        self.keys = (batch.seqlens_k.max().long() // KEYS + 1) * KEYS
        self._indices: dict[int, torch.Tensor] = {}

    def spread(self, packed: torch.Tensor) -> torch.Tensor:
        """[1, tokens, ...] to [slots, width, ...]."""
        return packed[0][self._tokens]

    def packed(self, spread: torch.Tensor) -> torch.Tensor:
        """[slots, width, ...] to [1, tokens, ...]."""
        return spread.flatten(0, 1)[self._flat][None]

    def append(self, past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """The cache [slots, heads, capacity, size] with `new` [slots, heads, width, size] in it."""
        heads = past.shape[1]
        if heads not in self._indices:
            slots, width = self.places.shape
            rows = torch.arange(slots)[:, None, None].expand(slots, heads, width)
            each = torch.arange(heads)[None, :, None].expand(slots, heads, width)
            self._indices[heads] = torch.stack((rows, each, self.places[:, None].expand(slots, heads, width)), -1)
        found: torch.Tensor = _Append.apply(past, self._indices[heads], self.real[:, None, :, None], new)  # type: ignore[no-untyped-call]
        return found

    def seen(self, present: torch.Tensor) -> torch.Tensor:
        """The positions of the cache that attention runs over, [slots, heads, keys, size]."""
        return present[:, :, : self.keys]

    def mask(self, function: MaskFunction, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What each position does not see: [slots, 1, width, keys], 0 or the smallest number."""
        zero = torch.zeros(1, dtype=torch.long)
        sees = function(zero, zero, self.places[:, None, :, None], torch.arange(self.keys)[None, None, None])  # type: ignore[call-overload]
        return torch.where(sees, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)


def window_of(function: MaskFunction, positions: int) -> int | None:
    """Positions that a mask lets a query see, itself the last of them; -1: all before it. None: it is no such mask."""
    queries = torch.unique(torch.linspace(0, positions - 1, min(positions, 64)).long())
    zero = torch.zeros(1, dtype=torch.long)
    keys = torch.arange(positions)[None]
    sees: Any = function(zero, zero, queries[:, None], keys).expand(len(queries), positions)
    counts = sees.sum(-1)
    last = int(counts[-1])
    window = -1 if last == positions else last
    first = torch.zeros_like(queries) if window < 0 else (queries - window + 1).clamp(min=0)
    expected = (keys <= queries[:, None]) & (keys >= first[:, None])
    return window if torch.equal(sees, expected) and last > 0 else None
