"""What an encoder's Hugging Face folder says beside its weights: tokenizer, token roles, prompts, pooling, labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import PretrainedConfig

from trident_export import folder as hf
from trident_export.errors import UnsupportedModel
from trident_serving.encoders.labels import Activation, LabelSettings
from trident_serving.encoders.pooling import Pooling, PoolingSettings
from trident_serving.encoders.tokens import TOKENIZER, TokenRoles

_POOLING_MODES = {
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_lasttoken": Pooling.LAST_TOKEN,
    "pooling_mode_max_tokens": Pooling.MAX,
}
_BEGINNING_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "data2vec-text")


def save_tokenizer(source: Path, folder: Path) -> None:
    """Write tokenizer.json with the padding token named in it, as the runtime reads it."""
    folder.mkdir(parents=True)
    tokenizer = hf.fast_tokenizer(source)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.enable_padding(
        pad_id=tokenizer.pad_token_id or 0,
        pad_type_id=tokenizer.pad_token_type_id,
        pad_token=tokenizer.pad_token or "[PAD]",
    )
    backend.save(str(folder / TOKENIZER))


def read_roles(source: Path, prompts: Mapping[str, str] | None = None) -> TokenRoles:
    """Token roles from the tokenizer; prompts from sentence-transformers' file where none are given."""
    tokenizer = hf.tokenizer(source)
    file = source / "config_sentence_transformers.json"
    if prompts is None:
        prompts = hf.settings(source, file.name).get("prompts") or {} if file.exists() else {}
    return TokenRoles(tokenizer.unk_token_id, tokenizer.cls_token_id, tokenizer.mask_token_id, dict(prompts))


def longest_input(source: Path, config: PretrainedConfig) -> int | None:
    """Tokens that the model takes at most; None where nothing says."""
    limits = []
    positions = getattr(config, "max_position_embeddings", None)
    if positions and positions > 0:
        # These architectures count positions from behind the padding token's id.
        padding = 1 if config.model_type == "mpnet" else config.pad_token_id  # MPNet's code has it as a number
        limits.append(positions - padding - 1 if config.model_type in _BEGINNING_POSITIONS else positions)
    file = source / "sentence_bert_config.json"
    if file.exists():
        limits.append(hf.settings(source, file.name).get("max_seq_length") or 0)
    found = [limit for limit in limits if limit]
    return min(found) if found else None


def read_pooling(source: Path) -> PoolingSettings:
    """Pooling and normalization from the model's sentence-transformers files; mean and normalized without them.

    Raises:
        UnsupportedModel: the model has a step that is not supported.
    """
    file = source / "modules.json"
    if not file.exists():
        return PoolingSettings(Pooling.MEAN, normalize=True)
    with hf.reading(source, file.name):
        modules = {module["type"].rsplit(".", 1)[-1]: module["path"] for module in hf.settings(source, file.name)}
    unknown = sorted(set(modules) - {"Transformer", "Pooling", "Normalize"})
    if unknown:
        raise UnsupportedModel(f"the model has the modules {', '.join(unknown)}, which are not supported")
    if "Pooling" not in modules:
        raise UnsupportedModel(f"{file} names no Pooling step, without which there is no one vector a text")
    settings = hf.settings(source, f"{modules['Pooling']}/config.json")
    active = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value]
    if len(active) != 1 or active[0] not in _POOLING_MODES:
        raise UnsupportedModel(f"the model pools by {active}; supported is one of {', '.join(_POOLING_MODES)}")
    return PoolingSettings(_POOLING_MODES[active[0]], normalize="Normalize" in modules)


def read_labels(source: Path, task: str) -> LabelSettings:
    """Labels in the order of the logits, and the activation that transformers' pipeline (a cross-encoder of
    sentence-transformers for text-ranking) applies.

    Raises:
        UnsupportedModel: a cross-encoder names an activation that is not supported.
    """
    config = hf.config(source)
    labels = tuple(config.id2label[index] for index in range(config.num_labels))
    if task == "text-ranking":
        return LabelSettings(labels, _ranking_activation(config))
    if config.problem_type == "regression":
        return LabelSettings(labels, Activation.NONE)
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return LabelSettings(labels, Activation.SIGMOID)
    return LabelSettings(labels, Activation.SOFTMAX)


def _ranking_activation(config: PretrainedConfig) -> Activation:
    settings = getattr(config, "sentence_transformers", None) or {}
    name = settings.get("activation_fn") or getattr(config, "sbert_ce_default_activation_function", None)
    if name is None:
        return Activation.SIGMOID if config.num_labels == 1 else Activation.NONE
    known = {"Identity": Activation.NONE, "Sigmoid": Activation.SIGMOID}
    if name.rsplit(".", 1)[-1] not in known:
        raise UnsupportedModel(f"the cross-encoder's activation {name!r} is not one of {', '.join(known)}")
    return known[name.rsplit(".", 1)[-1]]
