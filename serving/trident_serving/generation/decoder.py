"""Runs of the decoder graph over rows of the KV cache.

The graph is the one that `trident_export.graphs.causal` writes; its inputs are described there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from trident_serving.generation.batch import MIN_PLACES, PackedBatch, RowTokens, pack, split
from trident_serving.generation.kv_cache import Cache, DeviceKVCache, KVCache

_PAST = "past_key_values."
_CACHE_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
}
Logits = NDArray[np.float32]


class Decoder(Protocol):
    """What the engine asks of a model; tests put a few lines of Python here."""

    @property
    def can_copy(self) -> bool:
        """Whether rows can be copied."""
        ...

    def run(self, items: Sequence[RowTokens]) -> Logits:
        """Append tokens to rows.

        Returns:
            Logits of the wanted tokens, item by item, float32 [wanted, vocabulary]; valid until the next call.
        """
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first positions of a row."""
        ...

    def release(self, row: int, start: int) -> None:
        """The row's positions from `start` on are not needed any more."""
        ...


class DeviceMissing(RuntimeError):
    """The device that the configuration asks for is not there; the message says what is and what to install."""


def open_session(path: Path, device: str, device_id: int, threads: int) -> ort.InferenceSession:
    """A session on the CPU or on a GPU, never on another than the one that is asked for.

    Raises:
        DeviceMissing: this ONNX Runtime has no provider for it, or the provider found no GPU.
    """
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    known = ort.get_available_providers()
    if provider not in known:
        raise DeviceMissing(
            f"device is {device!r}, but this onnxruntime {ort.__version__} has {', '.join(known)} alone: install "
            'onnxruntime-gpu in its place, or set device = "cpu" in models.toml'
        )
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors: what it warns of, a user can do nothing about
    options.intra_op_num_threads = threads
    # Threads spin while a run lasts, and leave the cores to the sender and the server between two runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # A thread that is held up leaves more of a product to the others: decision 0019.
    options.add_session_config_entry("session.dynamic_block_base", "8")
    providers: list[Any] = ["CPUExecutionProvider"]
    if device == "cuda":
        providers.insert(0, (provider, {"device_id": device_id}))
    session = ort.InferenceSession(str(path), options, providers=providers)
    if session.get_providers()[0] != provider:  # ONNX Runtime goes on without a provider that fails to start
        raise DeviceMissing(f"device is {device!r}, but ONNX Runtime could not use it: is there a GPU, and its driver?")
    return session


