"""Runs of the decoder graph over slots of the KV cache, and of other states where the model's layers keep some.

The graph is the one that `trident_export.graphs.causal` writes; its inputs are described there and in `states` beside
it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trident_serving.errors import DeviceMissing
from trident_serving.generation.batch import (
    MAX_PADDING,
    MAX_POSITIONS,
    MIN_KEYS,
    MIN_POSITIONS,
    ONE_ROW,
    PADDED_ROWS,
    PackedBatch,
    Rows,
    SlotTokens,
    pack,
    rope_positions,
    split,
)
from trident_serving.runtime.kv_cache import KEYS, LARGEST_PART, Cache, DeviceKVCache, KVCache
from trident_serving.runtime.log_probabilities import Logits
from trident_serving.runtime.session import Binding, open_session
from trident_serving.runtime.states import SlotStates

logger = logging.getLogger(__name__)

ORIGINAL_CONTEXT = "original_context"
"""Under this name a graph with two rotations says up to how many tokens a text has the first one."""

ADAPTERS = "adapters"
"""Under this name a graph with adapters beside its base has their names, in a JSON list."""

IMAGE_EMBEDS = "image_embeds"
"""The input by which a graph of a model with images takes their vectors."""

ROPE_POSITIONS = "rope_positions"
"""The input by which a graph that rotates by positions in time, height and width takes them."""

_PAST = "past_key_values."
_STATE, _NEXT_STATE = "past_states.", "present_states."
_CACHE_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
}


class StatesLost(Exception):
    """A run failed that may have changed states, so it can't be made again."""


class Decoder(Protocol):
    """What the engine asks of a model; tests put a few lines of Python here."""

    @property
    def can_copy(self) -> bool:
        """Whether slots can be copied."""
        ...

    def run(self, items: Sequence[SlotTokens]) -> Logits:
        """Append tokens to slots.

        Returns:
            Logits of the wanted tokens, item by item, float32 [wanted, vocabulary]; valid until the next call.
        """
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first positions of a slot."""
        ...

    def release(self, slot: int, start: int) -> None:
        """The slot's positions from `start` on are not needed any more."""
        ...


def run_each(decoder: Decoder, items: Sequence[SlotTokens]) -> list[Logits | Exception]:
    """The wanted logits of each item, or why there are none.

    A run that fails is made again for one item at a time, which writes the same to the cache; so an item that can't
    run leaves the others as they are. States are not written twice: where there are some, all items fail.
    """
    try:
        logits = decoder.run(items)
    except StatesLost as error:
        logger.exception("a run of the model failed")
        return [error] * len(items)
    except Exception as error:
        if len(items) > 1:
            return [
                found if isinstance(found, Exception) else found.copy()  # the next run overwrites it
                for item in items
                for found in run_each(decoder, [item])
            ]
        logger.exception("a run of the model failed")
        return [error]
    ends = accumulate((item.wanted for item in items), initial=0)
    return [logits[start:end] for start, end in pairwise(ends)]


