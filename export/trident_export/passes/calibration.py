"""What values of a graph look like on calibration text."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper

from trident_export.passes.base import Feeds


def peaks(
    model: onnx.ModelProto, names: Sequence[str], feeds: Feeds, kept: tuple[int, ...] = (-1,)
) -> dict[str, NDArray[np.float32]]:
    """The largest absolute numbers of some values over all runs.

    Args:
        kept: dimensions that each have their own largest number: (-1,) gives one for each channel, [channels].
    """
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    given = {output.name for output in model.graph.output}
    watched.graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names if name not in given
    )
    found: dict[str, NDArray[np.float32]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "watched.onnx"
        onnx.save(watched, str(path), save_as_external_data=True, location="watched.data")
        del watched
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for feed in feeds:
            for name, value in zip(names, session.run(list(names), dict(feed)), strict=True):
                others = set(range(value.ndim)) - {axis % value.ndim for axis in kept}
                largest = np.abs(value).max(axis=tuple(others))
                found[name] = np.maximum(found[name], largest) if name in found else largest
    return found
