"""Statistics of a graph's values on calibration text."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from trident_export.graphs.editing import save_linked
from trident_export.passes.base import Feeds
from trident_export.progress import track

_GRAM_BYTES = 2**29  # held at once


def watch(model: ir.Model, names: Sequence[str], feeds: Feeds) -> Iterator[Mapping[str, NDArray[np.float32]]]:
    """Some float32 values of each run."""
    values = ir.convenience.create_value_mapping(model.graph)
    added = [values[name] for name in names if not values[name].is_graph_output()]
    types = [value.type for value in added]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "watched.onnx"
        for value in added:
            value.type = ir.TensorType(ir.DataType.FLOAT)
            model.graph.outputs.append(value)
        save_linked(model, path)
        for value, before in zip(reversed(added), reversed(types), strict=True):
            model.graph.outputs.pop()
            value.type = before
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for feed in track(feeds, "calibration"):
            yield dict(zip(names, session.run(list(names), dict(feed)), strict=True))


def peaks(
    model: ir.Model, names: Sequence[str], feeds: Feeds, kept: tuple[int, ...] = (-1,)
) -> dict[str, NDArray[np.float32]]:
    """The largest absolute numbers of some values over all runs.

    Args:
        kept: dimensions that each have their own largest number: (-1,) gives one for each channel, [channels].
    """
    found: dict[str, NDArray[np.float32]] = {}
    for values in watch(model, names, feeds):
        for name, value in values.items():
            others = set(range(value.ndim)) - {axis % value.ndim for axis in kept}
            largest = np.abs(value).max(axis=tuple(others))
            found[name] = np.maximum(found[name], largest) if name in found else largest
    return found


@dataclass(frozen=True)
class Moments:
    """Statistics of an activation [.., channels].

    Attributes:
        gram: the sum over all rows of the products of each two channels [channels, channels].
        rows: how many there are.
        peak: its largest absolute number.
    """

    gram: NDArray[np.float32]
    rows: int
    peak: float

    @property
    def root_mean_square(self) -> float:
        """Of all its numbers."""
        return float(np.sqrt(self.gram.trace() / (max(self.rows, 1) * len(self.gram))))


def moments(model: ir.Model, channels: Mapping[str, int], feeds: Callable[[], Feeds]) -> Iterator[tuple[str, Moments]]:
    """Statistics of activations, given by name and number of channels; runs repeat where memory can't hold all."""
    group: list[str] = []
    for name in channels:
        if group and 4 * sum(channels[other] ** 2 for other in [*group, name]) > _GRAM_BYTES:
            yield from _moments(model, group, feeds())
            group = []
        group.append(name)
    if group:
        yield from _moments(model, group, feeds())


def _moments(model: ir.Model, names: Sequence[str], feeds: Feeds) -> Iterator[tuple[str, Moments]]:
    found: dict[str, Moments] = {}
    for values in watch(model, names, feeds):
        for name, value in values.items():
            rows = value.reshape(-1, value.shape[-1])
            seen = Moments(rows.T @ rows, len(rows), float(np.abs(rows).max(initial=0.0)))  # an expert may get no row
            if name in found:
                old = found[name]
                seen = Moments(old.gram + seen.gram, old.rows + seen.rows, max(old.peak, seen.peak))
            found[name] = seen
    yield from found.items()
