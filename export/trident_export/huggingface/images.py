"""What a folder says of images: how they are resized, cropped and normalized before a model reads them."""

from __future__ import annotations

from typing import Any

from transformers import AutoImageProcessor
from transformers.image_processing_backends import PilBackend
from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil

from trident_export.errors import UnreadableSource, UnsupportedModel
from trident_export.huggingface.folder import HuggingFaceFolder, reading
from trident_serving.images.preprocessing import ImageSettings

_FILE = "preprocessor_config.json"
# What does what `ImageSettings` says. BEiT's own only adds what is for segmentation.
_STEPS = ("resize", "center_crop", "rescale", "normalize", "process_image")
_PREPROCESS = (PilBackend._preprocess, BeitImageProcessorPil._preprocess)
_CHANNELS = 3


def processor(source: HuggingFaceFolder) -> Any:
    """The image processor of transformers, in its form on Pillow.

    Raises:
        UnreadableSource: preprocessor_config.json is missing or damaged.
    """
    with reading(source.path, _FILE):
        return AutoImageProcessor.from_pretrained(source.path, backend="pil", trust_remote_code=False)


def settings(source: HuggingFaceFolder) -> ImageSettings:
    """What the image processor does.

    Raises:
        UnreadableSource: preprocessor_config.json is missing or damaged.
        UnsupportedModel: it does something else.
    """
    found = processor(source)
    kind = type(found)
    same = isinstance(found, PilBackend) and kind._preprocess in _PREPROCESS
    if not same or any(getattr(kind, step) is not getattr(PilBackend, step) for step in _STEPS):
        raise UnsupportedModel(
            f"{source}: {kind.__name__.removesuffix('Pil')} does more with an image than to resize, crop and normalize "
            "it: choose another model"
        )
    with reading(source.path, _FILE):
        named = {name: getattr(found, name, None) for name in found.valid_kwargs.__annotations__}
        asked = found._standardize_kwargs(**named)
        return _settings(source, asked)


def _settings(source: HuggingFaceFolder, asked: dict[str, Any]) -> ImageSettings:
    if asked.get("do_pad"):
        raise UnsupportedModel(f"{source}: {_FILE} asks for do_pad, which is not supported: choose another model")
    size: tuple[int, ...] = ()
    shortest = 0
    if asked["do_resize"]:
        wanted = dict(asked["size"])
        if set(wanted) == {"height", "width"}:
            size = (wanted["height"], wanted["width"])
        elif set(wanted) == {"shortest_edge"}:
            shortest = wanted["shortest_edge"]
        else:
            raise UnsupportedModel(
                f"{source}: {_FILE} has the size {wanted}; known are height and width, or shortest_edge"
            )
    crop = (asked["crop_size"].height, asked["crop_size"].width) if asked.get("do_center_crop") else ()
    if not (crop or size):
        raise UnsupportedModel(
            f"{source}: {_FILE} makes images of different sizes, and the graph reads one: choose another model, or set "
            "its size to height and width, or do_center_crop"
        )
    resample = asked.get("resample")
    mean, deviation = asked.get("image_mean"), asked.get("image_std")
    normalizes = bool(asked["do_normalize"])
    return ImageSettings(
        size=size,
        shortest_edge=shortest,
        resample=2 if resample is None else int(resample),
        crop=crop,
        rescale=float(asked["rescale_factor"]) if asked["do_rescale"] else None,
        mean=channels(source, mean) if normalizes else (),
        deviation=channels(source, deviation) if normalizes else (),
        on_white=bool(asked.get("do_convert_rgb")),
    )


def channels(source: HuggingFaceFolder, values: Any) -> tuple[float, ...]:
    """A number for each channel, of preprocessor_config.json.

    Raises:
        UnreadableSource: there is another number of them.
    """
    found = tuple(map(float, values)) if isinstance(values, list | tuple) else (float(values),) * _CHANNELS
    if len(found) != _CHANNELS:
        raise UnreadableSource(f"{source}: {_FILE} has {len(found)} numbers for {_CHANNELS} channels")
    return found


def size_of(found: ImageSettings) -> tuple[int, int]:
    """Height and width of what a graph reads."""
    height, width = found.crop or found.size
    return height, width
