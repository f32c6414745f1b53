"""What a Whisper folder says besides its weights: features, the tokens of languages and tasks, the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoFeatureExtractor
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from trident_export.errors import UnsupportedArchitecture, UnsupportedModel
from trident_export.huggingface.folder import HuggingFaceFolder, reading
from trident_export.huggingface.seq2seq import read_defaults
from trident_export.huggingface.vocabulary import check_tokens, drop_tokens_beyond
from trident_serving.speech.features import FeatureSettings
from trident_serving.speech.settings import DETECTED, SpeechSettings

_NO_TIMESTAMPS = "<|notimestamps|>"
# Settings of transformers' long-form transcription that the windows here don't have.
_UNKNOWN_SETTINGS = ("condition_on_prev_tokens", "no_speech_threshold")


def check(source: HuggingFaceFolder) -> None:
    """Check what `save_files` writes, as far as it can be told without the weights.

    Raises:
        UnreadableSource: a file is damaged.
        UnsupportedArchitecture: it is no Whisper.
        UnsupportedModel: the generation config asks for something that the search lacks.
    """
    if source.config.model_type != "whisper":
        raise UnsupportedArchitecture(
            f"{source} is a model of type {source.config.model_type!r}; of speech recognition Trident serves Whisper"
        )
    extractor(source)
    read_settings(source)
    read_defaults(source, {})


def extractor(source: HuggingFaceFolder) -> Any:
    """The feature extractor of transformers.

    Raises:
        UnreadableSource: preprocessor_config.json is missing or damaged, or is not this model's.
        UnsupportedModel: it asks for noise.
    """
    with reading(source.path, "preprocessor_config.json"):
        found = AutoFeatureExtractor.from_pretrained(source.path)
        sizes = found.feature_size, found.nb_max_frames
    expected = source.config.num_mel_bins, 2 * source.config.max_source_positions
    if sizes != expected:
        raise UnsupportedModel(
            f"{source}: preprocessor_config.json makes features of {sizes[0]} x {sizes[1]}, the model reads "
            f"{expected[0]} x {expected[1]}: copy the model again"
        )
    if getattr(found, "dither", 0.0) or getattr(found, "do_normalize", False):
        raise UnsupportedModel(f"{source}: preprocessor_config.json asks for dither or do_normalize, which is not here")
    return found


def save_files(source: HuggingFaceFolder, folder: Path, rows: int) -> None:
    """Write the tokenizer and the settings that the runtime reads.

    Args:
        rows: of the decoder's embedding.

    Raises:
        ExportError: see `check`; or a token has no row.
    """
    folder.mkdir(parents=True)
    source.fast_tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    drop_tokens_beyond(source, folder / "tokenizer.json", rows)
    settings = read_settings(source)
    named = (settings.start, settings.first_timestamp, *settings.languages.values(), *settings.tasks.values())
    check_tokens(source, named, rows)
    settings.save(folder)
    read_defaults(source, {}).save(folder)
    found = extractor(source)
    features = FeatureSettings(found.sampling_rate, found.n_fft, found.hop_length, found.nb_max_frames)
    features.save(folder, np.asarray(found.mel_filters, np.float32))


def read_settings(source: HuggingFaceFolder) -> SpeechSettings:
    """Languages and tasks, from the generation config.

    Raises:
        UnsupportedModel: it lacks the tokens, or asks for what the windows don't have.
    """
    config = source.generation_config
    for name in _UNKNOWN_SETTINGS:
        if getattr(config, name, None):
            raise UnsupportedModel(f"the generation config sets {name}, which is not supported")
    no_timestamps = getattr(config, "no_timestamps_token_id", None)
    if no_timestamps is None:
        no_timestamps = source.tokenizer.convert_tokens_to_ids(_NO_TIMESTAMPS)
    if no_timestamps in (None, source.tokenizer.unk_token_id) and not isinstance(no_timestamps, int):
        raise UnsupportedModel(f"{source} has no token {_NO_TIMESTAMPS}: it is no Whisper that can be asked for text")
    languages = {
        token.removeprefix("<|").removesuffix("|>"): int(index)
        for token, index in (getattr(config, "lang_to_id", None) or {}).items()
    }
    forced = getattr(config, "forced_decoder_ids", None) or getattr(source.config, "forced_decoder_ids", None) or []
    extracted = extractor(source)
    stride = 2  # of the encoder's convolutions
    settings = SpeechSettings(
        start=int(config.decoder_start_token_id),
        no_timestamps=int(no_timestamps),
        no_speech=int(no_timestamps) - 1,
        languages=languages,
        names={name: code for name, code in TO_LANGUAGE_CODE.items() if code in languages},
        tasks={name: int(index) for name, index in (getattr(config, "task_to_id", None) or {}).items()},
        task=getattr(config, "task", None) or "",
        forced=tuple(DETECTED if token is None else int(token) for _, token in forced),
        max_initial_timestamp=getattr(config, "max_initial_timestamp_index", None),
        seconds_per_step=stride * extracted.hop_length / extracted.sampling_rate,
    )
    language = getattr(config, "language", None)
    if not language or not languages:
        return settings
    return SpeechSettings(**{**settings.__dict__, "language": settings.code(language)})
