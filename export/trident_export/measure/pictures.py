"""Pictures that are drawn by a formula: what gates and tests of vision look at. They show shapes, and mean nothing.

Gradients and waves of colours, with discs, bars and noise, in several sizes and file formats.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

# Width and height; one is narrow, one smaller than what a model reads.
SIZES = ((320, 240), (224, 224), (97, 181), (480, 320), (31, 45), (500, 60), (256, 384))
_ORIENTATION = 0x0112  # of EXIF


def drawn(seed: int, width: int, height: int) -> Pixels:
    """A picture, uint8 [height, width, 3], always the same for a seed."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width] / max(width, height)
    found = np.empty((height, width, 3))
    for channel in range(3):
        slope, waves = random.uniform(-1, 1, 2), random.uniform(2, 40, 2)
        wave = np.sin(waves[0] * rows + random.uniform(0, 6)) * np.cos(waves[1] * columns + random.uniform(0, 6))
        found[..., channel] = 0.5 + 0.3 * (slope[0] * rows + slope[1] * columns) + 0.25 * random.uniform() * wave
    longest = max(width, height)
    for _ in range(random.integers(1, 7)):
        colour, middle, radius = random.uniform(0, 1, 3), random.uniform(0, 1, 2), random.uniform(0.05, 0.3)
        away = np.stack([rows - middle[0] * height / longest, columns - middle[1] * width / longest])
        shape = np.hypot(*away) < radius if random.integers(2) else np.abs(away).max(axis=0) < radius
        found[shape] = 0.25 * found[shape] + 0.75 * colour
    found += random.uniform(0, 0.08) * random.standard_normal(found.shape)
    return (255 * found.clip(0, 1)).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", orientation: int = 1, **options: Any) -> bytes:
    """An image as the bytes of a file.

    Args:
        orientation: EXIF's, 1 to 8.
    """
    file = io.BytesIO()
    if orientation != 1:
        exif = Image.Exif()
        exif[_ORIENTATION] = orientation
        options = {**options, "exif": exif}
    image.save(file, format=kind, **options)
    return file.getvalue()


@functools.cache
def files(count: int) -> tuple[bytes, ...]:
    """Files of different sizes, formats and colours."""
    kinds: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
        ("RGB", "JPEG", {"quality": 90}),
        ("RGB", "PNG", {}),
        ("RGB", "WEBP", {"quality": 80}),
        ("L", "PNG", {}),
        ("RGB", "JPEG", {"quality": 75, "orientation": 6}),
        ("P", "PNG", {}),
        ("RGBA", "PNG", {}),
    )
    made = []
    for seed in range(count):
        mode, kind, options = kinds[seed % len(kinds)]
        image = Image.fromarray(drawn(seed, *SIZES[(seed + seed // len(kinds)) % len(SIZES)]))
        made.append(encoded(image.convert(mode), kind, **options))
    return tuple(made)
