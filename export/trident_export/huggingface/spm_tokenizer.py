"""SentencePiece files: what transformers makes of one, and the tokenizers of models of which it makes nothing.

Those are Marian and M2M100, which keep a vocabulary of their own beside the SentencePiece model, so the pieces' tokens
are looked up (`piece_ids`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from trident_export.errors import UnsupportedTokenizer
from trident_export.huggingface.folder import reading


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


def let_transformers_read() -> None:
    """Give transformers its own form of SentencePiece's message.

    It takes the one in the package sentencepiece, which is newer, and which the pinned protobuf refuses to read; then
    it takes the file for one of another format.
    """
    import sentencepiece
    from transformers.utils import sentencepiece_model_pb2_new

    sentencepiece.sentencepiece_model_pb2 = sentencepiece_model_pb2_new  # type: ignore[attr-defined]


# What conversions get wrong: spaces, characters that a normalizer changes, and those that are in no vocabulary. A space
# before a text is read as the class of the tokenizer has it, which of Llama's differs from SentencePiece.
_TEXTS = (
    "Hello, world!",
    "three   spaces inside",
    "It's 12,345.67 of them (or more); isn't it?",
    "na\u00efve caf\u00e9, \ufb01ne \u2167 \u2460",
    "\u4e2d\u6587 \u65e5\u672c\u8a9e \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \U0001f642",
    "two\nlines\tand a tab",
)


def check_conversion(source: object, file: Path, tokenizer: Any) -> None:
    """Compare the tokens of a converted tokenizer with those of SentencePiece itself.

    Args:
        source: what a message names.
        file: the SentencePiece file.
        tokenizer: transformers', made of it.

    Raises:
        UnsupportedTokenizer: they differ.
    """
    from sentencepiece import SentencePieceProcessor

    with reading(file.parent, file.name):
        processor = SentencePieceProcessor(model_file=str(file))
    for text in _TEXTS:
        ids = processor.encode(text)
        expected = [None if processor.is_unknown(index) else processor.id_to_piece(index) for index in ids]
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)
        found = [None if token == tokenizer.unk_token else token for token in tokens]
        if found != expected:
            raise UnsupportedTokenizer(
                f"{source}: there is no tokenizer.json, and the {type(tokenizer).__name__} that transformers makes of "
                f"{file.name} gives other tokens for {text!r} than SentencePiece does: save the tokenizer by the "
                "version that wrote it, or take a copy that has tokenizer.json"
            )


def _proto(path: Path) -> Any:
    # sentencepiece carries a newer form of the same, which the pinned protobuf refuses to read.
    from transformers.utils import sentencepiece_model_pb2_new

    proto = sentencepiece_model_pb2_new.ModelProto()
    proto.ParseFromString(path.read_bytes())
    return proto
