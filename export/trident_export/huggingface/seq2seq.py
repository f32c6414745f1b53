"""What an encoder-decoder model's Hugging Face folder says besides its weights: tokenizers, languages, settings."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from trident_export.errors import ModelsFileError, UnsupportedModel, UnsupportedTokenizer
from trident_export.huggingface import spm_tokenizer
from trident_export.huggingface.folder import HuggingFaceFolder, reading
from trident_export.huggingface.vocabulary import check_tokens, drop_tokens_beyond
from trident_export.models_file import ModelSpec
from trident_serving.seq2seq.request import GenerationDefaults
from trident_serving.seq2seq.source import SourceSettings, TargetStyle

_HUGGING_FACE_MAX_LENGTH = 20  # what a generation config has that does not say
# Settings that change answers and that the search does not know, with the values that switch them off.
_UNKNOWN_SETTINGS: dict[str, tuple[Any, ...]] = {
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "num_beam_groups": (None, 1),
    "sequence_bias": (None,),
    "exponential_decay_length_penalty": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
}


_OWN_FORMS = ("MarianTokenizer", "M2M100Tokenizer")  # two vocabularies, or two orders of one


def check(spec: ModelSpec, source: HuggingFaceFolder) -> None:
    """Check what `save_text_files` writes, as far as it can be told without the weights.

    Raises:
        UnreadableSource: a file is damaged.
        UnsupportedTokenizer: the tokenizer has no form that the runtime reads.
        UnsupportedModel: the generation config asks for something that the search lacks.
    """
    tokenizer = source.tokenizer
    if not tokenizer.is_fast and type(tokenizer).__name__ not in _OWN_FORMS:
        raise _no_form(tokenizer)
    read_defaults(source, _task_params(spec, source))


def _no_form(tokenizer: PreTrainedTokenizerBase) -> UnsupportedTokenizer:
    return UnsupportedTokenizer(
        f"{type(tokenizer).__name__} has no fast form (tokenizer.json), which the runtime reads, and transformers "
        "can't make one of its files: export a model that has one"
    )


def save_text_files(spec: ModelSpec, source: HuggingFaceFolder, folder: Path, rows: int) -> None:
    """Write the tokenizers, `source.json` and `generation.json` that the runtime reads.

    Args:
        rows: of the model's embedding.

    Raises:
        UnreadableSource: a token that a source is made of has no row.
        UnsupportedTokenizer: the tokenizer has no form that the runtime reads.
        ModelsFileError: a language is not known.
        UnsupportedModel: the generation config asks for something that the search lacks.
    """
    folder.mkdir(parents=True)
    tokenizer = source.tokenizer
    piece_ids = _save_tokenizers(tokenizer, folder)
    settings = _source_settings(spec, source, folder, tokenizer, piece_ids)
    if not piece_ids:  # no source has a mask, and BART's have no row for it
        drop_tokens_beyond(source, folder / "tokenizer.json", rows, unused={tokenizer.mask_token_id})
    around = chain.from_iterable(chain(*settings.source_surroundings.values()))
    check_tokens(source, chain(settings.prefix, settings.suffix, around, settings.languages.values(), piece_ids), rows)
    settings.save(folder)
    read_defaults(source, _task_params(spec, source)).save(folder)


def _save_tokenizers(tokenizer: PreTrainedTokenizerBase, folder: Path) -> tuple[int, ...]:
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        return ()
    name = type(tokenizer).__name__
    target: dict[str, int] | None = None
    if name == "MarianTokenizer":
        source_file, vocabulary = Path(tokenizer.spm_files[0]), dict(tokenizer.encoder)
        target = dict(tokenizer.target_encoder) if tokenizer.separate_vocabs else None
        special = tokenizer.all_special_tokens
    elif name == "M2M100Tokenizer":
        source_file, vocabulary = Path(tokenizer.spm_file), dict(tokenizer.encoder)
        vocabulary |= dict(tokenizer.lang_token_to_id)
        special = [*tokenizer.all_special_tokens, *tokenizer.lang_token_to_id]
    else:
        raise _no_form(tokenizer)
    unknown = str(tokenizer.unk_token)
    with reading(source_file.parent, "the tokenizer's vocabulary"):
        reads = spm_tokenizer.source_tokenizer(source_file)
        writes = spm_tokenizer.target_tokenizer(target or vocabulary, special, unknown)
    reads.save(str(folder / "tokenizer.json"))
    writes.save(str(folder / "target.json"))
    known: dict[str, int] = vocabulary
    ids = [known.get(piece, known[unknown]) for piece in spm_tokenizer.pieces_of(source_file)]
    return tuple(ids)


def _source_settings(
    spec: ModelSpec,
    source: HuggingFaceFolder,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    piece_ids: tuple[int, ...],
) -> SourceSettings:
    languages, style, marks_source = _languages(tokenizer)
    surroundings: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    if marks_source:
        for code in languages:
            tokenizer.src_lang = code
            surroundings[code] = (tuple(tokenizer.prefix_tokens), tuple(tokenizer.suffix_tokens))
    pair = _language_pair(spec) in (getattr(source.config, "task_specific_params", None) or {})
    for field, known in (("source_lang", surroundings), ("target_lang", languages if style != "fixed" else {})):
        code = getattr(spec, field)
        if code and code not in known and not pair:
            raise ModelsFileError(
                f"[{spec.name}] {field} is {code!r}, the model knows {', '.join(known) or 'no choice'}"
            )
    prefix, suffix = ((), ()) if marks_source else _surroundings(tokenizer)
    source_lang = spec.source_lang
    if marks_source and not source_lang:
        source_lang = str(source.tokenizer.src_lang)
    return SourceSettings(
        prefix=prefix,
        suffix=suffix,
        text_prefix=spec.prefix if spec.prefix is not None else _prefix(spec, source),
        source_surroundings=surroundings,
        languages=languages,
        target_style=style,
        source_lang=source_lang if marks_source else "",
        target_lang=spec.target_lang if spec.target_lang in languages else "",
        unk_token_id=_unknown(folder),
        piece_ids=piece_ids,
    )


def _unknown(folder: Path) -> int | None:
    """The id that the written source tokenizer gives to what it does not know."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    found: int | None = model["unk_id"] if model["type"] == "Unigram" else model["vocab"].get(model.get("unk_token"))
    return found


