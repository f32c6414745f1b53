"""The bytes of an image file to an upright RGB image, as transformers' `load_image` gives it: Pillow decodes.

Only three of Pillow's parsers are ever tried. An image's size stands in its header, and one that is too large is
refused before a pixel is decoded. Of an animation the first frame is read.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from trident_serving.errors import InvalidRequest
from trident_serving.schema.limits import MOST_PIXELS

FORMATS = ("PNG", "JPEG", "WEBP")
NAMED = "PNG, JPEG or WebP"
_LONGEST_REASON = 120
_LONGEST_SIDE = 65_535  # of JPEG; a line of 33 million pixels takes six seconds to resize, as many in a square one half
_SCAN, _MOST_SCANS = b"\xff\xda", 100  # of JPEG: each is decoded over the whole image, and cameras write ten at most
_ORIENTATION = 0x0112  # of EXIF
_ON_ITS_SIDE = (5, 6, 7, 8)


def decode(content: bytes, name: str, max_bytes: int, max_pixels: int) -> Image.Image:
    """The image of a file, RGB, turned as its EXIF orientation says.

    Args:
        content: the file.
        name: what errors call it.
        max_bytes: of the largest file that is decoded at all.
        max_pixels: of the largest image, at most `MOST_PIXELS`.

    Raises:
        InvalidRequest: it is no image of a known format, is broken, or is too large.
    """
    with _opened(content, name, max_bytes, max_pixels) as file:
        return ImageOps.exif_transpose(file).convert("RGB")


def on_white(image: Image.Image) -> Image.Image:
    """An image of `decode` whose pixels of the colour that its file calls transparent are white.

    Those image processors of transformers that convert to RGB do so. Palettes, greys and RGB may have such a colour,
    and Pillow keeps it beside the RGB pixels; what an alpha channel says is dropped before.
    """
    colour = image.info.get("transparency")
    if colour is None:
        return image
    pixels = np.array(image)
    pixels[(pixels == colour).all(axis=-1)] = 255
    return Image.fromarray(pixels)


def upright_size(content: bytes, name: str, max_bytes: int, max_pixels: int) -> tuple[int, int]:
    """Width and height of the image that `decode` gives, from what stands before its pixels.

    Raises:
        InvalidRequest: see `decode`; pixels that are broken are not seen.
    """
    with _opened(content, name, max_bytes, max_pixels) as file:
        # That of the base class: PNG's own decodes all pixels to find what stands behind them.
        turned = Image.Image.getexif(file).get(_ORIENTATION, 1) in _ON_ITS_SIDE
        return (file.height, file.width) if turned else (file.width, file.height)


@contextmanager
def _opened(content: bytes, name: str, max_bytes: int, max_pixels: int) -> Iterator[Image.Image]:
    """An image whose pixels are not decoded yet; whatever is raised about it becomes a sentence."""
    if not content:
        raise InvalidRequest(f"{name} is empty: send the bytes of a file")
    if len(content) > max_bytes:
        raise InvalidRequest(f"{name} has {len(content)} bytes, the limit is {max_bytes} bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a file says about itself
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as file:
                width, height = file.size
                if max(width, height) > _LONGEST_SIDE:
                    raise InvalidRequest(f"{name} is {width} x {height} pixels, a side may have {_LONGEST_SIDE}")
                # Its class, since one that says that it holds several images has the format MPO.
                if isinstance(file, JpegImageFile) and content.count(_SCAN) > _MOST_SCANS:
                    raise InvalidRequest(f"{name} has more than {_MOST_SCANS} scans: save it again")
                if width * height > max_pixels:
                    raise InvalidRequest(f"{name} is {width} x {height} pixels, the limit is {max_pixels} pixels")
                yield file
        except UnidentifiedImageError:
            raise InvalidRequest(f"{name} is no {NAMED} image: it begins with {content[:12]!r}") from None
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise InvalidRequest(
                f"{name} has more than {MOST_PIXELS} pixels, the limit is {max_pixels} pixels"
            ) from None
        except (InvalidRequest, MemoryError):
            raise
        except Exception as error:  # Pillow has no class for it: a broken file raises whatever its parser meets
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InvalidRequest(f"{name} can't be decoded: {reason[:_LONGEST_REASON]}") from None
