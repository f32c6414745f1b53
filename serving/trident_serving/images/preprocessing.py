"""Images to the numbers that a graph reads: resized, cropped, rescaled and normalized, as transformers computes it.

The numbers are those of transformers' image processors on Pillow, to the last bit: Pillow resizes here as there, and
what becomes of each of the 256 values of a channel is computed once, by the same operations.
Reference: transformers, `image_processing_backends.PilBackend`, `image_transforms`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trident_serving.errors import InvalidRequest
from trident_serving.images.decoding import decode, on_white
from trident_serving.schema import reading

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]

_SETTINGS = "image.json"
_CHANNELS = 3


@dataclass(frozen=True)
class ImageSettings:
    """What becomes of an image; `image.json` in the version folder, which the export writes.

    Attributes:
        size: height and width that it is resized to; (): another way, or not at all.
        shortest_edge: what its shorter side is resized to, the other one in proportion; 0: another way, or not at all.
        resample: Pillow's number of the filter that resizes.
        crop: height and width that are cut out of the middle, black around it where there is less; (): all.
        rescale: what a value from 0 to 255 is multiplied by; None: nothing.
        mean: of each channel, which is subtracted; (): nothing.
        deviation: of each channel, by which is divided; (): nothing.
        on_white: whether pixels of the colour that a file calls transparent become white.
    """

    size: tuple[int, ...]
    shortest_edge: int
    resample: int
    crop: tuple[int, ...]
    rescale: float | None
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    on_white: bool = False

    @classmethod
    def load(cls, folder: Path) -> ImageSettings:
        """Read `folder/image.json`."""
        return reading.load(cls, folder / _SETTINGS)

    def save(self, folder: Path) -> None:
        """Write `folder/image.json`."""
        reading.save(self, folder / _SETTINGS)


class Preprocessor:
    """Files to the graph's input.

    Args:
        max_bytes: of a file.
        max_pixels: of an image, and of what it is resized to.
    """

    def __init__(self, settings: ImageSettings, max_bytes: int, max_pixels: int) -> None:
        self._settings = settings
        self._max_bytes, self._max_pixels = max_bytes, max_pixels
        self._values = channel_values(settings.rescale, settings.mean, settings.deviation)

    def __call__(self, content: bytes, name: str) -> Floats:
        """The numbers of a file, float32 [3, height, width].

        Args:
            name: what errors call it.

        Raises:
            InvalidRequest: see `decoding.decode`; or it would be resized to more than `max_pixels`.
        """
        image = decode(content, name, self._max_bytes, self._max_pixels)
        if self._settings.on_white:
            image = on_white(image)
        if (target := self._target(image.width, image.height)) is not None:
            height, width = target
            if height * width > self._max_pixels:
                raise InvalidRequest(
                    f"{name} is {image.width} x {image.height} pixels, and this model would read it at "
                    f"{width} x {height}, the limit is {self._max_pixels} pixels: cut it nearer to a square"
                )
            image = image.resize((width, height), Image.Resampling(self._settings.resample))
        pixels: Pixels = np.asarray(image)
        if self._settings.crop:
            pixels = cropped(pixels, *self._settings.crop)
        return numbers_of(pixels, self._values)

    def _target(self, width: int, height: int) -> tuple[int, int] | None:
        """Height and width to resize an image to; None: it is left as it is."""
        if self._settings.size:
            return self._settings.size[0], self._settings.size[1]
        short = self._settings.shortest_edge
        if not short:
            return None
        long = int(short * max(width, height) / min(width, height))
        return (long, short) if width <= height else (short, long)


def cropped(pixels: Pixels, height: int, width: int) -> Pixels:
    """The middle of an image [rows, columns, channels], with black around it where it is smaller."""
    rows, columns = pixels.shape[:2]
    top, left = (rows - height) // 2, (columns - width) // 2
    if rows < height or columns < width:
        whole = np.zeros((max(rows, height), max(columns, width), pixels.shape[2]), pixels.dtype)
        above, before = ceil((whole.shape[0] - rows) / 2), ceil((whole.shape[1] - columns) / 2)
        whole[above : above + rows, before : before + columns] = pixels
        pixels, top, left = whole, top + above, left + before
    return pixels[top : top + height, left : left + width]


def numbers_of(pixels: Pixels, values: Floats) -> Floats:
    """Pixels [rows, columns, 3] as what `channel_values` says each becomes, float32 [3, rows, columns]."""
    return np.stack([values[channel][pixels[..., channel]] for channel in range(_CHANNELS)])


def channel_values(rescale: float | None, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Floats:
    """What each value of each channel becomes, float32 [3, 256]; see `ImageSettings`."""
    every = np.arange(256, dtype=np.uint8)
    values: Floats = every.astype(np.float32)
    if rescale is not None:
        values = (every.astype(np.float64) * rescale).astype(np.float32)
    found = np.repeat(values[None], _CHANNELS, axis=0)
    if mean:
        middle, spread = (np.array(each, np.float32)[:, None] for each in (mean, deviation))
        found = (found - middle) / spread
    return found
