"""Images without a model: files to pixels, and pixels to what a graph reads, against transformers."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.image_utils import load_image

from trident_export.huggingface import images as image_files
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.measure import pictures
from trident_serving.encoders.images import as_files, pixels_of
from trident_serving.errors import InvalidRequest
from trident_serving.images.decoding import decode
from trident_serving.images.preprocessing import Preprocessor

BYTES, PIXELS = 2**20, 2**19
DRAWN = pictures.drawn(5, 60, 40)


def picture(mode: str = "RGB", kind: str = "PNG", **options: Any) -> bytes:
    return pictures.encoded(Image.fromarray(DRAWN).convert(mode), kind, **options)


def sixteen_bits(**options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(DRAWN[..., 0].astype(np.uint16) * 257).save(file, "PNG", **options)
    return file.getvalue()


def animated(kind: str) -> bytes:
    file = io.BytesIO()
    frames = [Image.fromarray(pictures.drawn(seed, 30, 20)) for seed in range(3)]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=40, lossless=True)
    return file.getvalue()


def header(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and has few pixels of it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    sizes = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", sizes) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


FILES = {
    "rgb": picture(),
    "grey": picture("L"),
    "black and white": picture("1"),
    "palette": picture("P"),
    "clear palette": picture("P", transparency=3),
    "clear grey": picture("L", transparency=3),
    "clear rgb": picture(transparency=tuple(DRAWN[0, 0].tolist())),
    "clear black": picture("1", transparency=0),
    "clear 16 bits": sixteen_bits(transparency=257),
    "palette with alpha": picture("P", transparency=bytes(range(256))),
    "grey with alpha": picture("LA"),
    "alpha": picture("RGBA"),
    "16 bits": sixteen_bits(),
    "jpeg": picture(kind="JPEG"),
    "grey jpeg": picture("L", "JPEG"),
    "cmyk jpeg": picture("CMYK", "JPEG"),
    "progressive jpeg": picture(kind="JPEG", progressive=True),
    "webp": picture(kind="WEBP"),
    "clear webp": picture("RGBA", "WEBP"),
    "animated png": animated("PNG"),
    "animated webp": animated("WEBP"),
    **{f"turned {turn}": picture(kind="JPEG", orientation=turn) for turn in range(2, 9)},
    "turned png": picture(orientation=6),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_load_image(name: str) -> None:
    expected = load_image(Image.open(io.BytesIO(FILES[name])))
    found = decode(FILES[name], "image", BYTES, PIXELS)
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_an_orientation_changes_the_pixels() -> None:
    """What the test above compares is not the same for every file."""
    assert decode(FILES["turned 6"], "image", BYTES, PIXELS).size == (40, 60)
    assert decode(FILES["jpeg"], "image", BYTES, PIXELS).size == (60, 40)
    # transformers' form of 16 bits of grey cuts them off at 255.
    assert np.asarray(decode(FILES["16 bits"], "image", BYTES, PIXELS)).min() == 255


PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTImageProcessorPil", {}),
    "deit": ("DeiTImageProcessorPil", {}),
    "beit": ("BeitImageProcessorPil", {}),
    "clip": ("CLIPImageProcessorPil", {}),
    "siglip": ("SiglipImageProcessorPil", {}),
    "small": ("CLIPImageProcessorPil", {"size": {"shortest_edge": 31}, "crop_size": {"height": 40, "width": 27}}),
    "lanczos": ("ViTImageProcessorPil", {"size": {"height": 50, "width": 31}, "resample": 1}),
    "one number": ("ViTImageProcessorPil", {"image_mean": 0.4, "image_std": 0.3}),
    "not normalized": ("ViTImageProcessorPil", {"do_normalize": False}),
    "not rescaled": ("ViTImageProcessorPil", {"do_rescale": False}),
    "not resized": ("CLIPImageProcessorPil", {"do_resize": False, "crop_size": {"height": 61, "width": 52}}),
    "as it is": ("ViTImageProcessorPil", {"do_rescale": False, "do_normalize": False}),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
@pytest.mark.parametrize("name", PROCESSORS)
def test_what_a_model_reads_is_transformers_to_the_last_bit(name: str, tmp_path: Any) -> None:
    kind, options = PROCESSORS[name]
    made = getattr(transformers, kind)(**options)
    made.save_pretrained(tmp_path)
    settings = image_files.settings(HuggingFaceFolder(tmp_path))
    settings.save(tmp_path)
    read = Preprocessor(type(settings).load(tmp_path), BYTES, PIXELS)
    files = [*pictures.files(8), *(FILES[each] for each in FILES if "clear" in each or "alpha" in each)]
    found = pixels_of(as_files(files), read)
    assert found.dtype == np.float32
    assert found.shape[2:] == image_files.size_of(settings)
    for content, pixels in zip(files, found, strict=True):
        image = load_image(Image.open(io.BytesIO(content)))
        expected = made(images=image, return_tensors="pt")["pixel_values"].float().numpy()
        np.testing.assert_array_equal(pixels[None], expected)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "image[1] is empty: send the bytes of a file"),
        (b"GIF89a" + bytes(40), "image[1] is no PNG, JPEG or WebP image: it begins with b'GIF89a"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image[1] is no PNG, JPEG or WebP image"),
        (picture()[:200], "image[1] can't be decoded: image file is truncated"),
        (picture(kind="JPEG")[:300], "image[1] can't be decoded: Truncated File Read"),
        (picture(kind="WEBP")[:200], "image[1] "),
        (picture()[:60] + b"\0" * 400 + picture()[460:], "image[1] can't be decoded: "),
        (header(900, 900), "image[1] is 900 x 900 pixels, the limit is 524288 pixels"),
        (header(20000, 20000), "image[1] has more than 89478485 pixels, the limit is 524288 pixels"),
        (header(10000, 10000), "image[1] has more than 89478485 pixels"),
        (picture() + bytes(BYTES), "image[1] has 1054"),
        (header(70000, 1), "image[1] is 70000 x 1 pixels, a side may have 65535"),
        (
            picture(kind="JPEG")[:-2] + b"\xff\xda" * 101,
            "image[1] has more than 100 scans: save it again",
        ),
        (
            animated("MPO")[:-2] + b"\xff\xda" * 101,
            "image[1] has more than 100 scans: save it again",
        ),
        (
            pictures.encoded(Image.new("RGB", (9000, 2))),
            "image[1] is 9000 x 2 pixels, and this model would read it at ",
        ),
    ],
)
def test_a_bad_image_is_refused_with_a_sentence(content: bytes, said: str, tmp_path: Any) -> None:
    transformers.CLIPImageProcessorPil().save_pretrained(tmp_path)
    read = Preprocessor(image_files.settings(HuggingFaceFolder(tmp_path)), BYTES, PIXELS)
    with pytest.raises(InvalidRequest) as caught:
        pixels_of(as_files([picture(), content]), read)
    assert str(caught.value).startswith(said)


def test_no_byte_of_a_file_breaks_the_decoder() -> None:
    """A changed byte gives an image or a refusal, and nothing else."""
    random = np.random.default_rng(0)
    refused = 0
    for content in (picture(), picture(kind="JPEG"), picture(kind="WEBP"), FILES["turned 6"], animated("PNG")):
        for _ in range(60):
            changed = bytearray(content)
            for place in random.integers(0, len(changed), 3):
                changed[place] = random.integers(256)
            try:
                decode(bytes(changed), "image", BYTES, PIXELS)
            except InvalidRequest as error:
                refused += 1
                assert str(error).startswith("image ")
    assert refused > 100


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("CLIPImageProcessorPil", {"do_center_crop": False}, "makes images of different sizes"),
        ("ViTImageProcessorPil", {"size": {"shortest_edge": 8, "longest_edge": 9}}, "has the size {"),
        ("ViTImageProcessorPil", {"do_pad": True, "pad_size": {"height": 9, "width": 9}}, "asks for do_pad"),
        ("ConvNextImageProcessorPil", {}, "ConvNextImageProcessor does more with an image than to resize, crop and"),
    ],
)
def test_a_processor_that_does_something_else_is_refused(
    kind: str, options: dict[str, Any], said: str, tmp_path: Any
) -> None:
    getattr(transformers, kind)(**options).save_pretrained(tmp_path)
    with pytest.raises(image_files.UnsupportedModel, match="preprocessor_config.json|ConvNext") as caught:
        image_files.settings(HuggingFaceFolder(tmp_path))
    assert said in str(caught.value)
