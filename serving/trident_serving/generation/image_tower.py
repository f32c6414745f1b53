"""Images to the vectors that a decoder reads in their tokens' places: a graph, and the thread on which it runs.

A run never has numbers of two images, so their vectors are the same to the last bit in any company. The vectors of the
latest images are kept: a conversation that goes on does not have its images read again.
"""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from trident_serving.artefacts import TOWER
from trident_serving.errors import InvalidRequest, Overloaded
from trident_serving.generation.batch import Embeds
from trident_serving.generation.decoder import IMAGE_EMBEDS
from trident_serving.generation.images import PromptImage, PromptImages
from trident_serving.generation.vision import Feed, VisionSettings
from trident_serving.images.decoding import decode, on_white
from trident_serving.images.preprocessing import Floats
from trident_serving.memory import MEBIBYTE
from trident_serving.runtime.session import open_session
from trident_serving.schema.limits import GenerationLimits

_KEPT_BYTES = 64 * MEBIBYTE  # of vectors
_WAITING_BYTES = 256 * MEBIBYTE  # of files that are not read yet


class ImageTower:
    """Reads images to the vectors that stand in their tokens' places.

    The graph takes what `VisionSettings.runs` says, and gives `image_embeds`, float32 [..., numbers of a token].

    Args:
        folder: the model's artefacts.
    """

    def __init__(self, folder: Path, limits: GenerationLimits) -> None:
        self.settings = VisionSettings.load(folder)
        self._limits = limits
        self._session = open_session(folder / TOWER, "cpu", 0, limits.threads)
        self._kept: OrderedDict[bytes, Floats] = OrderedDict()

    def vectors(self, image: PromptImage) -> Floats:
        """Of all tokens of an image, float32 [tokens, numbers of a token]; called on one thread only.

        Raises:
            InvalidRequest: its pixels can't be decoded.
        """
        found = self._kept.pop(image.digest, None)
        if found is None:
            decoded = decode(image.content, image.name, self._limits.image_bytes, self._limits.image_pixels)
            if decoded.size != image.size:
                raise InvalidRequest(
                    f"{image.name} says how it is turned behind its pixels, which is not read: save it upright"
                )
            found = np.concatenate([self._run(feed) for feed in self.settings.runs(on_white(decoded))])
        self._kept[image.digest] = found
        while len(self._kept) > 1 and sum(vectors.nbytes for vectors in self._kept.values()) > _KEPT_BYTES:
            self._kept.popitem(last=False)
        return found

    def warm_up(self) -> None:
        """Read what is blank: a graph that can't run is not served."""
        self._run(self.settings.blank())

    def _run(self, feed: Feed) -> Floats:
        """The vectors of a run's tokens."""
        (found,) = self._session.run([IMAGE_EMBEDS], feed)
        vectors: Floats = found.reshape(-1, found.shape[-1])
        return vectors

    def embeds(self, images: PromptImages) -> Embeds:
        """The vectors of a prompt's images.

        Raises:
            InvalidRequest: the pixels of one can't be decoded.
        """
        return Embeds(images.positions, np.concatenate([self.vectors(image) for image in images.images]))


class ImageThread:
    """The thread that reads the images of requests, first come, first served.

    Args:
        most: requests that may wait.
    """

    def __init__(self, tower: ImageTower, most: int) -> None:
        self._tower, self._most = tower, most
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="images")
        self._waiting: dict[Future[Embeds], int] = {}  # with the bytes of their files

    def begin(self, images: PromptImages) -> Future[Embeds]:
        """Read the images of a prompt.

        Raises:
            Overloaded: too many requests wait, or their files are too large together.
        """
        waiting, size = list(self._waiting.values()), sum(len(image.content) for image in images.images)
        if len(waiting) >= self._most or (waiting and sum(waiting) + size > _WAITING_BYTES):
            raise Overloaded(
                f"the queue is full: images of {len(waiting)} requests wait ({sum(waiting) / MEBIBYTE:.0f} MiB); try "
                "again later"
            )
        held = [images]  # the executor keeps what it was given until its turn comes, even if it is cancelled
        future = self._thread.submit(lambda: self._tower.embeds(held[0]))
        self._waiting[future] = size

        def ended(done: Future[Embeds]) -> None:
            held.clear()
            self._waiting.pop(done)

        future.add_done_callback(ended)
        return future

    def stop(self) -> None:
        """End the thread; what waits is cancelled."""
        self._thread.shutdown(cancel_futures=True)
