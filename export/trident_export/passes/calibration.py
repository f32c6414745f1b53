"""What values of a graph look like on calibration text."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper

from trident_export.passes.base import Feeds
from trident_export.progress import track

_GRAM_BYTES = 2**29  # held at once


def watch(model: onnx.ModelProto, names: Sequence[str], feeds: Feeds) -> Iterator[Mapping[str, NDArray[np.float32]]]:
    """Some float32 values of each run."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    given = {output.name for output in model.graph.output}
    watched.graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names if name not in given
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "watched.onnx"
        onnx.save(watched, str(path), save_as_external_data=True, location="watched.data")
        del watched
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for feed in track(feeds, "calibration"):
            yield dict(zip(names, session.run(list(names), dict(feed)), strict=True))


def peaks(
    model: onnx.ModelProto, names: Sequence[str], feeds: Feeds, kept: tuple[int, ...] = (-1,)
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
    """What an activation [.., channels] looks like.

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
        return float(np.sqrt(self.gram.trace() / (self.rows * len(self.gram))))


def moments(
    model: onnx.ModelProto, channels: Mapping[str, int], feeds: Callable[[], Feeds]
) -> Iterator[tuple[str, Moments]]:
    """Of each activation, by name and number of channels; runs are repeated where memory is not for all at once."""
    group: list[str] = []
    for name in channels:
        if group and 4 * sum(channels[other] ** 2 for other in [*group, name]) > _GRAM_BYTES:
            yield from _moments(model, group, feeds())
            group = []
        group.append(name)
    if group:
        yield from _moments(model, group, feeds())


def _moments(model: onnx.ModelProto, names: Sequence[str], feeds: Feeds) -> Iterator[tuple[str, Moments]]:
    found: dict[str, Moments] = {}
    for values in watch(model, names, feeds):
        for name, value in values.items():
            rows = value.reshape(-1, value.shape[-1])
            seen = Moments(rows.T @ rows, len(rows), float(np.abs(rows).max()))
            if name in found:
                old = found[name]
                seen = Moments(old.gram + seen.gram, old.rows + seen.rows, max(old.peak, seen.peak))
            found[name] = seen
    yield from found.items()
