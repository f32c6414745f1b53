"""Images in prompts: the files that a request sends, and the tokens that stand for them.

A file's header says how an image is cut, so how many tokens it has; its pixels are decoded later, see `image_tower`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trident_serving.errors import InvalidRequest
from trident_serving.generation.batch import RopePositions
from trident_serving.generation.vision import VisionSettings
from trident_serving.images.decoding import upright_size
from trident_serving.images.tiles import Grid
from trident_serving.schema.limits import GenerationLimits
from trident_serving.text import numbered

IMAGE, IMAGE_URL = "image", "image_url"  # types of parts of a message
PARTS = (IMAGE, IMAGE_URL)
_DATA_URL = re.compile(r"data:[^,;]{0,80}(;[^,;]{0,80}){0,4};base64,", re.IGNORECASE)
_SHOWN = 60  # characters of an address


@dataclass(frozen=True)
class PromptImage:
    """An image of a request whose header was read.

    Attributes:
        name: what errors call it.
        content: the file.
        digest: of the file, by which prefixes of prompts are told apart.
        size: width and height.
    """

    name: str
    content: bytes
    digest: bytes
    size: tuple[int, int]
    grid: Grid


@dataclass(frozen=True)
class PromptImages:
    """The images of a prompt.

    Attributes:
        positions: tokens of the prompt that stand for images, rising.
        begins: for each image its first such token, and its digest.
        rope: positions in time, height and width; None: the model has none.
    """

    images: tuple[PromptImage, ...]
    positions: NDArray[np.int64]
    begins: tuple[tuple[int, bytes], ...]
    rope: RopePositions | None = None


class ImageReader:
    """What requests send of images: files, and parts of messages.

    Args:
        settings: of the model.
        limits: of the model; at least one image.
    """

    def __init__(self, settings: VisionSettings, limits: GenerationLimits) -> None:
        self.settings, self._limits = settings, limits

    def files(self, tensor: NDArray[Any] | None) -> list[tuple[str, bytes]]:
        """Names and contents of the files in the `images` tensor, which holds their bytes or data URLs.

        Raises:
            InvalidRequest: an element is no file.
        """
        contents = [] if tensor is None else tensor.reshape(-1).tolist()
        names = numbered("images", len(contents))
        return [(name, _content(name, each)) for name, each in zip(names, contents, strict=True)]

    def take(
        self, messages: Sequence[Mapping[str, Any]], files: Sequence[tuple[str, bytes]]
    ) -> tuple[list[dict[str, Any]], list[tuple[str, bytes]]]:
        """Messages whose image parts only say where an image is, and the files of these parts in order.

        A part of type `image` is the next of the files, one of type `image_url` holds its own.

        Raises:
            InvalidRequest: there are more files than parts or fewer, or a part holds no image.
        """
        found: list[tuple[str, bytes]] = []
        waiting = list(files)
        taken = []
        for index, message in enumerate(messages):
            content = message.get("content")
            if not isinstance(content, list):
                taken.append(dict(message))
                continue
            parts = []
            for place, part in enumerate(content):
                where = f"messages[{index}].content[{place}]"
                if part.get("type", "text") not in PARTS:
                    parts.append(part)
                    continue
                if part["type"] == IMAGE_URL:
                    found.append((where, _from_url(part, where)))
                elif waiting:
                    found.append(waiting.pop(0))
                else:
                    raise InvalidRequest(
                        f"{where} is an image, and images holds {len(files)} files: it must hold one for each part of "
                        f"type {IMAGE!r}"
                    )
                parts.append({"type": IMAGE})
            taken.append({**message, "content": parts})
        if waiting:
            raise InvalidRequest(
                f"images holds {len(files)} files, and messages has {len(files) - len(waiting)} parts of type {IMAGE!r}"
            )
        return taken, found

    def read(self, files: Sequence[tuple[str, bytes]]) -> list[PromptImage]:
        """Files as images, by their headers.

        Raises:
            InvalidRequest: there are too many, or one is no image or too large.
        """
        if len(files) > self._limits.images:
            raise InvalidRequest(f"the request has {len(files)} images, the limit is {self._limits.images}")
        return [self._read(name, content) for name, content in files]

    def placed(self, ids: Sequence[int], images: Sequence[PromptImage]) -> PromptImages | None:
        """Where the images of a prompt are; None: it has none.

        A token of an image without one would be computed as a word that the model has never read.

        Args:
            ids: the prompt's tokens.

        Raises:
            InvalidRequest: its tokens are not those of these images.
        """
        settings = self.settings
        positions = np.flatnonzero(np.asarray(ids, np.int64) == settings.token_id)
        sizes = [settings.tokens_of(image.grid) for image in images]
        if len(positions) != sum(sizes):
            raise InvalidRequest(
                f"the prompt has {len(positions)} tokens of {settings.token}, its {len(images)} images have "
                f"{sum(sizes)}: a text must not hold {settings.token} but where an image goes"
            )
        if not images:
            return None
        firsts = np.cumsum([0, *sizes[:-1]])
        begins = zip(positions[firsts].tolist(), (image.digest for image in images), strict=True)
        rope = settings.rope([image.name for image in images], positions, [image.grid for image in images])
        return PromptImages(tuple(images), positions.astype(np.int64), tuple(begins), rope)

    def tokens(self, images: Sequence[PromptImage]) -> int:
        """That stand for images in a prompt, without those around them."""
        return sum(self.settings.tokens_of(image.grid) for image in images)

    def _read(self, name: str, content: bytes) -> PromptImage:
        size = upright_size(content, name, self._limits.image_bytes, self._limits.image_pixels)
        try:
            grid = self.settings.grid(*size)
        except InvalidRequest as error:
            raise InvalidRequest(f"{name}: {error}") from None
        return PromptImage(name, content, hashlib.sha256(content).digest(), size, grid)


def _content(name: str, value: object) -> bytes:
    if not isinstance(value, bytes):
        raise InvalidRequest(f"{name} must be the bytes of a file, found {type(value).__name__}")
    # Triton's JSON endpoints can't carry bytes, and no image begins like this.
    return _decoded(value.decode("latin-1"), name) if value[:5].lower() == b"data:" else value


def _from_url(part: Mapping[str, Any], where: str) -> bytes:
    """The file in a part as chat APIs have it: `{"type": "image_url", "image_url": {"url": "data:..."}}`."""
    named = part.get(IMAGE_URL)
    url = named.get("url") if isinstance(named, Mapping) else named
    if not isinstance(url, str):
        raise InvalidRequest(
            f'{where} must be like {{"type": "image_url", "image_url": {{"url": "data:image/png;base64,..."}}}}'
        )
    return _decoded(url, where)


def _decoded(url: str, where: str) -> bytes:
    """The file in a data URL."""
    match = _DATA_URL.match(url)
    if match is None:
        said = "holds no base64" if url[:5].lower() == "data:" else "is an address, and this server fetches none"
        raise InvalidRequest(
            f"{where}: {url[:_SHOWN]!r} {said}: send the image itself, as data:image/png;base64,... of its bytes"
        )
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"{where} is no base64: {error}") from None