def _languages(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, int], TargetStyle, bool]:
    """The token of each language, how an answer's is asked for, and whether a source is marked with its own."""
    name = type(tokenizer).__name__
    if name == "MarianTokenizer":
        codes = {token[2:-2]: index for token, index in tokenizer.encoder.items() if token.startswith(">>")}
        return codes, TargetStyle.TEXT_CODE if codes else TargetStyle.FIXED, False
    if name.startswith("MBartTokenizer"):  # its answers begin with the language in place of a start token
        return dict(tokenizer.lang_code_to_id), TargetStyle.FIXED, True
    if name.startswith("NllbTokenizer"):
        tokens = tokenizer.extra_special_tokens
        return {code: tokenizer.convert_tokens_to_ids(code) for code in tokens}, TargetStyle.FORCED_BOS, True
    if hasattr(tokenizer, "lang_code_to_id"):  # mBART-50
        return dict(tokenizer.lang_code_to_id), TargetStyle.FORCED_BOS, True
    if hasattr(tokenizer, "lang_token_to_id"):  # M2M100
        codes = {code: tokenizer.get_lang_id(code) for code in tokenizer.lang_code_to_token}
        return codes, TargetStyle.FORCED_BOS, True
    return {}, TargetStyle.FIXED, False


def _surroundings(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens before and behind a text."""
    text = "hello"
    inner = tokenizer(text, add_special_tokens=False).input_ids
    whole = tokenizer(text).input_ids
    for start in range(len(whole) - len(inner) + 1):
        if whole[start : start + len(inner)] == inner:
            return tuple(whole[:start]), tuple(whole[start + len(inner) :])
    raise UnsupportedTokenizer(f"the tokenizer gives {whole} with special tokens and {inner} without")


def _language_pair(spec: ModelSpec) -> str:
    return f"translation_{spec.source_lang}_to_{spec.target_lang}"


def _task_params(spec: ModelSpec, source: HuggingFaceFolder) -> dict[str, Any]:
    """The config's settings for the task, as transformers' pipeline takes them; T5 has some for pairs of languages."""
    params = getattr(source.config, "task_specific_params", None) or {}
    found: dict[str, Any] = params.get(_language_pair(spec)) or params.get(spec.task) or {}
    return found


def _prefix(spec: ModelSpec, source: HuggingFaceFolder) -> str:
    config = source.config
    prefix: str = _task_params(spec, source).get("prefix") or getattr(config, "prefix", None) or ""
    return prefix


def generation_config(source: HuggingFaceFolder, params: dict[str, Any]) -> GenerationConfig:
    """The model's generation config with its settings for a task."""
    config = source.generation_config
    config.update(**{key: value for key, value in params.items() if key != "prefix"})
    return config


def task_generation_config(spec: ModelSpec, source: HuggingFaceFolder) -> GenerationConfig:
    """The generation config with the settings of a table's task."""
    return generation_config(source, _task_params(spec, source))


def read_defaults(source: HuggingFaceFolder, params: dict[str, Any]) -> GenerationDefaults:
    """The generation config as the runtime reads it.

    Raises:
        UnsupportedModel: it asks for something that the search lacks.
    """
    config = generation_config(source, params)
    for name, harmless in _UNKNOWN_SETTINGS.items():
        if getattr(config, name, None) not in harmless:
            raise UnsupportedModel(
                f"the generation config sets {name} to {getattr(config, name)!r}, which is not supported"
            )
    ends = _ids(config.eos_token_id)
    start = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.bos_token_id
    if start is None:
        raise UnsupportedModel("the generation config has neither decoder_start_token_id nor bos_token_id")
    bad_words = [tuple(word) for word in config.bad_words_ids or [] if list(word) not in [[end] for end in ends]]
    return GenerationDefaults(
        prompt=_ids(start),
        eos_token_ids=ends,
        max_length=0 if config.max_length in (None, _HUGGING_FACE_MAX_LENGTH) else config.max_length,
        min_length=config.min_length or 0,
        num_beams=config.num_beams or 1,
        length_penalty=float(config.length_penalty if config.length_penalty is not None else 1.0),
        early_stopping=config.early_stopping or False,
        repetition_penalty=float(config.repetition_penalty or 1.0),
        no_repeat_ngram_size=config.no_repeat_ngram_size or 0,
        bad_words=tuple(bad_words),
        forced_bos_token_id=config.forced_bos_token_id,
        forced_eos_token_ids=_ids(config.forced_eos_token_id),
        suppress_tokens=_ids(config.suppress_tokens),
        begin_suppress_tokens=_ids(config.begin_suppress_tokens),
    )


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)