class OnnxDecoder:
    """The decoder graph in an ONNX Runtime session, with its cache bound in place.

    Args:
        path: the graph.
        slots: of the cache.
        context: positions of a slot that hold tokens.
        longest_run: tokens that one run appends to a slot at most.
        threads: ONNX Runtime's intra-op threads; 0: as many as there are cores.
        device: `cpu` or `cuda`; the cache lies there, and logits come from there for the wanted tokens only.

    Attributes:
        original_context: tokens up to which a text has the first of two rotations; 0: there is one.
        adapters: names of the adapters that the graph has beside its base; the first has the number 1.

    Raises:
        DeviceMissing: there is no such device here.
    """

    def __init__(
        self,
        path: Path,
        *,
        slots: int,
        context: int,
        longest_run: int,
        threads: int,
        device: str = "cpu",
        device_id: int = 0,
    ) -> None:
        self._session = open_session(path, device, device_id, threads)
        self._device_id = device_id
        inputs = {node.name: node for node in self._session.get_inputs()}
        said = self._session.get_modelmeta().custom_metadata_map
        self.original_context = int(said.get(ORIGINAL_CONTEXT, 0))
        self.adapters: tuple[str, ...] = tuple(json.loads(said.get(ADAPTERS, "[]")))
        past = {name: node for name, node in inputs.items() if name.startswith(_PAST)}
        shapes = {name: (int(node.shape[1]), int(node.shape[3])) for name, node in past.items()}
        states = {name: tuple(node.shape[1:]) for name, node in inputs.items() if name.startswith(_STATE)}
        if states and device != "cpu":
            raise DeviceMissing(f"device is {device!r}, but the states of this model are kept on the CPU only")
        self.states = SlotStates(states, slots)
        dtype = _CACHE_TYPES[next(node.type for node in past.values())] if past else np.float32
        # Graphs for a GPU lack it: decision 0023. On a CPU, where the gate measures them, slots then run one by one.
        self._ragged = "query_seqlens" in inputs or not past
        self._min_positions = 1 if dtype is np.int8 or (device != "cpu" and not self._ragged) else MIN_POSITIONS
        # A cache of 8 bits and a GPU have matmuls of their own.
        wide = any(size > LARGEST_PART for _, size in shapes.values())
        self._min_keys = MIN_KEYS if wide and dtype is not np.int8 and device == "cpu" else 0
        self._held = np.zeros(slots, np.int64)  # positions that each slot holds
        # The operator wants room for the padding of slots that share a run with longer ones.
        self._positions = max(context + max(longest_run, self._min_positions), self._min_keys)
        capacity = -(-self._positions // KEYS) * KEYS
        self.cache: Cache = (
            KVCache(shapes, slots, capacity, dtype)
            if device == "cpu"
            else DeviceKVCache(shapes, slots, capacity, dtype, device_id)
        )
        self.context = context
        images = inputs.get(IMAGE_EMBEDS)
        self._no_embeds = np.zeros((0, int(images.shape[1]) if images is not None else 0), np.float32)
        self._has_rope = ROPE_POSITIONS in inputs
        # An architecture with rotary embeddings may leave `position_ids` unused, one without needs it.
        self._inputs = [name for name in inputs if not name.startswith((_PAST, _STATE))]
        logits = next(node for node in self._session.get_outputs() if node.name == "logits")
        self.vocabulary_size = int(logits.shape[2])
        self._logits = np.empty((slots + 1, self.vocabulary_size), np.float32)  # one for a second row
        self._bindings: dict[tuple[int, int], Binding] = {}
        self._rows: Rows | None = None  # until the first run

    def rotation(self, tokens: int) -> int:
        """Which rotation a text of so many tokens has."""
        return int(0 < self.original_context < tokens)

    @property
    def can_copy(self) -> bool:
        """See `Decoder.can_copy`."""
        return self.cache.can_copy

    def run(self, items: Sequence[SlotTokens]) -> Logits:
        """See `Decoder.run`."""
        if self._rows is None:
            self._rows = self._fewest_rows()
        for item in items:
            if item.start + len(item.tokens) > self.context:
                raise ValueError(
                    f"{item.start + len(item.tokens)} tokens of slot {item.slot} exceed the context of {self.context}"
                )
            if self.states and item.start not in (0, self._held[item.slot]):
                raise ValueError(
                    f"slot {item.slot} holds the states of {self._held[item.slot]} tokens, not {item.start}"
                )
        wanted = sum(item.wanted for item in items)
        if wanted >= len(self._logits):
            self._logits = np.empty((wanted + 1, self.vocabulary_size), np.float32)
        starts: dict[int, int] = {}  # of each slot's logits, in the order of the runs
        end = 0
        max_padding = MAX_PADDING if self.states else MAX_POSITIONS
        runs = split(items, self._min_positions, ragged=self._ragged, max_padding=max_padding, min_keys=self._min_keys)
        for run in runs:
            begin = end
            for item in run:
                starts[item.slot] = end
                end += item.wanted
            held = None if self._ragged else self._held
            batch = pack(run, self._min_positions, held, self._rows, self._min_keys)
            logits = self._logits[begin : begin + len(batch.logits_tokens)]
            if self.states:
                self._run_with_states(run, batch, logits)
            else:
                self._run(run, batch, logits)
            for item in run:
                self._held[item.slot] = item.start + len(item.tokens)
        logits = self._logits[:wanted]
        if list(starts) == [item.slot for item in items]:
            return logits
        return logits[[starts[item.slot] + index for item in items for index in range(item.wanted)]]

    def copy(self, source: int, target: int, length: int) -> None:
        """See `Decoder.copy`."""
        if self.states and length != self._held[source]:
            raise ValueError(f"slot {source} holds the states of {self._held[source]} tokens, not {length}")
        self.cache.copy(source, target, length)
        self.states.copy(source, target)
        self._held[target] = length

    def release(self, slot: int, start: int) -> None:
        """See `Decoder.release`."""
        self.cache.release(slot, start)
        # States can't be cut back.
        self._held[slot] = start if not self.states or start == self._held[slot] else 0

    def _fewest_rows(self) -> Rows:
        """Of a run, so that a token's numbers are the same in every run on this processor; see `PADDED_ROWS`.

        Whether a single row is summed in another order shows in nearly any token, since every bit of its logits is
        compared. Operators with states take no token that belongs to no slot. A graph that can't run fails here.
        """
        rows = ONE_ROW
        for name in ("wanted",) if self.states else ("tokens", "wanted"):
            padded = rows._replace(**{name: PADDED_ROWS})
            if not np.array_equal(self._probe(rows), self._probe(padded), equal_nan=True):
                rows = padded
        return rows

    def _probe(self, rows: Rows) -> Logits:
        """Logits of two texts of one token, without an adapter and with one, if there are any."""
        self._rows = rows
        found = []
        for token in (self.vocabulary_size // 3, self.vocabulary_size // 2):
            for adapter in {0, len(self.adapters)}:
                found.append(self.run([SlotTokens(0, 0, [token], adapter=adapter)]).copy())
                self.release(0, 0)
        return np.concatenate(found)

    def _run_with_states(self, items: Sequence[SlotTokens], batch: PackedBatch, logits: Logits) -> None:
        for item in items:
            if item.start == 0:
                self.states.reset(item.slot)
        try:
            self._run(items, batch, logits)
        except Exception as error:
            for item in items:
                self._held[item.slot] = 0  # the next text begins from zeros
            raise StatesLost(str(error)) from error

    def _run(self, items: Sequence[SlotTokens], batch: PackedBatch, logits: Logits) -> None:
        binding = self._binding(batch.first_slot, batch.slots)
        given: dict[str, NDArray[Any]] = {
            # An upper bound is all that the operator wants.
            "total_sequence_length": np.array(self._positions, np.int32),
            IMAGE_EMBEDS: batch.image_embeds if len(batch.image_embeds) else self._no_embeds,
        }
        if self._has_rope:
            given[ROPE_POSITIONS] = rope_positions(items, batch)
        for name in self._inputs:
            binding.set_input(name, given[name] if name in given else getattr(batch, name))
        binding.set_output("logits", logits.reshape(1, *logits.shape))
        self._session.run_with_iobinding(binding.io)

    def _binding(self, first_slot: int, slots: int) -> Binding:
        """The binding of a window of the cache; made once, since 120 tensors take a while to bind."""
        binding = self._bindings.get((first_slot, slots))
        if binding is None:
            binding = Binding(self._session.io_binding(), in_place=self.cache.device == "cpu")
            for name in self.cache.names:
                shape, address = self.cache.window(name, first_slot, slots)
                where = (self.cache.device, self._device_id, self.cache.dtype.type, shape, address)
                binding.io.bind_input(name, *where)
                binding.io.bind_output(name.replace(_PAST, "present."), *where)
            for name in self.states.buffers:
                shape, address = self.states.window(name, first_slot, slots)
                binding.io.bind_input(name, "cpu", 0, np.float32, shape, address)
                binding.io.bind_output(name.replace(_STATE, _NEXT_STATE), "cpu", 0, np.float32, shape, address)
            self._bindings[first_slot, slots] = binding
        return binding
