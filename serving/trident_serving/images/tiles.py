"""An image to tiles of one size, as transformers' image processors of Idefics3 and SmolVLM cut it.

The image is resized to a longer side that all images have, then up to whole tiles, and cut; the last tile is the whole
image. The numbers are those of the processors on Pillow, to the last bit.
Reference: transformers, `image_processing_pil_smolvlm`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import numpy as np
from PIL import Image

from trident_serving.images.preprocessing import Floats, channel_values, numbers_of

_LARGEST = 4096  # pixels of a side that an image is resized to at most, whatever the settings say


class Grid(NamedTuple):
    """Rows and columns that an image is cut into; of tiles, (0, 0): it is read as a whole only."""

    rows: int
    columns: int

    @property
    def tiles(self) -> int:
        """Tiles that are read, the whole image included."""
        return self.rows * self.columns + 1


@dataclass(frozen=True)
class TileSettings:
    """What becomes of an image.

    Attributes:
        longest_edge: what its longer side is resized to before it is cut, the other one in proportion.
        tile: height and width of a tile.
        split: whether it is cut; if not, it is one tile.
        resample: Pillow's number of the filter that resizes.
        rescale: what a value from 0 to 255 is multiplied by; None: nothing.
        mean: of each channel, which is subtracted; (): nothing.
        deviation: of each channel, by which is divided; (): nothing.
    """

    longest_edge: int
    tile: int
    split: bool
    resample: int
    rescale: float | None
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def grid(self, width: int, height: int) -> Grid:
        """How an image of this size is cut."""
        return self._cut(*self._whole_tiles(*self._resized(width, height))) if self.split else Grid(0, 0)

    def tiles(self, image: Image.Image) -> Iterator[Floats]:
        """The tiles of an RGB image, float32 [3, tile, tile]: row by row, and the whole image behind them."""
        values = channel_values(self.rescale, self.mean, self.deviation)
        image = self._resize(image, *self._resized(image.width, image.height))
        if self.split:
            image = self._resize(image, *self._whole_tiles(image.width, image.height))
            grid = self._cut(image.width, image.height)
            for row in range(grid.rows):
                for column in range(grid.columns):
                    left, top = column * self.tile, row * self.tile
                    cut = image.crop((left, top, left + self.tile, top + self.tile))
                    yield numbers_of(np.asarray(cut), values)
        yield numbers_of(np.asarray(self._resize(image, self.tile, self.tile)), values)

    def most_tiles(self) -> Grid:
        """The grid of an image with as many tiles as there can be."""
        side = ceil(min(self.longest_edge, _LARGEST) / self.tile)
        return Grid(side, side) if self.split and side > 1 else Grid(0, 0)

    def _cut(self, width: int, height: int) -> Grid:
        """The grid of an image of whole tiles."""
        return Grid(height // self.tile, width // self.tile) if max(width, height) > self.tile else Grid(0, 0)

    def _resize(self, image: Image.Image, width: int, height: int) -> Image.Image:
        return image.resize((width, height), Image.Resampling(self.resample))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height with the longer side that all images have; the shorter one becomes even."""
        ratio = width / height
        if width >= height:
            width, height = self.longest_edge, int(self.longest_edge / ratio)
            height += height % 2
        else:
            width, height = int(self.longest_edge * ratio), self.longest_edge
            width += width % 2
        width, height = max(width, 1), max(height, 1)
        ratio = width / height
        if width >= height and width > _LARGEST:
            width, height = _LARGEST, int(_LARGEST / ratio)
        elif height > width and height > _LARGEST:
            width, height = int(_LARGEST * ratio), _LARGEST
        return max(width, 1), max(height, 1)

    def _whole_tiles(self, width: int, height: int) -> tuple[int, int]:
        """Width and height as multiples of a tile."""
        ratio = width / height
        if width >= height:
            width = ceil(width / self.tile) * self.tile
            height = ceil(int(width / ratio) / self.tile) * self.tile
        else:
            height = ceil(height / self.tile) * self.tile
            width = ceil(int(height * ratio) / self.tile) * self.tile
        return width, height
