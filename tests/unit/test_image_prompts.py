"""Images in prompts without a model: the text and the tokens of an image, and what requests send."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import weakref
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from tests import tiny_models
from trident_export.measure import pictures
from trident_serving.errors import InvalidRequest, Overloaded
from trident_serving.generation.batch import Embeds, SlotTokens, pack
from trident_serving.generation.image_tower import ImageThread, ImageTower
from trident_serving.generation.images import ImageReader, PromptImages
from trident_serving.generation.request import RequestParser
from trident_serving.generation.vision import TileVision, VisionSettings
from trident_serving.images.decoding import decode, upright_size
from trident_serving.images.tiles import Grid
from trident_serving.runtime.tokenizer import TextTokenizer
from trident_serving.schema.limits import GenerationLimits
from trident_serving.text import encode_texts

SETTINGS = TileVision(
    longest_edge=64,
    tile=32,
    split=True,
    resample=1,
    rescale=1 / 255,
    mean=(0.5, 0.5, 0.5),
    deviation=(0.5, 0.5, 0.5),
    tokens=2,
    token="<image>",
    token_id=7,
    around="<a>",
    whole="<g>",
)
TOKENIZER = TextTokenizer(tiny_models.byte_level_tokenizer().backend_tokenizer)
READER = ImageReader(SETTINGS, GenerationLimits(images=2))
FILES = [pictures.encoded(Image.fromarray(pictures.drawn(seed, 60, 40))) for seed in (1, 2)]


def test_what_stands_for_an_image() -> None:
    assert SETTINGS.expanded(Grid(0, 0)) == "<a><g><image><image><a>"
    assert SETTINGS.expanded(Grid(2, 1)) == (
        "<a><row_1_col_1><image><image>\n<a><row_2_col_1><image><image>\n\n<a><g><image><image><a>"
    )
    assert SETTINGS.most_tiles() == Grid(2, 2)
    assert SETTINGS.most_tokens == 5 * 4 + 4
    assert SETTINGS.literals.split("\0")[3:] == ["<row_1_col_1>", "<row_1_col_2>", "<row_2_col_1>", "<row_2_col_2>"]


def test_settings_of_an_older_export_are_read(tmp_path: Path) -> None:
    """When there was one kind of them, their file named none."""
    SETTINGS.save(tmp_path)
    (file,) = tmp_path.iterdir()
    written = json.loads(file.read_text())
    assert written.pop("kind") == "tiles"
    file.write_text(json.dumps(written))
    assert VisionSettings.load(tmp_path) == SETTINGS


def test_parts_take_files_in_order() -> None:
    url = f"data:image/png;base64,{base64.b64encode(FILES[1]).decode()}"
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "image"}, {"text": "and"}, {"type": "image_url", "image_url": url}]},
        {"role": "user", "content": [{"type": "image", "image": "ignored"}]},
    ]
    taken, files = READER.take(messages, [("images[0]", b"1"), ("images[1]", b"3")])
    assert files == [("images[0]", b"1"), ("messages[1].content[2]", FILES[1]), ("images[1]", b"3")]
    assert [message["content"] for message in taken] == [
        "Be short.",
        [{"type": "image"}, {"text": "and"}, {"type": "image"}],
        [{"type": "image"}],
    ]
    with pytest.raises(InvalidRequest, match="images holds 3 files, and messages has 2 parts of type 'image'"):
        READER.take(messages, [("images", b"")] * 3)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://192.168.0.1/a.png", "'http://192.168.0.1/a.png' is an address, and this server fetches none"),
        ("file:///etc/passwd", "is an address, and this server fetches none"),
        ("data:image/png,abc", "'data:image/png,abc' holds no base64"),
        ("data:;base64,a*b", "messages.0..content.0. is no base64"),
        (3, "must be like"),
    ],
)
def test_addresses_are_not_fetched(url: Any, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        READER.take([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}], [])


def test_files_are_bytes_or_data_urls() -> None:
    given = np.array([FILES[0], b"data:image/png;base64," + base64.b64encode(FILES[1])], np.object_)
    assert READER.files(given) == [("images[0]", FILES[0]), ("images[1]", FILES[1])]
    assert READER.files(None) == []
    with pytest.raises(InvalidRequest, match="images is no base64"):
        READER.files(np.array([b"data:;base64,a*b"], np.object_))


def test_where_images_are() -> None:
    images = READER.read([("images[0]", FILES[0]), ("images[1]", FILES[1])])
    assert [image.grid for image in images] == [Grid(2, 2)] * 2
    assert READER.tokens(images) == 20
    ids = [1, *[7] * 10, 3, *[7] * 10, 4]
    placed = READER.placed(ids, images)
    assert placed is not None
    assert placed.begins == ((1, hashlib.sha256(FILES[0]).digest()), (12, hashlib.sha256(FILES[1]).digest()))
    assert placed.positions.tolist() == [*range(1, 11), *range(12, 22)]
    with pytest.raises(InvalidRequest, match="the prompt has 21 tokens of <image>, its 2 images have 20"):
        READER.placed([*ids, 7], images)
    assert READER.placed([1, 2, 3], []) is None
    with pytest.raises(InvalidRequest, match="the prompt has 1 tokens of <image>, its 0 images have 0: a text"):
        READER.placed([1, 7, 3], [])
    with pytest.raises(InvalidRequest, match="the request has 3 images, the limit is 2"):
        READER.read([("images", FILES[0])] * 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_headers_tell_the_upright_size(kind: str, orientation: int) -> None:
    content = pictures.encoded(Image.fromarray(pictures.drawn(1, 31, 17)), kind, orientation)
    size = upright_size(content, "image", 2**20, 2**20)
    assert size == decode(content, "image", 2**20, 2**20).size == ((17, 31) if orientation > 4 else (31, 17))


def test_vectors_go_where_their_tokens_are() -> None:
    vectors = np.arange(8, dtype=np.float32).reshape(4, 2)
    embeds = Embeds(np.array([1, 2, 5, 6]), vectors)
    first, second = embeds.part(0, 3), embeds.part(3, 6)
    assert first is not None
    assert second is not None
    assert (first.positions.tolist(), second.positions.tolist()) == ([1, 2], [2])
    assert embeds.part(3, 5) is None
    batch = pack([SlotTokens(0, 9, [4], embeds=None), SlotTokens(2, 0, [1, 7, 7], embeds=first)])
    np.testing.assert_array_equal(batch.image_embeds, vectors[:2])
    np.testing.assert_array_equal(batch.image_positions, [[0, 2], [0, 3]])
    # One alone would be summed in another order than several.
    batch = pack([SlotTokens(0, 3, [1, 2, 7], embeds=second)])
    np.testing.assert_array_equal(batch.image_embeds, vectors[[2, 2]])
    np.testing.assert_array_equal(batch.image_positions, [[0, 2], [0, 2]])
    assert pack([SlotTokens(0, 0, [1, 2])]).image_embeds.shape == (0, 0)


def test_only_images_may_be_large() -> None:
    """A body of two million parts held up everybody: what is no image counts as text."""
    parser = RequestParser(TOKENIZER, None, GenerationLimits(images=2, context=128), images=READER)

    def refused(content: list[dict[str, Any]]) -> str:
        messages = json.dumps([{"role": "user", "content": content}])
        with pytest.raises(InvalidRequest) as raised:
            parser.parse({"messages": encode_texts([messages])[None]})
        return str(raised.value)

    said = r"messages has \d+ bytes, at least \d+ tokens, and the model's context is 128 tokens"
    assert re.match(said, refused([{"type": "text", "text": ""}] * 100_000))
    assert re.match(said, refused([{"type": "text", "text": "x" * 2**20}]))
    assert re.match(said, refused([{"type": "text", "text": 'x data:"' * 2**17}]))
    url = "data:image/png;base64," + base64.b64encode(bytes(2**20)).decode()
    assert refused([{"type": "image_url", "image_url": {"url": url}}]).startswith("messages needs a model with a chat")


def test_a_request_that_was_given_up_holds_no_files() -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Tower:
        def embeds(self, images: PromptImages) -> Embeds:
            begun.set()
            go_on.wait(20)
            return Embeds(images.positions, np.zeros((0, 2), np.float32))

    def prompt() -> PromptImages:
        placed = READER.placed([1, *[7] * 10], READER.read([("images[0]", FILES[0])]))
        assert placed is not None
        return placed

    thread = ImageThread(cast("ImageTower", Tower()), 3)
    try:
        first = thread.begin(prompt())
        assert begun.wait(20)
        given_up = prompt()
        gone, future = weakref.ref(given_up), thread.begin(given_up)
        del given_up
        assert gone() is not None
        assert future.cancel()
        assert gone() is None
        others = [thread.begin(prompt()), thread.begin(prompt())]
        with pytest.raises(Overloaded, match="the queue is full: images of 3 requests wait"):
            thread.begin(prompt())
    finally:
        go_on.set()
        thread.stop()
    assert first.result(20).vectors.shape == (0, 2)
    assert all(each.done() for each in others)
