"""What a folder says of images that are read beside text: how they are cut, and the tokens that stand for them.

There are two kinds of models, see `trident_serving.generation.vision`. Those of type `idefics3` and `smolvlm` have a
SigLIP tower whose patches a connector makes tokens of; those of type `qwen2_vl` and `qwen2_5_vl` a tower that reads an
image at its own size, and a decoder whose tokens have positions in time, height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from trident_export.errors import ModelsFileError, UnreadableSource, UnsupportedArchitecture, UnsupportedModel
from trident_export.huggingface.folder import HuggingFaceFolder, reading
from trident_export.huggingface.images import channels, processor
from trident_serving.generation.vision import PatchVision, TileVision, VisionSettings

_TILES, _PATCHES = ("idefics3", "smolvlm"), ("qwen2_vl", "qwen2_5_vl")
TYPES = (*_TILES, *_PATCHES)
_TILE_PROCESSORS = (Idefics3ImageProcessorPil, SmolVLMImageProcessorPil)
_FILE, _PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"


def reads_images(source: HuggingFaceFolder) -> bool:
    """Whether a folder holds a model whose images are served, and says how they are cut."""
    return source.config.model_type in TYPES and (source.path / _FILE).is_file()


def settings(source: HuggingFaceFolder, image_tokens: int = 0) -> VisionSettings:
    """How the model reads images.

    Args:
        image_tokens: of an image at most, see `GenerationLimits`; 0: as the model's files say.

    Raises:
        ModelsFileError: `image_tokens` is nothing that the model can keep to.
        UnsupportedArchitecture: a model of this type reads none here.
        UnsupportedModel: its image processor does something else than to resize, cut and normalize.
        UnreadableSource: a file is missing or damaged, or belongs to another model.
    """
    config = source.config
    if config.model_type not in TYPES:
        raise UnsupportedArchitecture(
            f"{source} is a model of type {config.model_type!r}, whose images are not read here: set images = 0 to "
            f"serve its text part; images are read by models of type {', '.join(TYPES[:-1])} and {TYPES[-1]}"
        )
    found = processor(source)
    tiles = config.model_type in _TILES
    if type(found) not in (_TILE_PROCESSORS if tiles else (Qwen2VLImageProcessorPil,)):
        known = "SmolVLMImageProcessor and Idefics3ImageProcessor do" if tiles else "Qwen2VLImageProcessor does"
        raise UnsupportedModel(
            f"{source}: its image processor is {type(found).__name__.removesuffix('Pil')}, images are cut as {known} "
            "it: set images = 0"
        )
    with reading(source.path, _FILE):
        named = {name: getattr(found, name, None) for name in found.valid_kwargs.__annotations__}
        asked = found._standardize_kwargs(**named)
    if not tiles:
        return _patches(source, asked, image_tokens)
    if image_tokens:
        raise ModelsFileError(
            f"{source} cuts images into tiles of one size, whose number its image processor decides: remove "
            "limits.image_tokens"
        )
    return _tiles(source, asked)


def sections(source: HuggingFaceFolder) -> tuple[int, ...]:
    """How many of a head's rotated pairs the position in time, in height and in width rotates; (): there is one.

    Raises:
        UnreadableSource: config.json does not say it.
    """
    if source.config.model_type not in _PATCHES:
        return ()
    found = (getattr(source.text_config, "rope_parameters", None) or {}).get("mrope_section")
    numbers = found if isinstance(found, list | tuple) else ()
    if len(numbers) != 3 or any(type(each) is not int or each < 0 for each in numbers):
        raise UnreadableSource(
            f"{source}: config.json must have an mrope_section of three numbers, found {found!r}: copy it again"
        )
    return tuple(numbers)


def _normalizing(source: HuggingFaceFolder, asked: dict[str, Any]) -> dict[str, Any]:
    return {
        "resample": int(asked["resample"]),
        "rescale": float(asked["rescale_factor"]) if asked["do_rescale"] else None,
        "mean": channels(source, asked["image_mean"]) if asked["do_normalize"] else (),
        "deviation": channels(source, asked["image_std"]) if asked["do_normalize"] else (),
    }


def _tiles(source: HuggingFaceFolder, asked: dict[str, Any]) -> TileVision:
    with reading(source.path, _FILE):
        longest, tile = asked["size"].longest_edge, int(dict(asked["max_image_size"])["longest_edge"])
    if not asked["do_resize"] or not longest:
        raise UnsupportedModel(f"{source}: {_FILE} does not resize to a longest_edge: set images = 0")
    return TileVision(
        longest_edge=int(longest),
        tile=tile,
        split=bool(asked["do_image_splitting"]),
        tokens=_tokens(source, tile),
        token_id=int(source.config.image_token_id),
        **_normalizing(source, asked),
        **_texts(source),
    )


def _tokens(source: HuggingFaceFolder, tile: int) -> int:
    """That a tile has behind the connector, which joins squares of patches."""
    vision, factor = source.config.vision_config, source.config.scale_factor
    if vision.image_size != tile:
        raise UnsupportedModel(
            f"{source}: {_FILE} cuts tiles of {tile} pixels, the model's positions are for {vision.image_size}"
        )
    side, rest = divmod(tile, vision.patch_size * factor)
    if rest:
        raise UnreadableSource(
            f"{source}: tiles of {tile} pixels are no whole number of {factor} x {factor} patches of "
            f"{vision.patch_size}: config.json is another model's"
        )
    named = source.table(_PROCESSOR_FILE) if (source.path / _PROCESSOR_FILE).is_file() else {}
    if (said := named.get("image_seq_len", side**2)) != side**2:
        raise UnreadableSource(
            f"{source}: {_PROCESSOR_FILE} has image_seq_len {said!r}, a tile of this model has {side**2} tokens"
        )
    return int(side**2)


def _texts(source: HuggingFaceFolder) -> dict[str, Any]:
    """The tokens that stand for images and around them, as transformers' processors name them."""
    tokenizer: Any = source.fast_tokenizer
    texts = {
        "token": getattr(tokenizer, "image_token", None) or "<image>",
        "around": getattr(tokenizer, "fake_image_token", None) or "<fake_token_around_image>",
        "whole": getattr(tokenizer, "global_image_token", None) or "<global-img>",
    }
    _check_tokens(source, texts)
    return texts


