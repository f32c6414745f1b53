"""What a folder says of images that are read beside text: how they are cut, and the tokens that stand for them.

Models of type `idefics3` and `smolvlm`: a SigLIP tower whose patches a connector makes tokens of, and a decoder.
"""

from __future__ import annotations

from typing import Any

from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from trident_export.errors import UnreadableSource, UnsupportedArchitecture, UnsupportedModel
from trident_export.huggingface.folder import HuggingFaceFolder, reading
from trident_export.huggingface.images import channels, processor
from trident_serving.generation.images import VisionSettings

TYPES = ("idefics3", "smolvlm")
_PROCESSORS = (Idefics3ImageProcessorPil, SmolVLMImageProcessorPil)
_FILE, _PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"


def reads_images(source: HuggingFaceFolder) -> bool:
    """Whether a folder holds a model whose images are served, and says how they are cut."""
    return source.config.model_type in TYPES and (source.path / _FILE).is_file()


def settings(source: HuggingFaceFolder) -> VisionSettings:
    """How the model reads images.

    Raises:
        UnsupportedArchitecture: a model of this type reads none here.
        UnsupportedModel: its image processor does something else than to resize, cut and normalize.
        UnreadableSource: a file is missing or damaged, or belongs to another model.
    """
    config = source.config
    if config.model_type not in TYPES:
        raise UnsupportedArchitecture(
            f"{source} is a model of type {config.model_type!r}, whose images are not read here: set images = 0 to "
            f"serve its text part; images are read by models of type {' and '.join(TYPES)}"
        )
    found = processor(source)
    if type(found) not in _PROCESSORS:
        raise UnsupportedModel(
            f"{source}: its image processor is {type(found).__name__.removesuffix('Pil')}, images are cut as "
            "SmolVLMImageProcessor and Idefics3ImageProcessor do it: set images = 0"
        )
    with reading(source.path, _FILE):
        named = {name: getattr(found, name, None) for name in found.valid_kwargs.__annotations__}
        asked = found._standardize_kwargs(**named)
        longest, tile = asked["size"].longest_edge, int(dict(asked["max_image_size"])["longest_edge"])
    if not asked["do_resize"] or not longest:
        raise UnsupportedModel(f"{source}: {_FILE} does not resize to a longest_edge: set images = 0")
    text = _texts(source)
    return VisionSettings(
        longest_edge=int(longest),
        tile=tile,
        split=bool(asked["do_image_splitting"]),
        resample=int(asked["resample"]),
        rescale=float(asked["rescale_factor"]) if asked["do_rescale"] else None,
        mean=channels(source, asked["image_mean"]) if asked["do_normalize"] else (),
        deviation=channels(source, asked["image_std"]) if asked["do_normalize"] else (),
        tokens=_tokens(source, tile),
        token_id=int(config.image_token_id),
        **text,
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


def _texts(source: HuggingFaceFolder) -> dict[str, str]:
    """The tokens that stand for images and around them, as transformers' processors name them."""
    tokenizer: Any = source.fast_tokenizer
    texts = {
        "token": getattr(tokenizer, "image_token", None) or "<image>",
        "around": getattr(tokenizer, "fake_image_token", None) or "<fake_token_around_image>",
        "whole": getattr(tokenizer, "global_image_token", None) or "<global-img>",
    }
    known = tokenizer.get_added_vocab()
    for text in texts.values():
        if text not in known:
            raise UnreadableSource(f"{source}: the tokenizer has no token {text!r}: copy its files again")
    if known[texts["token"]] != source.config.image_token_id:
        raise UnreadableSource(
            f"{source}: config.json has image_token_id {source.config.image_token_id}, the tokenizer's "
            f"{texts['token']!r} is {known[texts['token']]}: one of the two is another model's"
        )
    return texts