class OnnxDecoder:
    """The decoder graph in an ONNX Runtime session, with its cache bound in place.

    Args:
        path: the graph.
        rows: of the cache.
        context: positions of a row that hold tokens.
        longest_run: tokens that one run appends to a row at most.
        threads: ONNX Runtime's intra-op threads; 0: as many as there are cores.
        device: `cpu` or `cuda`; the cache lies there, and logits come from there for the wanted tokens alone.

    Raises:
        DeviceMissing: there is no such device here.
    """

    def __init__(
        self,
        path: Path,
        *,
        rows: int,
        context: int,
        longest_run: int,
        threads: int,
        device: str = "cpu",
        device_id: int = 0,
    ) -> None:
        self._session = open_session(path, device, device_id, threads)
        self._device_id = device_id
        inputs = {node.name: node for node in self._session.get_inputs()}
        past = {name: node for name, node in inputs.items() if name.startswith(_PAST)}
        shapes = {name: (int(node.shape[1]), int(node.shape[3])) for name, node in past.items()}
        dtype = _CACHE_TYPES[next(iter(past.values())).type]
        # Graphs for a GPU lack it: decision 0023. On a CPU, where the gate measures them, rows then run one by one.
        self._ragged = "query_seqlens" in inputs
        self._min_places = 1 if dtype is np.int8 or (device != "cpu" and not self._ragged) else MIN_PLACES
        self._held = np.zeros(rows, np.int64)  # positions that each row holds
        # The operator wants room for the padding of rows that share a run with longer ones.
        capacity = context + max(longest_run, self._min_places)
        self.cache: Cache = (
            KVCache(shapes, rows, capacity, dtype)
            if device == "cpu"
            else DeviceKVCache(shapes, rows, capacity, dtype, device_id)
        )
        self.context = context
        # An architecture with rotary embeddings may leave `position_ids` unused, one without needs it.
        self._inputs = [name for name in inputs if not name.startswith(_PAST)]
        logits = next(node for node in self._session.get_outputs() if node.name == "logits")
        self.vocabulary_size = int(logits.shape[2])
        self._logits = np.empty((rows, self.vocabulary_size), np.float32)
        self._bindings: dict[tuple[int, int], Binding] = {}

    @property
    def can_copy(self) -> bool:
        """See `Decoder.can_copy`."""
        return self.cache.can_copy

    def run(self, items: Sequence[RowTokens]) -> Logits:
        """See `Decoder.run`."""
        for item in items:
            if item.start + len(item.tokens) > self.context:
                raise ValueError(
                    f"{item.start + len(item.tokens)} tokens of row {item.row} exceed the context of {self.context}"
                )
        wanted = sum(item.wanted for item in items)
        if wanted > len(self._logits):
            self._logits = np.empty((wanted, self.vocabulary_size), np.float32)
        starts: dict[int, int] = {}  # of each row's logits, in the order of the runs
        end = 0
        for run in split(items, self._min_places, ragged=self._ragged):
            begin = end
            for item in run:
                starts[item.row] = end
                end += item.wanted
            batch = pack(run, self._min_places, None if self._ragged else self._held)
            self._run(batch, self._logits[begin:end])
            for item in run:
                self._held[item.row] = item.start + len(item.tokens)
        logits = self._logits[:wanted]
        if list(starts) == [item.row for item in items]:
            return logits
        return logits[[starts[item.row] + index for item in items for index in range(item.wanted)]]

    def copy(self, source: int, target: int, length: int) -> None:
        """See `Decoder.copy`."""
        self.cache.copy(source, target, length)
        self._held[target] = length

    def release(self, row: int, start: int) -> None:
        """See `Decoder.release`."""
        self.cache.release(row, start)
        self._held[row] = start

    def _run(self, batch: PackedBatch, logits: Logits) -> None:
        binding = self._binding(batch.first_row, batch.rows)
        total = np.array(self.cache.capacity, np.int32)  # an upper bound is all that the operator wants
        for name in self._inputs:
            binding.set_input(name, total if name == "total_sequence_length" else getattr(batch, name))
        binding.set_output("logits", logits.reshape(1, *logits.shape))
        self._session.run_with_iobinding(binding.io)

    def _binding(self, first_row: int, rows: int) -> Binding:
        """The binding of a window of the cache; made once, since 120 tensors take a while to bind."""
        binding = self._bindings.get((first_row, rows))
        if binding is None:
            binding = Binding(self._session.io_binding(), in_place=self.cache.device == "cpu")
            for name in self.cache.names:
                shape, address = self.cache.window(name, first_row, rows)
                place = (self.cache.device, self._device_id, self.cache.dtype.type, shape, address)
                binding.io.bind_input(name, *place)
                binding.io.bind_output(name.replace(_PAST, "present."), *place)
            self._bindings[first_row, rows] = binding
        return binding


class Binding:
    """What a session reads and writes. To bind an array takes as long as a small operator, and a step has eight.

    Args:
        in_place: whether an input may be bound once and then overwritten; on another device it is copied when it is
            bound.
    """

    def __init__(self, io: ort.IOBinding, *, in_place: bool) -> None:
        self.io = io
        self._in_place = in_place
        self._inputs: dict[str, NDArray[Any]] = {}
        self._outputs: dict[str, tuple[int, tuple[int, ...]]] = {}

    def set_input(self, name: str, array: NDArray[Any]) -> None:
        """The next run reads these numbers."""
        held = self._inputs.get(name)
        if held is not None and held.shape == array.shape and self._in_place:
            held[...] = array
        else:
            self._inputs[name] = array.copy()
            bind_array(self.io.bind_input, name, self._inputs[name])

    def set_output(self, name: str, array: NDArray[Any]) -> None:
        """The next run writes to this array, which must live as long as the binding."""
        where = (array.ctypes.data, array.shape)
        if self._outputs.get(name) != where:
            self._outputs[name] = where
            bind_array(self.io.bind_output, name, array)


def bind_array(bind: Any, name: str, array: NDArray[Any]) -> None:
    """Bind a numpy array, which must live as long as the binding, by `bind_input` or `bind_output`."""
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
