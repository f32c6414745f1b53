"""Speech recognition with Whisper: one folder a variant, which `trident_speech` serves."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSpeechSeq2Seq, GenerationConfig, PreTrainedModel

from trident_export import disk
from trident_export.errors import FidelityError, ModelsFileError
from trident_export.graphs.seq2seq import export_decoder, export_encoder
from trident_export.huggingface import speech as speech_files
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.huggingface.vocabulary import rows_of
from trident_export.measure import fidelity, signals, spoken_sentences
from trident_export.models_file import ModelSpec
from trident_export.tasks import Evaluator, Job
from trident_export.tasks.seq2seq import measure
from trident_export.tasks.seq2seq import write as write
from trident_serving.artefacts import VERSION
from trident_serving.errors import InvalidRequest
from trident_serving.schema.limits import SpeechLimits
from trident_serving.speech.features import LogMel
from trident_serving.speech.service import Reply, SpeechService

Floats = NDArray[np.float32]

# Recordings that the gate compares, and tokens of their answers.
GATE_RECORDINGS, GATE_TOKENS, FAR_TARGET = 4, 24, 256
# Of a feature, which is between -1 and 2: float32's noise where transformers computes with torch.
FEATURE_ERROR = 1e-3


def check(spec: ModelSpec, source: HuggingFaceFolder) -> None:
    """See `trident_export.tasks`."""
    source.check_head(AutoModelForSpeechSeq2Seq)
    speech_files.check(source)
    limits, positions = _limits(spec), source.config.max_target_positions
    if limits.max_target_tokens > positions:
        raise ModelsFileError(
            f"[{spec.name}] limits.max_target_tokens is {limits.max_target_tokens}, the decoder has {positions} "
            "positions"
        )


def trace(job: Job) -> None:
    """See `trident_export.tasks`."""
    job.progress("loading the model")
    model = load_model(job.source)
    disk.require(job.staging, model.num_parameters() * 4, job.spec.recipes)
    speech_files.save_files(job.source, job.assets, rows_of(model))
    job.graphs.mkdir()
    job.progress("tracing the graphs")
    export_encoder(model, job.graphs / "encoder.onnx")
    export_decoder(model, job.graphs / "decoder.onnx", _limits(job.spec).max_target_tokens)


def evaluator(
    spec: ModelSpec, source: HuggingFaceFolder, root: Path, texts: Sequence[str], *, thorough: bool
) -> Evaluator:
    """See `trident_export.tasks`."""
    model = source.reference(AutoModelForSpeechSeq2Seq)
    folder = root / spec.public_name(spec.default_variant) / VERSION
    limits, tokenizer, extract = _limits(spec), source.tokenizer, speech_files.extractor(source)
    window = extract.chunk_length
    recordings = [signals.spoken(window * 0.9, seed, extract.sampling_rate) for seed in range(GATE_RECORDINGS)]
    samples = [_features(extract, recording) for recording in recordings]
    check_features(extract, folder, recordings)
    prompt = speech_files.read_settings(source).prompt(None, None, timestamps=False)
    answers = [answer_ids(model, features, GATE_TOKENS) for features in samples]
    targets = [[*_started(answer, prompt)][: limits.max_target_tokens] for answer in answers]
    words = chain.from_iterable(tokenizer(text, add_special_tokens=False).input_ids for text in texts)
    length = min(limits.max_target_tokens, FAR_TARGET)
    far = samples[0], list(islice(chain(targets[0][: len(prompt)], cycle(list(words))), length))
    reference = reference_logits(model, [*samples, far[0]], [*targets, far[1]])
    expected = [tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True) for ids in targets]

    def evaluate(variant: str) -> dict[str, float]:
        folder = root / spec.public_name(variant) / VERSION
        # As of texts, but that a recording's encoder runs the same for each: it has no length.
        measured = measure(folder, samples, targets, reference, limits.max_target_tokens, limits.threads, far)
        measured.pop(fidelity.LONGEST)
        if spec.recipes[variant].precision == "fp32":
            check_answers(model, folder, limits, extract)
        if thorough:
            heard = served_tokens(folder, limits, recordings, extract.sampling_rate)
            found = [tokenizer.decode(ids, skip_special_tokens=True) for ids in heard]
            measured |= fidelity.compare_texts(expected, found)
            measured |= word_errors(folder, limits)
        return measured

    return evaluate


def load_model(source: HuggingFaceFolder) -> PreTrainedModel:
    """The model in float32, in evaluation mode."""
    return source.load(AutoModelForSpeechSeq2Seq)


def answer_ids(model: PreTrainedModel, features: Floats, length: int) -> list[int]:
    """Hugging Face's greedy answer with the tokens before it, `length` tokens of its own at most."""
    with torch.inference_mode():
        given = model.generate(
            torch.from_numpy(features)[None],
            generation_config=_asked(model, max_new_tokens=length),
            return_dict_in_generate=True,
        )
    ids: list[int] = given.sequences[0].tolist()
    return ids


def reference_logits(model: PreTrainedModel, samples: list[Floats], targets: list[list[int]]) -> list[Floats]:
    """Hugging Face's logits behind each token of the answers, float32 [tokens, vocabulary] for each recording."""
    with torch.inference_mode():
        return [
            model(input_features=torch.from_numpy(features)[None], decoder_input_ids=torch.tensor([target]))
            .logits[0]
            .float()
            .numpy()
            for features, target in zip(samples, targets, strict=True)
        ]


