"""Images at their own size without a model: their patches, windows and positions, beside transformers' functions."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from trident_serving.errors import InvalidRequest
from trident_serving.generation.batch import RopePositions, Rows, SlotTokens, pack, rope_positions
from trident_serving.generation.vision import PatchVision, VisionSettings
from trident_serving.images.tiles import Grid

SETTINGS = PatchVision(
    patch=14,
    merge=2,
    frames=2,
    window=112,
    min_pixels=3136,
    max_pixels=50 * 784,
    resample=3,
    rescale=1 / 255,
    mean=(0.5, 0.5, 0.5),
    deviation=(0.5, 0.5, 0.5),
    token="<|image_pad|>",
    token_id=7,
)
SIDES = (1, 5, 13, 28, 29, 41, 97, 140, 333, 1000, 4000)


@pytest.mark.parametrize("tokens", [(4, 4), (4, 50), (1, 1000), (256, 1280)])
def test_sizes_and_their_bound(tokens: tuple[int, int]) -> None:
    settings = dataclasses.replace(SETTINGS, min_pixels=tokens[0] * 784, max_pixels=tokens[1] * 784)
    most = 0
    for height, width in itertools.product(SIDES, SIDES):
        if max(height, width) / min(height, width) > 200:
            with pytest.raises(InvalidRequest, match=f"it is {width} x {height} pixels, and this model reads images"):
                settings.grid(width, height)
            continue
        expected = smart_resize(height, width, 28, settings.min_pixels, settings.max_pixels)
        grid = settings.grid(width, height)
        assert (grid.rows * 14, grid.columns * 14) == expected
        most = max(most, settings.tokens_of(grid))
    assert most <= settings.most_image_tokens
    assert settings.most_tokens == settings.most_image_tokens + 2
    assert settings.most_image_tokens <= max(tokens[1], 14.2 * tokens[1] ** 0.5, 15 * tokens[0] ** 0.5 + tokens[0] + 2)


@pytest.mark.parametrize("rows", [2, 8, 10, 18])
@pytest.mark.parametrize("columns", [2, 6, 16, 20])
def test_windows_and_positions_are_transformers(rows: int, columns: int) -> None:
    grid = Grid(rows, columns)
    thw = torch.tensor([[1, rows, columns]])
    order, counts = SETTINGS.windows(grid)
    expected, ends = get_vision_window_index(thw, spatial_merge_size=2, window_size=112, patch_size=14)
    np.testing.assert_array_equal(order, expected.numpy())
    np.testing.assert_array_equal(np.cumsum([0, *counts * 4]), ends.numpy())
    np.testing.assert_array_equal(SETTINGS.positions(grid), get_vision_position_ids(thw, 2).numpy())


def test_what_a_tower_is_given() -> None:
    """Each patch is in one window, in its place, and a short window has its last patch again."""
    grid = Grid(4, 20)
    settings = dataclasses.replace(SETTINGS, min_pixels=784)
    patches = np.arange(80, dtype=np.float32)[:, None].repeat(3 * 2 * 14 * 14, axis=1)
    feed = settings._feed(patches, grid)
    assert feed["window_lengths"].tolist() == [32, 32, 16]
    assert feed["window_patches"].shape == (3, 32)
    np.testing.assert_array_equal(feed["window_patches"].reshape(-1)[feed["window_places"]], np.arange(80))
    assert set(feed["window_patches"][2, 16:].tolist()) == {79}
    # The tokens, put in order again, are those of the image.
    firsts = feed["pixel_values"][::4, 0][feed["token_order"]]
    np.testing.assert_array_equal(firsts, np.arange(0, 80, 4))
    whole = dataclasses.replace(settings, window=0)._feed(patches, grid)
    assert list(whole) == ["pixel_values", "patch_positions", "token_order"]
    np.testing.assert_array_equal(whole["pixel_values"], patches)
    assert settings.blank()["pixel_values"].shape == (4, 3 * 2 * 14 * 14)


def test_settings_are_kept(tmp_path: Path) -> None:
    SETTINGS.save(tmp_path)
    assert VisionSettings.load(tmp_path) == SETTINGS


def _rope_index(ids: list[int], grids: list[Grid]) -> tuple[torch.Tensor, int]:
    tokens = torch.tensor([ids])
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=4)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    model.get_vision_position_ids = lambda *a, **o: Qwen2_5_VLModel.get_vision_position_ids(model, *a, **o)
    found, delta = Qwen2_5_VLModel.get_rope_index(
        model,
        tokens,
        mm_token_type_ids=(tokens == 7).int(),
        image_grid_thw=torch.tensor([[1, *grid] for grid in grids]),
    )
    return found[:, 0], int(delta)


@pytest.mark.parametrize(
    "grids",
    [[Grid(4, 6)], [Grid(2, 2), Grid(8, 4)], [Grid(2, 40), Grid(40, 2), Grid(6, 6)]],
)
@pytest.mark.parametrize("first", [0, 3])
def test_positions_in_time_height_and_width(grids: list[Grid], first: int) -> None:
    ids = [1] * first
    for index, grid in enumerate(grids):
        ids += [7] * SETTINGS.tokens_of(grid) + [2] * (index + 1)
    positions = np.flatnonzero(np.array(ids) == 7)
    rope = SETTINGS.rope(["images"] * len(grids), positions, grids)
    expected, delta = _rope_index(ids, grids)
    assert rope.offset == delta < 0
    np.testing.assert_array_equal(rope.part(0, len(ids)), expected.numpy())
    for start, end in ((0, 5), (2, 6), (5, len(ids)), (len(ids) - 1, len(ids))):
        np.testing.assert_array_equal(rope.part(start, end), expected.numpy()[:, start:end])
    later = rope.part(len(ids), len(ids) + 2)
    np.testing.assert_array_equal(later, [[len(ids) + delta, len(ids) + 1 + delta]] * 3)


def test_an_images_tokens_stand_together() -> None:
    ids = np.array([7, 7, 1, 7, 7, 7, 7, 7, 7])
    with pytest.raises(InvalidRequest, match="the prompt's 4 tokens of <.image_pad.> for images.0. do not stand"):
        SETTINGS.rope(["images[0]", "images[1]"], np.flatnonzero(ids == 7), [Grid(4, 4), Grid(4, 4)])


def test_positions_of_a_run() -> None:
    """A text's are its places, and the padding of a run has those of its last token."""
    rope = RopePositions(np.array([[0, 1, 1, 1, 1], [0, 1, 1, 2, 2], [0, 1, 2, 1, 2]]), -2)
    items = [
        SlotTokens(0, 9, [4, 5]),
        SlotTokens(1, 3, [7, 7, 2], rope=rope.part(3, 6)),
        SlotTokens(3, 8, [9], rope=rope.part(8, 9)),
    ]
    expected = [[9, 10, 1, 1, 3, 6], [9, 10, 2, 2, 3, 6], [9, 10, 1, 2, 3, 6]]
    np.testing.assert_array_equal(rope_positions(items, pack(items)), expected)
    alone = [SlotTokens(0, 8, [9], rope=rope.part(8, 9))]
    np.testing.assert_array_equal(rope_positions(alone, pack(alone, rows=Rows(2, 1))), [[6, 6]] * 3)
