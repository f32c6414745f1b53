"""Runs of the two graphs that `trident_export.graphs.seq2seq` writes; their inputs are described there."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trident_serving.runtime.kv_cache import LARGEST_PART, KVCache
from trident_serving.runtime.session import bind_array, open_session

Floats = NDArray[np.float32]
Source = Sequence[int] | Floats  # tokens, or the features of speech, float32 [mels, frames]

# The keys of texts that decode together are padded to a multiple of this. A sum over the padding then runs in the same
# order whatever the length, so the numbers of a text are the same to the last bit whatever decodes with it.
LENGTH_STEP = 64
# Where heads have more numbers than `LARGEST_PART`.
LENGTH_STEP_OF_LARGE_HEADS = 128
# A matmul of one row sums in another order than one of several.
MIN_POSITIONS = 2
# Texts times positions of an encoder's run at most: its attention takes memory for each of the text's positions again.
ENCODED_POSITIONS = 1024
LONGEST_PADDED = "longest_padded"
"""Under this name an encoder that takes a mask says up to how many positions it can be padded; 0: to any."""
_MASKED = np.float32(-1e9)


def padded(length: int, step: int = LENGTH_STEP) -> int:
    """The next multiple of a step."""
    return -(-length // step) * step


@dataclass(frozen=True)
class Row:
    """One row of a run: the text that it belongs to, its token, and the position of that token."""

    text: Hashable
    token: int
    position: int


@dataclass(frozen=True)
class Copy:
    """A slot that is to hold what another holds.

    Attributes:
        start: positions before it are the same in both.
    """

    source: int
    target: int
    start: int = 0


class CrossCache:
    """Keys and values of the texts that decode together, in tensors that grow and shrink with them."""

    def __init__(self, shapes: dict[str, tuple[int, int]]) -> None:
        self._shapes = shapes  # heads and numbers of a head, by name
        large = any(size > LARGEST_PART for _, size in shapes.values())
        self.step = LENGTH_STEP_OF_LARGE_HEADS if large else LENGTH_STEP
        self._texts: list[Hashable | None] = []
        self._lengths: list[int] = []
        self._capacity = 0
        self.tensors: dict[str, Floats] = {}
        self.mask: Floats = np.zeros((0, 1, 1, 0), np.float32)
        self.version = 0

    @property
    def texts(self) -> int:
        """Texts that the tensors have room for."""
        return len(self._texts)

    def index(self, text: Hashable) -> int:
        """Where a text is in the tensors."""
        return self._texts.index(text)

    def reserve(self, texts: int, length: int) -> None:
        """Make room for so many more texts of that length at most, all at once."""
        used = sum(known is not None for known in self._texts)
        if used + texts > len(self._texts) or length > self._capacity:
            self._rebuild(used + texts, length)

    def add(self, text: Hashable, arrays: dict[str, Floats], length: int) -> None:
        """Add a text."""
        self.reserve(1, length)
        index = self._texts.index(None)
        self._texts[index], self._lengths[index] = text, length
        self._write(index, arrays, length)

    def remove(self, text: Hashable) -> None:
        """Drop a text."""
        self._texts[self.index(text)] = None
        left = sum(known is not None for known in self._texts)
        if 2 * left < len(self._texts):
            self._rebuild(left, 0)

    def _write(self, index: int, arrays: dict[str, Floats], length: int) -> None:
        for name, array in arrays.items():
            if name.endswith("key"):
                self.tensors[name][index, :, :, :length] = array
                self.tensors[name][index, :, :, length:] = 0.0
            else:
                self.tensors[name][index, :, :length] = array
                self.tensors[name][index, :, length:] = 0.0
        self.mask[index, ..., :length] = 0.0
        self.mask[index, ..., length:] = _MASKED

    def _rebuild(self, texts: int, length: int) -> None:
        kept = [(text, at, self._lengths[at]) for at, text in enumerate(self._texts) if text is not None]
        longest = max([length, *(size for _, _, size in kept)], default=0)
        capacity = padded(max(longest, 1), self.step)
        before, self.tensors = self.tensors, {}
        for name, (heads, width) in self._shapes.items():
            shape = (heads, width, capacity) if name.endswith("key") else (heads, capacity, width)
            self.tensors[name] = np.zeros((texts, *shape), np.float32)
        self.mask = np.zeros((texts, 1, 1, capacity), np.float32)
        self._texts, self._lengths, self._capacity = [None] * texts, [0] * texts, capacity
        for index, (text, at, size) in enumerate(kept):
            self._texts[index], self._lengths[index] = text, size
            arrays = {
                name: tensor[at, :, :, :size] if name.endswith("key") else tensor[at, :, :size]
                for name, tensor in before.items()
            }
            self._write(index, arrays, size)
        self.version += 1


class Seq2SeqDecoder:
    """Both graphs in ONNX Runtime sessions, with the caches bound in place.

    Args:
        folder: holds encoder.onnx and decoder.onnx.
        slots: of the cache, one for each row of a run.
        capacity: tokens of a slot, start tokens included.
        threads: ONNX Runtime's intra-op threads; the two sessions never run at the same time.
        device: `cpu`; the caches lie there.
    """

    def __init__(self, folder: Path, *, slots: int, capacity: int, threads: int, device: str = "cpu") -> None:
        self._encoder = open_session(folder / "encoder.onnx", device, 0, threads)
        self._decoder = open_session(folder / "decoder.onnx", device, 0, threads)
        nodes = {node.name: node for node in self._decoder.get_inputs()}
        past = {name: node for name, node in nodes.items() if name.startswith("past.")}
        self._cache = KVCache({name: (node.shape[1], node.shape[3]) for name, node in past.items()}, slots, capacity)
        cross = {name: node for name, node in nodes.items() if name.startswith("cross.")}
        self._cross = CrossCache(
            {n: (node.shape[1], node.shape[2] if n.endswith("key") else node.shape[3]) for n, node in cross.items()}
        )
        self._encoded = [node.name for node in self._encoder.get_outputs()]
        self._source = self._encoder.get_inputs()[0].name
        # Of speech every window has as many.
        self._positions = self._encoder.get_outputs()[0].shape[3] if self._source == "input_features" else 0
        self._masked = any(node.name == "attention_mask" for node in self._encoder.get_inputs())
        self._longest_padded = int(self._encoder.get_modelmeta().custom_metadata_map.get(LONGEST_PADDED, "0"))
        self._inputs = [name for name in nodes if name not in past and name not in cross]
        logits = next(node for node in self._decoder.get_outputs() if node.name == "logits")
        self.vocabulary_size = int(logits.shape[1])
        self._logits = np.empty((slots, self.vocabulary_size), np.float32)
        self._binding: Any = None
        self._bound: tuple[int, int] | None = None
        self._twice: bool | None = None  # whether a single row runs twice; None until there is one
        self.slots = slots
        self.capacity = capacity

    @property
    def bytes_per_token(self) -> int:
        """Of one token in one slot of the cache."""
        return self._cache.bytes_per_token

    def encode(self, text: Hashable, source: Source) -> None:
        """Encode a text, and keep its keys and values until it is removed."""
        if failed := self.encode_all({text: source}):
            raise failed[text]

    def encode_all(self, texts: Mapping[Hashable, Source]) -> dict[Hashable, Exception]:
        """Encode texts, several in a run where the graph can tell them apart, and keep their keys and values.

        Returns:
            Why a text could not be encoded, for each of those.
        """
        failed: dict[Hashable, Exception] = {}
        self._cross.reserve(len(texts), self._positions or max(map(len, texts.values()), default=0))
        for group in self._runs(texts):
            try:
                self._encode([(text, texts[text]) for text in group])
            except Exception:
                for text in group:
                    try:
                        self._encode([(text, texts[text])])
                    except Exception as error:
                        failed[text] = error
        return failed

    def _runs(self, texts: Mapping[Hashable, Source]) -> list[list[Hashable]]:
        """Texts that are encoded together: of about the same length, if they can be padded, and have several tokens."""
        runs: list[list[Hashable]] = []
        for text in sorted(texts, key=lambda each: len(texts[each])):  # the last of a run is the longest
            width = self._width(len(texts[text]))
            alone = width is None or len(texts[text]) < MIN_POSITIONS
            before = runs[-1] if runs and not alone else []
            if (
                before
                and len(texts[before[0]]) >= MIN_POSITIONS
                and (len(before) + 1) * (width or 0) <= ENCODED_POSITIONS
            ):
                before.append(text)
            else:
                runs.append([text])
        return runs

    def _width(self, length: int) -> int | None:
        """Positions that a text is padded to, alone as well, so that its numbers are the same; None: it can't be."""
        width = padded(length, self._cross.step)
        return None if not self._masked or 0 < self._longest_padded < width else width

    def _encode(self, texts: Sequence[tuple[Hashable, Source]]) -> None:
        if self._positions:  # of speech, one at a time: it has no mask
            for text, features in texts:
                arrays = self._encoder.run(self._encoded, {self._source: np.asarray(features, np.float32)[None]})
                found = {name: array[0] for name, array in zip(self._encoded, arrays, strict=True)}
                self._cross.add(text, found, self._positions)
            return
        longest = max(len(ids) for _, ids in texts)
        width = self._width(longest) or longest
        tokens, mask = np.zeros((2, len(texts), width), np.int64)
        for row, (_, ids) in enumerate(texts):
            tokens[row, : len(ids)] = ids
            mask[row, : len(ids)] = 1
        feeds = {"input_ids": tokens} | ({"attention_mask": mask} if self._masked else {})
        outputs = dict(zip(self._encoded, self._encoder.run(self._encoded, feeds), strict=True))
        for row, (text, ids) in enumerate(texts):
            arrays = {
                name: array[row, :, :, : len(ids)] if name.endswith("key") else array[row, :, : len(ids)]
                for name, array in outputs.items()
            }
            self._cross.add(text, arrays, len(ids))

    def remove(self, text: Hashable) -> None:
        """Drop a text."""
        self._cross.remove(text)

    def run(self, rows: Sequence[Row]) -> Floats:
        """Append a token to each of the first slots of the cache, one slot for each row.

        A processor may sum a single row of 4-bit weights in another order (see `generation.batch.PADDED_ROWS`). Then
        one row runs twice, the second time in the slot behind it, which is idle.

        Returns:
            Logits, float32 [rows, vocabulary]; valid until the next call.
        """
        if len(rows) > 1 or len(self._logits) == 1 or self._twice is False:
            return self._run(rows)
        alone = None if self._twice else self._run(rows).copy()
        logits = self._run([*rows, *rows])[:1]
        if alone is not None:
            self._twice = not np.array_equal(alone, logits, equal_nan=True)
        return logits

    def _run(self, rows: Sequence[Row]) -> Floats:
        by_text: dict[Hashable, list[int]] = {}
        for number, row in enumerate(rows):
            by_text.setdefault(row.text, []).append(number)
        width = max(MIN_POSITIONS, *(len(found) for found in by_text.values()))
        cross_rows = np.zeros((self._cross.texts, width), np.int64)
        cross_places = np.empty(len(rows), np.int64)
        for text, found in by_text.items():
            index = self._cross.index(text)
            cross_rows[index, : len(found)] = found
            cross_places[found] = index * width + np.arange(len(found))
        positions = np.array([row.position for row in rows], np.int64)
        feeds: dict[str, NDArray[Any]] = {
            "input_ids": np.array([[row.token] for row in rows], np.int64),
            "positions": positions,
            "seqlens_k": positions.astype(np.int32),
            "total_sequence_length": np.array(self.capacity, np.int32),
            "cross_rows": cross_rows,
            "cross_places": cross_places,
            "cross_mask": self._cross.mask,
        }
        binding = self._bind(len(rows))
        for name in self._inputs:
            bind_array(binding.bind_input, name, feeds[name])
        self._decoder.run_with_iobinding(binding)
        return self._logits[: len(rows)]

    def move(self, copies: Sequence[Copy], length: int) -> None:
        """Copy positions up to `length` of some slots to others; no target is a source."""
        self._cache.copy_parts([(copy.source, copy.target, copy.start) for copy in copies], length)

    def _bind(self, rows: int) -> Any:
        """The caches' tensors, bound again only when their number or their addresses changed."""
        if self._bound != (rows, self._cross.version):
            self._binding = self._decoder.io_binding()
            for name in self._cache.names:
                shape, address = self._cache.window(name, 0, rows)
                where = ("cpu", 0, np.float32, shape, address)
                self._binding.bind_input(name, *where)
                self._binding.bind_output(name.replace("past.", "present."), *where)
            for name, tensor in self._cross.tensors.items():
                bind_array(self._binding.bind_input, name, tensor)
            bind_array(self._binding.bind_output, "logits", self._logits[:rows])
            self._bound = (rows, self._cross.version)
        return self._binding
