"""The text part of a multimodal model: its language model and its head, as transformers' own class for text alone.

Weights are shared with the whole model, nothing is copied. Qwen-VL's positions in time, height and width are the same
number for a text, so their rotation is the plain one, and the language model is Qwen2 or Qwen3 under another name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trident_export.errors import UnsupportedArchitecture

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Text configs that have no class with a head of their own, by the type that computes the same for text.
_SAME_FOR_TEXT = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}


def whole_class(config: PretrainedConfig) -> Any | None:
    """The Auto class of a multimodal model whose config has one of its text part; None for other models."""
    from transformers import AutoModelForMultimodalLM

    multimodal = type(config) in AutoModelForMultimodalLM._model_mapping and not config.is_encoder_decoder
    return AutoModelForMultimodalLM if multimodal and config.get_text_config() is not config else None


def left_out(config: PretrainedConfig) -> list[str]:
    """What else a multimodal model reads, by the names of its configs: vision, audio."""
    parts = [name.removesuffix("_config") for name in config.sub_configs if name != "text_config"]
    return [part for part in parts if getattr(config, f"{part}_config", None) is not None]


def inner(whole: PreTrainedModel) -> PreTrainedModel | None:
    """The model with a head for text alone that a multimodal one is built around; None where it is built otherwise."""
    from transformers import AutoModelForCausalLM

    kind = AutoModelForCausalLM._model_mapping.get(type(whole.config.get_text_config()), None)
    found = (module for module in whole.modules() if kind is not None and isinstance(module, kind))
    model: PreTrainedModel | None = next(found, None)
    return model


def of(whole: PreTrainedModel, folder: object) -> PreTrainedModel:
    """The text part of a multimodal model.

    Args:
        folder: what a message names.

    Raises:
        UnsupportedArchitecture: transformers has no class for it.
    """
    import torch
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = whole.config.get_text_config()
    kind = _SAME_FOR_TEXT.get(config.model_type, config.model_type)
    if kind != config.model_type:
        config = CONFIG_MAPPING[kind](**_plain(config))
    causal: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if causal is None:
        raise UnsupportedArchitecture(
            f"{folder} is a model of type {whole.config.model_type!r}, whose text part ({kind!r}) transformers has no "
            "class for: choose another model"
        )
    if (found := inner(whole)) is not None:
        return found
    wanted: Any = AutoModel._model_mapping[type(whole.config.get_text_config())]
    language = next((module for module in whole.modules() if isinstance(module, wanted)), None)
    head = whole.get_output_embeddings()
    if language is None or head is None:
        raise UnsupportedArchitecture(
            f"{folder} is a model of type {whole.config.model_type!r}, in which there is no {wanted.__name__} with a "
            "head: choose another model"
        )
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model: PreTrainedModel = causal(config)
    body = getattr(model, model.base_model_prefix)
    if isinstance(body, wanted):
        setattr(model, model.base_model_prefix, language)
    else:
        body.rotary_emb = type(body.rotary_emb)(config)  # its numbers are in no file
        body.load_state_dict(language.state_dict(), assign=True)
    model.set_output_embeddings(head)
    return model.eval()


def _plain(config: PretrainedConfig) -> dict[str, Any]:
    """A text config with the rotation that text has."""
    values = config.to_dict()
    rope = dict(values.get("rope_parameters") or {})
    for key in ("mrope_section", "mrope_interleaved", "type"):
        rope.pop(key, None)
    if rope.get("rope_type") in (None, "mrope"):
        rope["rope_type"] = "default"
    return {key: value for key, value in values.items() if key not in ("model_type", "architectures")} | {
        "rope_parameters": rope
    }