def check_features(extract: Any, folder: Path, recordings: Sequence[Floats]) -> None:
    """The features of recordings against transformers' feature extractor.

    Raises:
        FidelityError: one is otherwise.
    """
    log_mel = LogMel.load(folder)
    for recording in recordings:
        error = float(np.abs(log_mel(recording) - _features(extract, recording)).max())
        if not error <= FEATURE_ERROR:
            raise FidelityError(f"the served features differ from transformers' by {error:g}, allowed {FEATURE_ERROR}")


def check_answers(model: PreTrainedModel, folder: Path, limits: SpeechLimits, extract: Any) -> None:
    """Requests that name nothing but a recording, or timestamps, against `generate`, token for token.

    Raises:
        FidelityError: an answer is another.
    """
    recording = signals.spoken(extract.chunk_length, GATE_RECORDINGS, extract.sampling_rate)
    features = torch.from_numpy(_features(extract, recording))[None]
    service = SpeechService(folder, replace(limits, max_waiting=2))
    try:
        for timestamps in (False, True):
            with torch.inference_mode():
                given = model.generate(
                    features,
                    generation_config=_asked(model, max_new_tokens=GATE_TOKENS),
                    return_timestamps=timestamps,
                    return_segments=True,
                )
            expected = [token for segment in given["segments"][0] for token in segment["tokens"].tolist()]
            reply = _served(service, recording, extract.sampling_rate, timestamps)
            if list(reply.tokens) != expected:
                raise FidelityError(
                    f"a recording {'with' if timestamps else 'without'} timestamps is answered by the tokens "
                    f"{list(reply.tokens)}, Hugging Face's generate gives {expected}"
                )
    finally:
        service.stop()


def word_errors(folder: Path, limits: SpeechLimits) -> dict[str, float]:
    """`wer_sentences` and `wer_recording`: words that are heard wrong of English sentences, by those that are said.

    Each sentence is a recording of its own, and all of them are one. There is no figure where nobody can say them, the
    model knows no English, or its recordings may not be so long.
    """
    service = SpeechService(folder, replace(limits, max_waiting=32))
    try:
        known = service.settings.languages
        if not spoken_sentences.installed() or (known and "en" not in known):
            return {}
        said = spoken_sentences.sentences()
        whole = " ".join(said)
        heard = [_reply(service, spoken_sentences.spoken(text), language="en").text for text in said]
        measured = {"wer_sentences": spoken_sentences.error_rate(said, heard)}
        try:
            found = _reply(service, spoken_sentences.spoken(whole), language="en")
        except InvalidRequest:  # too long
            return measured
        return measured | {"wer_recording": spoken_sentences.error_rate([whole], [found.text])}
    finally:
        service.stop()


class _Waiter:
    """A channel that is waited for."""

    def __init__(self) -> None:
        self.reply: Reply | None = None
        self.error: Exception | None = None
        self.done = threading.Event()

    def is_cancelled(self) -> bool:
        """See `ReplyChannel`, as all here."""
        return False

    def send(self, reply: Reply) -> None:
        """The answer."""
        self.reply = reply
        self.done.set()

    def fail(self, error: Exception) -> None:
        """There is none."""
        self.error = error
        self.done.set()


def served_tokens(folder: Path, limits: SpeechLimits, recordings: Sequence[Floats], rate: int) -> list[tuple[int, ...]]:
    """The tokens of the service's greedy answers to recordings, `GATE_TOKENS` at most."""
    service = SpeechService(folder, replace(limits, max_waiting=2))
    try:
        return [tuple(_served(service, recording, rate, timestamps=False).tokens) for recording in recordings]
    finally:
        service.stop()


def _served(service: SpeechService, recording: Floats, rate: int, timestamps: bool) -> Reply:
    file = io.BytesIO()
    soundfile.write(file, recording, rate, format="WAV", subtype="FLOAT")
    return _reply(service, file.getvalue(), timestamps=timestamps, max_tokens=GATE_TOKENS, num_beams=1)


def _reply(service: SpeechService, content: bytes, **options: bool | int | str) -> Reply:
    """The answer to a recording.

    Raises:
        ServingError: it is refused.
    """
    waiter = _Waiter()
    kinds = {bool: np.bool_, int: np.int32, str: np.object_}
    tensors = {name: np.array([[value]], kinds[type(value)]) for name, value in options.items()}
    service.submit(service.parse({"audio": np.array([[content]], np.object_), **tensors}), waiter)
    waiter.done.wait()
    if waiter.error is not None:
        raise waiter.error
    assert waiter.reply is not None
    return waiter.reply


def _asked(model: PreTrainedModel, **settings: Any) -> GenerationConfig:
    """The folder's generation config for greedy answers of a length."""
    config = copy.deepcopy(model.generation_config)
    assert config is not None
    config.update(do_sample=False, num_beams=1, max_length=None, **settings)
    return config


def _features(extract: Any, recording: Floats) -> Floats:
    found: Floats = extract(recording, sampling_rate=extract.sampling_rate, return_tensors="np").input_features[0]
    return found


def _started(answer: list[int], prompt: Sequence[int]) -> list[int]:
    """An answer of `generate` with its prompt, whose language may have been heard."""
    return answer if len(answer) > len(prompt) else [*answer, answer[-1]]


def _limits(spec: ModelSpec) -> SpeechLimits:
    assert spec.speech
    return spec.speech
