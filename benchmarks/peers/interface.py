"""What every peer can do. Imports nothing but NumPy: the peers' environments have no more in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Prompts = Sequence[Sequence[int]]
Times = list[list[float]]  # seconds from the start, of each token of each answer
THREADS = 2
SLOTS = 32
CONTEXT = 2048


class Peer(Protocol):
    """One way to generate text: the same prompts, greedily, past any end of the answer.

    Attributes:
        name: in the tables.
        weights: the file or folder whose bytes are read for every token.
    """

    name: str
    weights: Path

    def generate(self, prompts: Prompts, tokens: int) -> Times:
        """Answer all prompts at once, with so many tokens each."""
        ...

    def logits(self, ids: Sequence[int]) -> Floats:
        """Of every position of a text, [tokens, vocabulary]; log-probabilities where a library gives only these."""
        ...


class Embedder(Protocol):
    """One way to embed texts."""

    name: str

    def embed(self, texts: Sequence[str], batch_size: int) -> Floats:
        """Normalized embeddings, [texts, dimensions]."""
        ...
