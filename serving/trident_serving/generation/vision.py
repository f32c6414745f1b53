"""How a model reads images: what stands for one in a prompt, what its tower is given, and where its tokens are.

There are two kinds. One cuts an image into tiles of one size, each of which has as many tokens. The other reads an
image at its own size, and gives its tokens positions in time, height and width.
Reference: transformers, `processing_idefics3`, `processing_smolvlm`, `processing_qwen2_5_vl`, `get_rope_index`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trident_serving.errors import InvalidRequest
from trident_serving.generation.batch import RopePositions
from trident_serving.generation.media import MediaTokens
from trident_serving.images.patches import PatchSettings
from trident_serving.images.preprocessing import Floats
from trident_serving.images.tiles import Grid, TileSettings
from trident_serving.schema import reading

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_SETTINGS = "vision.json"
Feed = dict[str, NDArray[Any]]


class VisionSettings(ABC):
    """How a model reads images; `vision.json` in the version folder, which the export writes.

    Attributes:
        token: the text of each token that stands for an image.
        token_id: its id.
    """

    token: str
    token_id: int

    @staticmethod
    def load(folder: Path) -> VisionSettings:
        """Read `folder/vision.json`."""
        file = folder / _SETTINGS
        kind = json.loads(file.read_text(encoding="utf-8")).get("kind", TileVision.kind)
        return reading.load(PatchVision if kind == PatchVision.kind else TileVision, file)

    def save(self, folder: Path) -> None:
        """Write `folder/vision.json`."""
        reading.save(cast("DataclassInstance", self), folder / _SETTINGS)

    @abstractmethod
    def grid(self, width: int, height: int) -> Grid:
        """How an image of this size is cut.

        Raises:
            InvalidRequest: it can't be; the message goes on from the image's name.
        """

    @abstractmethod
    def tokens_of(self, grid: Grid) -> int:
        """Tokens that stand for an image, without those around them."""

    @abstractmethod
    def expanded(self, grid: Grid) -> str:
        """What stands in a prompt for an image."""

    @abstractmethod
    def check_marks(self, ids: Sequence[int], media: MediaTokens, grids: Sequence[Grid]) -> None:
        """Refuse a prompt whose tokens of images, beside those that stand for one, are not where its images are.

        Args:
            ids: the prompt's tokens, as many of which stand for images as they have.
            grids: of its images.

        Raises:
            InvalidRequest: one is elsewhere.
        """

    @abstractmethod
    def shown(self, grid: Grid) -> str:
        """How an image is cut, in words."""

    @property
    @abstractmethod
    def most_tokens(self) -> int:
        """Tokens of a prompt that an image takes at most, marks around it included."""

    @property
    @abstractmethod
    def literals(self) -> str:
        """Every text that `expanded` may write, for `ControlTokens`."""

    @abstractmethod
    def pixels(self, image: Image.Image) -> Floats:
        """What transformers' image processor calls the `pixel_values` of an RGB image, [tiles or patches, ...]."""

    @abstractmethod
    def runs(self, image: Image.Image) -> Iterator[Feed]:
        """What the tower is given for an RGB image, run by run; its answers are the image's tokens in order."""

    @abstractmethod
    def blank(self) -> Feed:
        """What the tower can be given to see whether it runs."""

    @abstractmethod
    def rope(self, names: Sequence[str], positions: NDArray[np.int64], grids: Sequence[Grid]) -> RopePositions | None:
        """Positions of a prompt's tokens in time, height and width; None: the model has none.

        Args:
            names: what errors call each image.
            positions: tokens that stand for images, rising.
            grids: of each image.

        Raises:
            InvalidRequest: an image's tokens do not stand together.
        """


@dataclass(frozen=True)
class TileVision(TileSettings, VisionSettings):
    """Tiles of one size: Idefics3 and SmolVLM. The tower takes `pixel_values`, float32 [1, 3, tile, tile].

    Attributes:
        tokens: that a tile has.
        token: the text of each of them.
        token_id: its id.
        around: the text of the token before and behind an image and its tiles.
        whole: the text of the token before the whole image.
    """

    tokens: int
    token: str
    token_id: int
    around: str
    whole: str
    kind: str = "tiles"

    def tokens_of(self, grid: Grid) -> int:
        """See `VisionSettings.tokens_of`."""
        return grid.tiles * self.tokens

    def expanded(self, grid: Grid) -> str:
        """See `VisionSettings.expanded`."""
        tile = self.token * self.tokens
        rows = [
            "".join(f"{self.around}{_place(row, column)}{tile}" for column in range(grid.columns)) + "\n"
            for row in range(grid.rows)
        ]
        return "".join([*rows, "\n" if rows else "", self.around, self.whole, tile, self.around])

    def check_marks(self, ids: Sequence[int], media: MediaTokens, grids: Sequence[Grid]) -> None:
        """See `VisionSettings.check_marks`; `expanded` writes all of them."""
        media.check_order(ids, "".join(map(self.expanded, grids)))

    def shown(self, grid: Grid) -> str:
        """See `VisionSettings.shown`."""
        return f"into {grid.tiles} tiles"

    @property
    def most_tokens(self) -> int:
        """Those of its tiles, and the marks and lines around them."""
        grid = self.most_tiles()
        return grid.tiles * (self.tokens + 2) + grid.rows + 2

    @property
    def literals(self) -> str:
        """See `VisionSettings.literals`."""
        grid = self.most_tiles()
        places = [_place(row, column) for row in range(grid.rows) for column in range(grid.columns)]
        return "\0".join([self.token, self.around, self.whole, *places])

    def pixels(self, image: Image.Image) -> Floats:
        """See `VisionSettings.pixels`."""
        return np.stack(list(self.tiles(image)))

    def runs(self, image: Image.Image) -> Iterator[Feed]:
        """A tile is a run of its own, so that its vectors do not depend on how many there are."""
        for tile in self.tiles(image):
            yield {"pixel_values": tile[None]}

    def blank(self) -> Feed:
        """A grey tile."""
        return {"pixel_values": np.zeros((1, 3, self.tile, self.tile), np.float32)}

    def rope(self, names: Sequence[str], positions: NDArray[np.int64], grids: Sequence[Grid]) -> None:
        """A token's position is its place in the text."""
        return


