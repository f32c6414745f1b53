"""An image to patches at its own size, as transformers' image processor of Qwen2-VL and Qwen2.5-VL makes them.

The image is resized to whole squares of patches, about as large as it is, within bounds of its pixels. Squares of
`merge` by `merge` patches, of which the model makes one token each, stand one after another, row by row. A patch is a
still video: each of its frames is the same. The numbers are those of the processor on Pillow, to the last bit.
Reference: transformers, `image_processing_pil_qwen2_vl`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, sqrt

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trident_serving.errors import InvalidRequest
from trident_serving.images.preprocessing import Floats, channel_values, numbers_of
from trident_serving.images.tiles import Grid

MOST_RATIO = 200  # of the longer side to the shorter one, beyond which transformers refuses an image


@dataclass(frozen=True)
class PatchSettings:
    """What becomes of an image.

    Attributes:
        patch: height and width of a patch.
        merge: patches of a token in height and in width.
        frames: of a patch.
        window: height and width, in pixels, of the windows in which some layers attend; 0: all layers see the whole
            image.
        min_pixels: of an image; a smaller one is enlarged.
        max_pixels: of an image; a larger one is made smaller.
        resample: Pillow's number of the filter that resizes.
        rescale: what a value from 0 to 255 is multiplied by; None: nothing.
        mean: of each channel, which is subtracted; (): nothing.
        deviation: of each channel, by which is divided; (): nothing.
    """

    patch: int
    merge: int
    frames: int
    window: int
    min_pixels: int
    max_pixels: int
    resample: int
    rescale: float | None
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @property
    def factor(self) -> int:
        """Height and width of a token, in pixels."""
        return self.patch * self.merge

    def grid(self, width: int, height: int) -> Grid:
        """The rows and columns of patches of an image of this size.

        Raises:
            InvalidRequest: it is too narrow.
        """
        if max(height, width) / min(height, width) > MOST_RATIO:
            raise InvalidRequest(
                f"it is {width} x {height} pixels, and this model reads images whose longer side is at most "
                f"{MOST_RATIO} times the shorter one: cut it nearer to a square"
            )
        rows, columns = (round(side / self.factor) * self.factor for side in (height, width))
        if rows * columns > self.max_pixels:
            scale = sqrt((height * width) / self.max_pixels)
            rows, columns = (
                max(self.factor, floor(side / scale / self.factor) * self.factor) for side in (height, width)
            )
        elif rows * columns < self.min_pixels:
            scale = sqrt(self.min_pixels / (height * width))
            rows, columns = (ceil(side * scale / self.factor) * self.factor for side in (height, width))
        return Grid(rows // self.patch, columns // self.patch)

    def patches(self, image: Image.Image) -> Floats:
        """The patches of an RGB image, float32 [patches, 3 x frames x patch x patch]."""
        grid = self.grid(image.width, image.height)
        size = (grid.columns * self.patch, grid.rows * self.patch)
        pixels = np.asarray(image.resize(size, Image.Resampling(self.resample)))
        numbers = numbers_of(pixels, channel_values(self.rescale, self.mean, self.deviation))
        squares = numbers.reshape(
            3,
            grid.rows // self.merge,
            self.merge,
            self.patch,
            grid.columns // self.merge,
            self.merge,
            self.patch,
        ).transpose(1, 4, 2, 5, 0, 3, 6)
        frames = np.repeat(squares[:, :, :, :, :, None], self.frames, axis=5)
        return frames.reshape(grid.rows * grid.columns, -1)

    def tokens(self, grid: Grid) -> int:
        """That stand for an image."""
        return grid.rows * grid.columns // self.merge**2

    @property
    def most_image_tokens(self) -> int:
        """Tokens that an image takes at most.

        Those of `max_pixels`; but an image that is so narrow that it has a single row of tokens keeps it, and one that
        is enlarged may have a row and a column more than its pixels need.
        """
        most, least = (pixels / self.factor**2 for pixels in (self.max_pixels, self.min_pixels))
        enlarged = (sqrt(least / MOST_RATIO) + 1) * (sqrt(least * MOST_RATIO) + 1)
        return floor(max(most, sqrt(most * MOST_RATIO), enlarged))

    def positions(self, grid: Grid) -> NDArray[np.int64]:
        """Row and column of each patch, int64 [patches, 2]."""
        rows, columns = np.indices(grid).reshape(
            2, grid.rows // self.merge, self.merge, grid.columns // self.merge, self.merge
        )
        found: NDArray[np.int64] = np.stack([each.transpose(0, 2, 1, 3).reshape(-1) for each in (rows, columns)], -1)
        return found

    def windows(self, grid: Grid) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The tokens of an image, window by window, int64 [tokens], and how many each window has, [windows]."""
        side = self.window // self.factor
        rows, columns = np.indices((grid.rows // self.merge, grid.columns // self.merge)).reshape(2, -1)
        order = np.lexsort((columns % side, rows % side, columns // side, rows // side))
        number = (rows // side) * (columns.max() // side + 1) + columns // side
        return order.astype(np.int64), np.unique(number, return_counts=True)[1].astype(np.int64)
