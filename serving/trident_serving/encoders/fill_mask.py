"""The likeliest tokens for the mask tokens of a text, each with the text that it gives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from trident_serving.encoders.task import SINGLE, TEXT, TOP_K, TRUNCATE, EncoderTask, Stage, Tensor, Tensors, count
from trident_serving.encoders.tokens import TokenRoles, load_tokenizer, read_texts
from trident_serving.errors import InvalidRequest
from trident_serving.text import encode_texts

DEFAULT_TOP_K = 5


def _load(folder: Path, parameters: Mapping[str, str]) -> Stage:
    tokenizer = load_tokenizer(folder)
    roles = TokenRoles.load(folder)

    def postprocess(tensors: Tensors) -> Tensors:
        if len(tensors["input_ids"]) > 1:  # texts may have different numbers of mask tokens
            raise InvalidRequest(f"text_input must be one text a request, found {len(tensors['input_ids'])}")
        input_ids, mask = tensors["input_ids"][0], tensors["attention_mask"][0]
        ids = input_ids[mask > 0]
        masks = np.flatnonzero(ids == roles.mask_token_id)
        if not masks.size:
            token = None if roles.mask_token_id is None else tokenizer.id_to_token(roles.mask_token_id)
            raise InvalidRequest(f"text_input has no gap to fill: write {token} in its place")
        most = tensors["top_scores"].shape[-1]
        top_k = count(tensors, "top_k", min(DEFAULT_TOP_K, most), most, "tokens")
        tokens = tensors["top_ids"][0, masks, :top_k]
        scores = np.exp(tensors["top_scores"][0, masks, :top_k] - tensors["log_normalizer"][0, masks, None])
        sequences = []
        for position, row in zip(masks, tokens, strict=True):
            for token in row:
                filled = ids.copy()
                filled[position] = token
                # With several mask tokens the others must show.
                sequences.append(tokenizer.decode(filled.tolist(), skip_special_tokens=len(masks) == 1))
        shape = (1, masks.size, top_k)
        words = [tokenizer.decode([token], skip_special_tokens=False) for token in tokens.reshape(-1).tolist()]
        return {
            "token_str": encode_texts(words).reshape(shape),
            "score": scores.astype(np.float32).reshape(shape),
            "token": tokens.astype(np.int32).reshape(shape),
            "sequence": encode_texts(sequences).reshape(shape),
        }

    return postprocess


TASK = EncoderTask(
    name="fill-mask",
    texts=(TEXT,),
    options=(TRUNCATE,),
    model_inputs=SINGLE,
    # A vocabulary of logits for every token is too much to hand from stage to stage.
    model_outputs=(
        Tensor("top_scores", "FP32", (-1, "top_k")),
        Tensor("top_ids", "INT64", (-1, "top_k")),
        Tensor("log_normalizer", "FP32", (-1,)),
    ),
    read=("input_ids", "attention_mask", "top_scores", "top_ids", "log_normalizer"),
    answer_options=(TOP_K,),
    answers=(
        Tensor("token_str", "STRING", (-1, -1)),
        Tensor("score", "FP32", (-1, -1)),
        Tensor("token", "INT32", (-1, -1)),
        Tensor("sequence", "STRING", (-1, -1)),
    ),
    preprocess=read_texts,
    postprocess=_load,
)