def _place(row: int, column: int) -> str:
    return f"<row_{row + 1}_col_{column + 1}>"


@dataclass(frozen=True)
class PatchVision(PatchSettings, VisionSettings):
    """Images at their own size: Qwen2-VL and Qwen2.5-VL. A grid has rows and columns of patches.

    The tower takes, of one image:

        pixel_values     float32 [patches, numbers of a patch]
        patch_positions  int64   [patches, 2]             row and column of each
        token_order      int64   [tokens]                 which of the tokens, as the tower has them, is each
        window_patches   int64   [windows, longest]       the patches of each window; a shorter one has its last again
        window_lengths   int64   [windows]                how many each has
        window_places    int64   [patches]                where each is in these windows, one after another

    and the patches window by window; the last three only where some layers attend in windows.
    """

    token: str
    token_id: int
    kind: str = "patches"

    def tokens_of(self, grid: Grid) -> int:
        """See `VisionSettings.tokens_of`."""
        return self.tokens(grid)

    def expanded(self, grid: Grid) -> str:
        """See `VisionSettings.expanded`."""
        return self.token * self.tokens(grid)

    def check_marks(self, ids: Sequence[int], media: MediaTokens, grids: Sequence[Grid]) -> None:
        """See `VisionSettings.check_marks`; the chat template, or a text, writes those around an image."""
        media.check_beside(ids, self.token_id)

    def shown(self, grid: Grid) -> str:
        """See `VisionSettings.shown`."""
        return f"at {grid.columns * self.patch} x {grid.rows * self.patch} pixels"

    @property
    def most_tokens(self) -> int:
        """Those of the image and the two that a chat template puts around it."""
        return self.most_image_tokens + 2

    @property
    def literals(self) -> str:
        """See `VisionSettings.literals`."""
        return self.token

    def pixels(self, image: Image.Image) -> Floats:
        """See `VisionSettings.pixels`."""
        return self.patches(image)

    def runs(self, image: Image.Image) -> Iterator[Feed]:
        """An image is a run of its own."""
        yield self._feed(self.patches(image), self.grid(image.width, image.height))

    def blank(self) -> Feed:
        """One grey token."""
        numbers = 3 * self.frames * self.patch**2
        return self._feed(np.zeros((self.merge**2, numbers), np.float32), Grid(self.merge, self.merge))

    def _feed(self, patches: Floats, grid: Grid) -> Feed:
        positions, merged = self.positions(grid), self.merge**2
        order = np.arange(self.tokens(grid))
        more: Feed = {}
        if self.window:
            order, counts = self.windows(grid)
            lengths = counts * merged
            begins = np.cumsum(lengths) - lengths
            places = np.arange(lengths.max())
            inside = places < lengths[:, None]
            more = {
                "window_patches": begins[:, None] + np.minimum(places, lengths[:, None] - 1),
                "window_lengths": lengths,
                "window_places": np.flatnonzero(inside),
            }
        rows = (order[:, None] * merged + np.arange(merged)).reshape(-1)
        return {
            "pixel_values": patches[rows],
            "patch_positions": positions[rows],
            "token_order": np.argsort(order),
            **more,
        }

    def rope(self, names: Sequence[str], positions: NDArray[np.int64], grids: Sequence[Grid]) -> RopePositions:
        """See `VisionSettings.rope`.

        The tokens of an image have one position in time, and behind it the text goes on from the largest of its
        positions.
        """
        parts: list[NDArray[np.int64]] = []
        end = position = taken = 0  # tokens so far, the next one's position, tokens of images so far
        for name, grid in zip(names, grids, strict=True):
            rows, columns = grid.rows // self.merge, grid.columns // self.merge
            first, last = positions[taken], positions[taken + rows * columns - 1]
            taken += rows * columns
            if last - first != rows * columns - 1:
                raise InvalidRequest(
                    f"the prompt's {rows * columns} tokens of {self.token} for {name} do not stand together"
                )
            text = np.arange(first - end) + position
            position += int(first) - end
            parts += [np.broadcast_to(text, (3, len(text))), np.indices((1, rows, columns)).reshape(3, -1) + position]
            position += max(rows, columns)
            end = int(last) + 1
        return RopePositions(np.concatenate(parts, axis=1), position - end)
