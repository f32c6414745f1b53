"""Files to batches for a graph that reads images: what the preprocess stages of all such tasks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trident_serving.encoders.task import Stage, Tensor, Tensors
from trident_serving.errors import InvalidRequest
from trident_serving.images.preprocessing import Floats, ImageSettings, Preprocessor
from trident_serving.schema.reading import read_parameters
from trident_serving.text import numbered

STAGE = "preprocess"
IMAGE = Tensor("image", "STRING", (1,))
PIXELS = Tensor("pixel_values", "FP32", (3, "height", "width"))
# Parameters of every preprocess stage, and the limits that they come from.
PARAMETERS = {"max_bytes": "max_bytes", "max_pixels": "max_pixels"}


@dataclass(frozen=True)
class FileLimits:
    """The `parameters` of the preprocess stage's config.pbtxt, which come from models.toml; see `ImageLimits`."""

    max_bytes: int
    max_pixels: int


def preprocessor(folder: Path, parameters: Mapping[str, str]) -> Preprocessor:
    """Read `folder/image.json`."""
    limits = read_parameters(FileLimits, parameters)
    return Preprocessor(ImageSettings.load(folder), limits.max_bytes, limits.max_pixels)


def pixels_of(files: NDArray[Any], read: Preprocessor) -> Floats:
    """The graph's input for the files of a BYTES tensor of any shape, float32 [images, 3, height, width].

    Raises:
        InvalidRequest: there is none, or one can't be read; the message says which.
    """
    contents = files.reshape(-1).tolist()
    if not contents:
        raise InvalidRequest("image is empty: it must hold one file or more")
    named = zip(contents, numbered("image", len(contents)), strict=True)
    return np.stack([read(content, name) for content, name in named])


def read_images(folder: Path, parameters: Mapping[str, str]) -> Stage:
    """The preprocess stage of tasks that read `image` alone."""
    read = preprocessor(folder, parameters)

    def preprocess(tensors: Tensors) -> Tensors:
        return {"pixel_values": pixels_of(tensors["image"], read)}

    return preprocess


def as_files(contents: Sequence[bytes]) -> NDArray[np.object_]:
    """Files as a BYTES tensor [files]."""
    found = np.empty(len(contents), np.object_)
    found[:] = contents
    return found
