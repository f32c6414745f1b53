"""One run of the decoder graph over rows of the KV cache.

The graph is the one that `trident_export.causal_graph` writes; its inputs are described there. Rows of one
run may have different lengths: `seqlens_k` gives each row's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from trident_serving.generation.kv_cache import KVCache
from trident_serving.generation.scheduler import RowMove

_PAST = "past_key_values."


class Decoder(Protocol):
    """What the engine asks of a model; tests put a few lines of Python here."""

    @property
    def slots(self) -> int:
        """Rows that can run at once."""
        ...

    def run(self, first_row: int, input_ids: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append `input_ids` [rows, tokens] after `starts` [rows] cached tokens of rows first_row and on.

        Returns:
            Logits of each row's last token, float32 [rows, vocabulary]; valid until the next call.
        """
        ...

    def move(self, moves: list[RowMove]) -> None:
        """Copy rows of the cache."""
        ...


class OnnxDecoder:
    """The decoder graph in an ONNX Runtime session, with its cache bound in place."""

    def __init__(self, path: Path, *, slots: int, capacity: int, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        inputs = {node.name: node for node in self._session.get_inputs()}
        self.cache = KVCache(
            {name: (int(node.shape[1]), int(node.shape[3])) for name, node in inputs.items() if name.startswith(_PAST)},
            slots,
            capacity,
        )
        # An architecture with rotary embeddings may leave `position_ids` unused, one without needs it.
        self._inputs = inputs.keys()
        logits = next(node for node in self._session.get_outputs() if node.name == "logits")
        self.vocabulary_size = int(logits.shape[2])
        self._logits = np.empty((slots, self.vocabulary_size), np.float32)

    @property
    def slots(self) -> int:
        """Rows that can run at once."""
        return self.cache.slots

    def run(self, first_row: int, input_ids: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Decoder.run`."""
        rows = input_ids.shape[0]
        logits = self.run_positions(first_row, input_ids, starts, np.array([input_ids.shape[1] - 1]))
        return logits.reshape(rows, self.vocabulary_size)

    def run_positions(
        self,
        first_row: int,
        input_ids: NDArray[np.int64],
        starts: NDArray[np.int64],
        positions: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Like `run`, with the logits of chosen positions: float32 [rows, positions, vocabulary]."""
        rows, tokens = input_ids.shape
        ends = starts + tokens
        if int(ends.max()) > self.cache.capacity:
            raise ValueError(f"{int(ends.max())} tokens exceed the cache's {self.cache.capacity}")
        feeds: dict[str, NDArray[Any]] = {
            "input_ids": np.ascontiguousarray(input_ids, np.int64),
            "position_ids": starts[:, None] + np.arange(tokens, dtype=np.int64),
            "seqlens_k": (ends - 1).astype(np.int32),
            "total_sequence_length": np.array(ends.max(), np.int32),
            "logits_positions": np.ascontiguousarray(positions, np.int64),
        }
        shape = (rows, len(positions), self.vocabulary_size)
        logits = self._logits[:rows].reshape(shape) if len(positions) == 1 else np.empty(shape, np.float32)
        binding = self._session.io_binding()
        for name, array in feeds.items():
            if name in self._inputs:
                _bind(binding.bind_input, name, array)
        for name, buffer in self.cache.buffers.items():
            view = buffer[first_row : first_row + rows]
            _bind(binding.bind_input, name, view)
            _bind(binding.bind_output, name.replace(_PAST, "present."), view)
        _bind(binding.bind_output, "logits", logits)
        self._session.run_with_iobinding(binding)
        return logits

    def move(self, moves: list[RowMove]) -> None:
        """See `Decoder.move`."""
        self.cache.move(moves)


def _bind(bind: Any, name: str, array: NDArray[Any]) -> None:
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