def _check_tokens(source: HuggingFaceFolder, texts: dict[str, str]) -> None:
    known = source.fast_tokenizer.get_added_vocab()
    for text in texts.values():
        if text not in known:
            raise UnreadableSource(f"{source}: the tokenizer has no token {text!r}: copy its files again")
    if known[texts["token"]] != source.config.image_token_id:
        raise UnreadableSource(
            f"{source}: config.json has image_token_id {source.config.image_token_id}, the tokenizer's "
            f"{texts['token']!r} is {known[texts['token']]}: one of the two is another model's"
        )


def _patches(source: HuggingFaceFolder, asked: dict[str, Any], image_tokens: int) -> PatchVision:
    vision = source.config.vision_config
    for name, wanted in (
        ("patch_size", vision.patch_size),
        ("temporal_patch_size", vision.temporal_patch_size),
        ("merge_size", vision.spatial_merge_size),
    ):
        if asked[name] != wanted:
            raise UnreadableSource(
                f"{source}: {_FILE} has {name} {asked[name]}, the model's is {wanted}: one is another model's"
            )
    size = asked["size"]
    if not asked["do_resize"] or not size.shortest_edge or not size.longest_edge:
        raise UnsupportedModel(f"{source}: {_FILE} does not resize between min_pixels and max_pixels: set images = 0")
    token = getattr(source.fast_tokenizer, "image_token", None) or "<|image_pad|>"
    _check_tokens(source, {"token": token})
    square = (vision.patch_size * vision.spatial_merge_size) ** 2
    least, most = int(size.shortest_edge), int(size.longest_edge)
    if image_tokens and image_tokens * square < least:
        raise ModelsFileError(
            f"limits.image_tokens is {image_tokens}, and {source} reads no image with fewer than "
            f"{-(-least // square)}: raise it, or remove it"
        )
    return PatchVision(
        patch=int(vision.patch_size),
        merge=int(vision.spatial_merge_size),
        frames=int(vision.temporal_patch_size),
        window=_window(source),
        min_pixels=least,
        max_pixels=min(most, image_tokens * square) if image_tokens else most,
        token=token,
        token_id=int(source.config.image_token_id),
        **_normalizing(source, asked),
    )


def _window(source: HuggingFaceFolder) -> int:
    """Pixels of a window in which some layers attend; 0: all see the whole image."""
    vision = source.config.vision_config
    window, factor = getattr(vision, "window_size", 0), vision.patch_size * vision.spatial_merge_size
    if window and window < factor:
        raise UnreadableSource(f"{source}: config.json has windows of {window} pixels, a token has {factor}")
    return int(window // factor * factor)


@dataclass(frozen=True)
class Asked:
    """What transformers makes of a prompt with images.

    Attributes:
        text: of the prompt, with all tokens that stand for images.
        pixels: of all images, [tiles or patches, ...].
        given: what `get_image_features` takes.
        named: whether the model is told which tokens are images'.
    """

    text: str
    pixels: NDArray[np.float32]
    given: dict[str, torch.Tensor]
    named: bool = field(default=False)

    def inputs(self, ids: Sequence[int], token_id: int) -> dict[str, torch.Tensor]:
        """What the model takes for the prompt's tokens."""
        tokens = torch.tensor([ids])
        named = {"mm_token_type_ids": (tokens == token_id).int()} if self.named else {}
        return {"input_ids": tokens, **self.given, **named}


def asked(images: Any, settings: VisionSettings, text: str, read: Sequence[Image.Image]) -> Asked:
    """Ask transformers' image processor, and write what its processor does for each image of a text.

    Args:
        images: the image processor.
        text: in which each image is a mark.
    """
    if isinstance(settings, PatchVision):
        size = {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}
        found = images(images=list(read), size=size, return_tensors="np")
        shown = [settings.token * int(grid.prod() // settings.merge**2) for grid in found["image_grid_thw"]]
        pixels = found["pixel_values"]
        given = {"pixel_values": torch.from_numpy(pixels), "image_grid_thw": torch.from_numpy(found["image_grid_thw"])}
    else:
        assert isinstance(settings, TileVision)
        found = images(images=[list(read)], return_tensors="np", return_row_col_info=True)
        marks = settings.tokens, settings.around, settings.token, settings.whole
        grids = zip(found["rows"][0], found["cols"][0], strict=True)
        shown = [get_image_prompt_string(*grid, *marks) for grid in grids]
        pixels = found["pixel_values"][0].astype(np.float32)
        given = {"pixel_values": torch.from_numpy(pixels)[None]}
    first, *rest = text.split(settings.token)
    whole = "".join([first, *(part for pair in zip(shown, rest, strict=True) for part in pair)])
    return Asked(whole, pixels, given, named=isinstance(settings, PatchVision))
