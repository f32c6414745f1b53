"""The tokens that a written tokenizer gives, against the rows of its model's embedding."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from trident_export.errors import UnreadableSource
from trident_export.huggingface.folder import HuggingFaceFolder, reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def rows_of(model: PreTrainedModel) -> int:
    """Tokens that the model's embedding has a row for."""
    table: Any = model.get_input_embeddings()
    return int(table.weight.shape[0])


def drop_tokens_beyond(source: HuggingFaceFolder, file: Path, rows: int, unused: Collection[int] = ()) -> None:
    """Take away added tokens that the embedding has no row for: a text that names one is read letter by letter.

    Args:
        file: tokenizer.json, as the runtime reads it.
        rows: of the model's embedding.
        unused: special tokens that the task does without; others must have a row.

    Raises:
        UnreadableSource: the vocabulary itself is larger than the embedding, or a special token has no row.
    """
    state = json.loads(file.read_text(encoding="utf-8"))
    model = state["model"]
    if model["type"] == "BPE" and model.get("unk_token") is None:  # it knows every text, this token is only a name
        tokenizer = source.tokenizer
        roles = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id}
        unused = {*unused, *({tokenizer.unk_token_id} - roles)}
    added = {token["id"]: token["content"] for token in state["added_tokens"] if token["id"] >= rows}
    dropped = {index: token for index, token in added.items() if index in unused}
    special = source.tokenizer.all_special_ids
    words = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=False)
    beyond = {index: token for token, index in words.items() if index >= rows}
    beyond |= {index: token for index, token in added.items() if index in special}
    check_tokens(source, {index: token for index, token in beyond.items() if index not in dropped}, rows)
    if added:
        state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < rows]
        known = model["vocab"]
        # Some name an added token in the vocabulary, too, where its letters could find it.
        if isinstance(known, dict):
            model["vocab"] = {token: index for token, index in known.items() if index not in dropped}
        else:
            model["vocab"] = known[:rows]
        file.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    with reading(source.path, "tokenizer.json"):
        written = Tokenizer.from_file(str(file))
    written.no_padding()
    written.no_truncation()
    found = {*written.encode("a").ids, *written.encode("a", "b").ids}
    check_tokens(source, {token: written.id_to_token(token) for token in found}, rows)


def check_tokens(source: HuggingFaceFolder, tokens: Iterable[int], rows: int) -> None:
    """Every token must have a row in the embedding.

    Args:
        tokens: or a mapping from each to its text, which the message then says.

    Raises:
        UnreadableSource: one has none.
    """
    largest = max(tokens, default=-1)
    if largest >= rows:
        text = f" ({tokens[largest]!r})" if isinstance(tokens, dict) else ""
        raise UnreadableSource(
            f"{source}: the tokenizer gives the token {largest}{text}, the model has {rows}: it is another model's"
        )
