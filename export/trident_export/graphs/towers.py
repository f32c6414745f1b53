"""Models with a tower for images and one for texts, whose vectors lie in one space: CLIP, MetaCLIP 2, SigLIP."""

from __future__ import annotations

from typing import Any

import torch

from trident_export.errors import UnsupportedTokenizer
from trident_export.huggingface.folder import TWO_TOWERS, HuggingFaceFolder


def has_towers(source: HuggingFaceFolder) -> bool:
    """Whether a folder holds such a model, with both towers."""
    return source.config.model_type in TWO_TOWERS


def check_texts(source: HuggingFaceFolder) -> None:
    """Check that the graph of texts reads them as transformers' pipeline does.

    Raises:
        UnsupportedTokenizer: it does not.
    """
    if source.padded_to and "attention_mask" in source.fast_tokenizer.model_input_names:
        raise UnsupportedTokenizer(
            f"{source}: its tokenizer masks padding, and the model takes a text's vector from its last token, which is "
            'padding: a SigLIP whose tokenizer_config.json has model_input_names ["input_ids"] is served'
        )


def dimensions(source: HuggingFaceFolder) -> int:
    """Numbers in a vector."""
    config = source.config
    return int(config.text_config.projection_size if config.model_type == "siglip" else config.projection_dim)


def tokenize(source: HuggingFaceFolder, tokenizer: Any, texts: list[str], max_tokens: int) -> Any:
    """What the text tower reads of texts, as torch tensors: as transformers' pipeline has it."""
    padding = "max_length" if source.padded_to else True
    return tokenizer(texts, padding=padding, truncation=True, max_length=max_tokens, return_tensors="pt")


class TextTower(torch.nn.Module):
    """The tower of texts as a model that gives `pooled`, float32 [texts, dimensions], not normalized."""

    _supports_attention_backend = True

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config.text_config
        self.whole = model

    def set_attn_implementation(self, name: str) -> None:
        """See transformers' models."""
        self.whole.text_model.set_attn_implementation(name)

    def get_input_embeddings(self) -> Any:
        """The table of tokens."""
        return self.whole.text_model.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """The vectors of texts by the name of the graph's output."""
        return {"pooled": text_vectors(self.whole, {"input_ids": input_ids, "attention_mask": attention_mask})}


def text_vectors(model: Any, batch: Any) -> torch.Tensor:
    """What a model makes of tokenized texts, float32 [texts, dimensions], not normalized."""
    found: torch.Tensor = model.get_text_features(**batch).pooler_output
    return found


def image_vectors(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What a model makes of images, float32 [images, dimensions], not normalized.

    Of a model without towers it is what transformers' pipeline gives with `pool=True`.
    """
    if hasattr(model, "get_image_features"):
        found: torch.Tensor = model.get_image_features(pixel_values=pixels).pooler_output
        return found
    pooled: torch.Tensor = model(pixel_values=pixels).pooler_output
    return pooled
