"""Tokenizers of models whose SentencePiece file has no fast form in transformers: Marian and M2M100.

Both keep a vocabulary of their own beside the SentencePiece model, so the pieces' tokens are looked up (`piece_ids`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from trident_export.errors import UnsupportedTokenizer


def source_tokenizer(path: Path) -> Tokenizer:
    """The SentencePiece model of a file as a `tokenizers.Tokenizer`, whose ids are places in that file.

    Raises:
        UnsupportedTokenizer: it is neither a Unigram nor a BPE model.
    """
    proto = _proto(path)
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    kind = proto.trainer_spec.model_type
    model: Any
    if kind == 1:
        model = models.Unigram(pieces, unk_id=proto.trainer_spec.unk_id, byte_fallback=proto.trainer_spec.byte_fallback)
    elif kind == 2:
        from transformers.convert_slow_tokenizer import generate_merges

        vocabulary = {piece: index for index, (piece, _) in enumerate(pieces)}
        merges = generate_merges(vocabulary, dict(pieces))
        unknown = pieces[proto.trainer_spec.unk_id][0]
        model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True)
    else:
        raise UnsupportedTokenizer(f"{path} is a SentencePiece model of type {kind}; known are Unigram (1) and BPE (2)")
    tokenizer = Tokenizer(model)
    steps: list[Any] = []
    if proto.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    if proto.normalizer_spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if proto.normalizer_spec.add_dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    return tokenizer


def pieces_of(path: Path) -> list[str]:
    """The pieces of a SentencePiece file, in order."""
    return [piece.piece for piece in _proto(path).pieces]


def target_tokenizer(vocabulary: dict[str, int], special: list[str], unknown: str) -> Tokenizer:
    """A tokenizer that only decodes: a model's own vocabulary, written as SentencePiece writes text."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.add_special_tokens(special)
    return tokenizer


def _proto(path: Path) -> Any:
    # sentencepiece carries a newer form of the same, which the pinned protobuf refuses to read.
    from transformers.utils import sentencepiece_model_pb2_new

    proto = sentencepiece_model_pb2_new.ModelProto()
    proto.ParseFromString(path.read_bytes())
    return proto
