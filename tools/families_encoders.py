"""Which types of encoders are served: python tools/families_encoders.py [type ...]

For every type that transformers has a class for that classifies, answers or fills from text, a tiny model with random
weights is exported with each of its heads, and run by ONNX Runtime: texts of several lengths in one padded batch, and
each by itself with more padding. Its numbers are compared with Hugging Face's eager attention over the text alone.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from trident_export.errors import ExportError, UnsupportedArchitecture
from trident_export.graphs.encoder import export_encoder_graph
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.tasks.encoders.base import unrunnable

VOCABULARY = 256
CONTEXT = 160
WINDOW = 8
LENGTHS = (61, 5, 24)
PADDED = (64, 96)  # of the batch, and of each text alone
LARGEST_DIFFERENCE = 2e-4  # of a number, as a share of the largest
PADDING, END = 1, 2

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "d_model": 64,
    "dim": 64,
    "emb_dim": 64,
    "n_embd": 64,
    "embedding_size": 32,
    "intermediate_size": 96,
    "hidden_dim": 96,
    "d_ff": 96,
    "d_inner": 96,
    "ffn_dim": 96,
    "d_kv": 16,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layers": 2,
    "n_layer": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "d_head": 16,
    "max_position_embeddings": CONTEXT,
    "n_positions": CONTEXT,
    "sliding_window": WINDOW,
    "local_attention": WINDOW,
    "attention_window": WINDOW,
    "num_labels": 2,
    "pad_token_id": PADDING,
    "bos_token_id": 0,
    "eos_token_id": END,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "true_hidden_size": 64,
    "intra_bottleneck_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
# What single types need besides.
MORE: dict[str, dict[str, Any]] = {
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 16,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
    },
    "deberta": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        }
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "modernbert": {"global_attn_every_n_layers": 2, "cls_token_id": 0, "sep_token_id": END},
    "modernbert-decoder": {"global_attn_every_n_layers": 2, "cls_token_id": 0, "sep_token_id": END},
    "longformer": {"sep_token_id": END},
    "big_bird": {"sep_token_id": END, "attention_type": "original_full"},
    "squeezebert": {"embedding_size": 64},
    "esmc": {"num_key_value_heads": 4},
    "zamba2": {"layer_types": ["linear_attention", "hybrid"]},
    "reformer": {"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [32, 32], "is_decoder": False},
    "funnel": {"block_sizes": [1, 1], "num_hidden_layers": None},
    "esm": {"position_embedding_type": "rotary", "mask_token_id": 4, "token_dropout": False},
    "xlm": {"n_langs": 1, "mask_index": 4, "eos_index": END, "pad_index": PADDING, "bos_index": 0},
    "flaubert": {"mask_index": 4, "eos_index": END, "pad_index": PADDING, "bos_index": 0},
}
HEADS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "feature-extraction": (AutoModel, ("last_hidden_state",)),
    "text-classification": (AutoModelForSequenceClassification, ("logits",)),
    "token-classification": (AutoModelForTokenClassification, ("logits",)),
    "question-answering": (AutoModelForQuestionAnswering, ("start_logits", "end_logits")),
    "fill-mask": (AutoModelForMaskedLM, ("logits",)),
}
TYPES: tuple[str, ...] = tuple(
    sorted(
        {
            name
            for mapping in (
                modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
                modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
                modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
                modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
                modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
            )
            for name in mapping
        }
    )
)


class NotBuilt(Exception):
    """Transformers makes no model of the sizes here."""


def tiny(name: str) -> Any:
    """A configuration of a type with small sizes."""
    kind = CONFIG_MAPPING[name]
    return kind(**_sizes(kind(), SIZES | MORE.get(name, {})))


def _sizes(default: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    mapped = getattr(type(default), "attribute_map", {})
    known = {*default.to_dict(), *mapped, "num_labels"}
    found = {key: value for key, value in wanted.items() if key in known and value is not None}
    for outer, inner in mapped.items():  # one name for one size
        if outer in found:
            found.pop(inner, None)
    if "qk_rope_head_dim" in found:
        found.pop("head_dim", None)
        found["num_key_value_heads"] = found["num_attention_heads"]
    for part in getattr(type(default), "sub_configs", {}):
        inner = getattr(default, part, None)
        if hasattr(inner, "to_dict"):
            found[part] = _sizes(inner, wanted) | {"model_type": inner.model_type}
    return found


def check_encoder(name: str) -> str:
    """Export and run one type with each of its heads; a sentence where it is not as it should be, else an empty one.

    Raises:
        ExportError: every head is refused.
        NotBuilt: the first head can't be built, and no other is served.
    """
    config = tiny(name)
    served = 0
    refused: list[tuple[str, Exception]] = []
    for task, (head, outputs) in HEADS.items():
        if task == "feature-extraction" and config.is_encoder_decoder:
            head = AutoModelForTextEncoding
        if type(config) not in head._model_mapping:
            continue
        try:
            if said := check_head(tiny(name), head, outputs):
                return f"{task}: {said}"
            served += 1
        except (ExportError, NotBuilt) as error:
            refused.append((task, error))
    if refused and not served:
        raise refused[0][1]
    return "" if served else "no head reads texts"


def check_head(config: Any, head: Any, outputs: tuple[str, ...]) -> str:
    """The same for one class of transformers.

    Args:
        head: an Auto class.
        outputs: what its graph must give.

    Raises:
        ExportError: it is refused.
        NotBuilt: transformers makes no such model.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, path = export(config, head, outputs, Path(folder))
        return compare(source.load(head), onnxruntime.InferenceSession(str(path)), outputs)


def export(config: Any, head: Any, outputs: tuple[str, ...], folder: Path) -> tuple[HuggingFaceFolder, Path]:
    """A tiny model's Hugging Face folder, and its graph in it.

    Raises:
        ExportError: it is refused.
        NotBuilt: transformers makes no such model.
    """
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    kinds = head._model_mapping[type(config)]
    config.architectures = [(kinds[0] if isinstance(kinds, tuple) else kinds).__name__]
    try:
        model = head.from_config(config).eval()
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {error}".splitlines()[0][:200]) from error
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
            else:  # norms and biases: not the same for every number
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    source, path = HuggingFaceFolder(folder), folder / "graph" / "model.onnx"
    path.parent.mkdir()
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    export_encoder_graph(source, path, head, inputs=inputs, outputs=outputs, finish=lambda graph: None)
    return source, path


def compare(model: Any, session: onnxruntime.InferenceSession, outputs: tuple[str, ...]) -> str:
    """Texts in a padded batch, and each alone with more padding, against Hugging Face without any."""
    random = np.random.default_rng(0)
    texts = [random.integers(5, VOCABULARY, length).tolist() for length in LENGTHS]
    for ids in texts:  # two parts
        ids[2] = ids[-1] = END
    with torch.inference_mode():
        expected = [_of(model(**_ask(ids)), outputs) for ids in texts]
    found = _run(session, texts, PADDED[0], outputs), [_run(session, [ids], PADDED[1], outputs)[0] for ids in texts]
    for what, rows in zip(("in company", "with padding"), found, strict=True):
        for ids, right, given in zip(texts, expected, rows, strict=True):
            for name, one, other in zip(outputs, right, given, strict=True):
                other = other[: len(ids)] if one.ndim and len(one) == len(ids) else other
                if one.shape != other.shape:
                    return f"{name} has the shape {other.shape} {what}, and {one.shape} is right"
                off = float(np.abs(one - other).max() / max(1e-3, float(np.abs(one).max())))
                if not off < LARGEST_DIFFERENCE and _differs(model, ids, name, one):
                    raise UnsupportedArchitecture(
                        "its answer for a text depends on the padding in Hugging Face too, and texts are served in "
                        "padded batches: choose another model"
                    )
                if not off < LARGEST_DIFFERENCE:
                    return f"{name} is {off:.2g} off {what} at {len(ids)} tokens"
    return ""


def _ask(ids: list[int]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


def _differs(model: Any, ids: list[int], name: str, alone: Any) -> bool:
    """Whether padding changes what Hugging Face makes of a text."""
    more = PADDED[0] - len(ids)
    batch = {"input_ids": [ids + [PADDING] * more], "attention_mask": [[1] * len(ids) + [0] * more]}
    with torch.inference_mode():
        found = _of(model(**{key: torch.tensor(rows) for key, rows in batch.items()}), (name,))[0]
    found = found[: len(ids)] if alone.ndim and len(found) == PADDED[0] else found
    return bool(np.abs(found - alone).max() > LARGEST_DIFFERENCE * max(1e-3, float(np.abs(alone).max())))


def _of(given: Any, outputs: tuple[str, ...]) -> list[Any]:
    return [given[name][0].float().numpy() for name in outputs]


def _run(
    session: onnxruntime.InferenceSession, texts: list[list[int]], padded: int, outputs: tuple[str, ...]
) -> list[list[Any]]:
    ids = np.full((len(texts), padded), PADDING, np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    known = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    feeds = {value.name: known[value.name] for value in session.get_inputs()}
    try:
        found = session.run(list(outputs), feeds)
    except Exception as error:  # as the gate says it
        raise unrunnable("a tiny model", ids.shape, error) from error
    return [[tensor[row] for tensor in found] for row in range(len(texts))]


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w1", eos_token="w2", unk_token="w3", model_input_names=names
    )


def main() -> None:
    """Run the types that are named, or all, in this process."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for name in sys.argv[1:] or TYPES:
        try:
            said = check_encoder(name)
            print("wrong " if said else "served", name, said, flush=True)
        except ExportError as error:
            print("refused", name, error, flush=True)
        except Exception as error:  # what a model's code raises before it is exported
            print("failed ", name, f"{type(error).__name__}: {error}"[:300], flush=True)


if __name__ == "__main__":
    main()
