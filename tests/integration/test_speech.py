"""Whisper against transformers' `generate`, in process and through the real server, its clients and the gateway.

Random weights, windows of two seconds. Many recordings decode together; every token must be that of transformers with
the same arguments, one recording at a time.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import soundfile
import torch
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

from tests import gateways, tiny_models
from tests.gateways import Gateway
from trident_client import AsyncClient, Client, DeadlineExceededError, InvalidRequestError, NotFoundError, _tasks, cli
from trident_export import add, install, models_file, tasks
from trident_export.errors import FidelityError
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.measure import signals, spoken_sentences
from trident_export.tasks import speech
from trident_serving.artefacts import VERSION
from trident_serving.errors import DeadlineExceeded
from trident_serving.launcher import local
from trident_serving.launcher.local import LocalServer
from trident_serving.schema.limits import SpeechLimits
from trident_serving.speech import audio
from trident_serving.speech.service import Reply, SpeechService

pytestmark = pytest.mark.usefixtures("one_thread")

LIMITS = {"max_target_tokens": 64, "slots": 8, "max_beams": 4, "threads": 1, "max_seconds": 20}
RATE = 16000


def wav(samples: np.ndarray[Any, Any], rate: int = RATE, kind: str = "WAV", subtype: str | None = "FLOAT") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


# Seconds of the recordings: shorter than a window, as long, and of several.
RECORDINGS = {seconds: signals.spoken(seconds, number) for number, seconds in enumerate((0.3, 1.4, 2.0, 5.3, 9.0))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speech")
    tiny_models.make_whisper(path / "whisper", 0)
    tiny_models.make_whisper(path / "whisper-en", 3, multilingual=False, mels=128, repetition_penalty=1.2)
    specs = [
        models_file.parse(
            name,
            {
                "task": "automatic-speech-recognition",
                "source": {"path": str(path / name)},
                "variants": variants,
                "limits": LIMITS,
            },
        )
        for name, variants in (("whisper", ["fp32", "int8"]), ("whisper-en", ["fp32"]))
    ]
    install.export(specs, path / "repository", path, path / "cache", lambda message: None)
    return path


@pytest.fixture(scope="module")
def speech_server(folder: Path) -> Iterator[LocalServer]:
    with local.running(folder / "repository", folder / "log") as running:
        yield running


@pytest.fixture(scope="module")
def speech_gateway(speech_server: LocalServer, folder: Path) -> Iterator[Gateway]:
    with gateways.running(
        folder / "gateway.log", speech_server.grpc_url, flags=("--alias", "whisper-1=whisper")
    ) as running:
        yield running


@pytest.fixture
def connected(speech_server: LocalServer) -> Iterator[Client]:
    with Client(speech_server.grpc_url, timeout=60) as client:
        yield client


class Waiter:
    """A channel that a test can wait for."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.gone = False
        self.result: Reply | Exception | None = None
        self.parts: list[Reply] = []

    def is_cancelled(self) -> bool:
        return self.gone

    def send(self, reply: Reply) -> None:
        self.parts.append(reply)
        self.result = reply
        if reply.finish_reason:
            self.done.set()

    def fail(self, error: Exception) -> None:
        self.result = error
        self.done.set()

    def wait(self) -> Reply:
        assert self.done.wait(60)
        assert isinstance(self.result, Reply), self.result
        return self.result


def tensors(content: bytes, **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"audio": np.array([[content]], np.object_)}
    for name, value in options.items():
        kind = {str: np.object_, bool: np.bool_, int: np.int32, float: np.float32}[type(value)]
        given[name] = np.array([[value.encode() if isinstance(value, str) else value]], kind)
    return given


ASKED: list[dict[str, Any]] = [
    {},
    {"language": "de"},
    {"language": "french", "task": "translate"},
    {"task": "transcribe"},
    {"language": "<|ja|>", "num_beams": 3},
    {"language": "en", "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
]


@pytest.mark.parametrize("name", ["whisper", "whisper-en"])
def test_every_token_is_that_of_generate(folder: Path, name: str) -> None:
    """Short and long recordings, with and without timestamps, all in one batch."""
    model = WhisperForConditionalGeneration.from_pretrained(folder / name).eval()
    extract = WhisperFeatureExtractor.from_pretrained(folder / name)
    tokenizer = WhisperTokenizer.from_pretrained(folder / name)
    service = SpeechService(folder / "repository" / name / VERSION, SpeechLimits(**(LIMITS | {"max_waiting": 64})))
    asked = {2.0: ASKED, 5.3: [ASKED[0], ASKED[4]]} if name == "whisper" else {}
    waiting = []
    try:
        for seconds, samples in RECORDINGS.items():
            for options in asked.get(seconds, ASKED[:1]):
                for timestamps in (False, True):
                    waiter = Waiter()
                    given = tensors(wav(samples), timestamps=timestamps, **options)
                    service.submit(service.parse(given), waiter)
                    streamed = Waiter()
                    service.submit(service.parse({**given, "stream": np.array([[True]])}), streamed)
                    waiting.append((seconds, options, timestamps, waiter, streamed))
        seen = set()
        for seconds, options, timestamps, waiter, streamed in waiting:
            reply = waiter.wait()
            last = streamed.wait()
            joined = "".join(part.text for part in streamed.parts)
            tokens = tuple(token for part in streamed.parts for token in part.tokens)
            parts = tuple(each for part in streamed.parts for each in part.segments)
            assert (joined, tokens, parts) == (reply.text, reply.tokens, reply.segments)
            assert (last.finish_reason, last.language, last.count) == (reply.finish_reason, reply.language, reply.count)
            assert [part.finish_reason for part in streamed.parts[:-1]] == [""] * (len(streamed.parts) - 1)
            long = {"truncation": False, "padding": "longest"} if seconds > 2 else {}
            features = extract(RECORDINGS[seconds], sampling_rate=RATE, return_tensors="pt", **long).input_features
            with torch.inference_mode():
                found = model.generate(
                    features, return_timestamps=timestamps or seconds > 2, return_segments=True, **options
                )
            segments = found["segments"][0]
            if seconds < 2:  # where transformers goes on in the padding, the server ends with the recording
                begun = [each for each in segments if float(each["start"]) < seconds]
                segments = segments[: max(len(begun), 1)]
            expected = [token for each in segments for token in each["tokens"].tolist()]
            assert list(reply.tokens)[: len(expected)] == expected[: len(reply.tokens)], (seconds, options, timestamps)
            assert len(reply.tokens) == len(expected) or seconds < 2
            assert reply.text == tokenizer.decode(reply.tokens, skip_special_tokens=True).strip()
            assert reply.duration == pytest.approx(seconds)
            if seconds >= 2 and timestamps:
                assert [list(each.tokens) for each, _ in reply.segments] == [e["tokens"].tolist() for e in segments]
                for (mine, text), theirs in zip(reply.segments, segments, strict=True):
                    times = (min(float(theirs[name]), seconds) for name in ("start", "end"))
                    assert (mine.start, mine.end) == pytest.approx(tuple(times))
                    assert text == tokenizer.decode(mine.tokens, skip_special_tokens=True)
            seen.add(len(reply.segments))
        assert max(seen) > 4
    finally:
        service.stop()


@pytest.mark.parametrize("gone", [True, False], ids=["gone", "late"])
def test_who_has_gone_or_is_late_frees_the_reader(folder: Path, monkeypatch: pytest.MonkeyPatch, gone: bool) -> None:
    """Two recordings, one for each reader, whose decoding would take 96 s; the third is answered nevertheless."""
    read, begun = soundfile.SoundFile.read, threading.Semaphore(0)

    def read_slowly(file: Any, frames: int, **options: Any) -> Any:
        begun.release()
        time.sleep(0.02)
        return read(file, frames, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", read_slowly)
    monkeypatch.setattr(audio, "_BLOCK", 500)
    service = SpeechService(folder / "repository/whisper" / VERSION, SpeechLimits(**(LIMITS | {"max_seconds": 600})))
    try:
        long = tensors(wav(np.zeros(600 * 4000), 4000, subtype="PCM_16"))
        slow, last = [Waiter(), Waiter()], Waiter()
        for each in slow:
            service.submit(service.parse(long, None if gone else 400_000), each)
        for _ in range(4):
            assert begun.acquire(timeout=20)
        service.submit(service.parse(tensors(wav(RECORDINGS[0.3]))), last)
        if gone:
            assert not last.done.wait(0.5)
            for each in slow:
                each.gone = True
            assert {each.wait().finish_reason for each in slow} == {"cancelled"}
        else:
            assert all(each.done.wait(20) for each in slow)
            said = "the timeout of 0.4 s was over before the recording was read"
            assert [(type(each.result), str(each.result)) for each in slow] == [(DeadlineExceeded, said)] * 2
        assert last.wait().duration == pytest.approx(0.3)
    finally:
        service.stop()


def test_the_language_is_heard_as_transformers_hears_it(folder: Path, connected: Client) -> None:
    model = WhisperForConditionalGeneration.from_pretrained(folder / "whisper").eval()
    extract = WhisperFeatureExtractor.from_pretrained(folder / "whisper")
    tokenizer = WhisperTokenizer.from_pretrained(folder / "whisper")
    heard = set()
    for seed in range(4):
        samples = signals.spoken(2.0, 20 + seed) * (1.0, 0.05, 0.3, 0.002)[seed]
        features = extract(samples, sampling_rate=RATE, return_tensors="pt").input_features
        expected = tokenizer.decode(model.detect_language(features)[0])
        heard.add(connected.transcribe(wav(samples), model="whisper", max_tokens=3).language)
        assert f"<|{connected.transcribe(wav(samples), model='whisper', max_tokens=3).language}|>" == expected
    assert heard <= set(tiny_models.LANGUAGES)


def spec_of(folder: Path) -> models_file.ModelSpec:
    table = {"task": "automatic-speech-recognition", "source": {"path": str(folder / "whisper")}, "limits": LIMITS}
    return models_file.parse("whisper", {**table, "variants": ["fp32"]})


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("mel_filters.npy", "the served features differ from transformers' by "),
        ("generation.json", "a recording with(out)? timestamps is answered by the tokens "),
    ],
)
def test_the_gate_refuses_what_hears_or_answers_otherwise(folder: Path, tmp_path: Path, file: str, said: str) -> None:
    shutil.copytree(folder / "repository" / "whisper", tmp_path / "whisper")
    path = tmp_path / "whisper" / VERSION / file
    if file.endswith(".npy"):
        np.save(path, 1.01 * np.load(path))
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"suppress_tokens": list(range(100, 400))}))
    with pytest.raises(FidelityError, match=said):
        tasks.evaluate(spec_of(folder), HuggingFaceFolder(folder / "whisper"), tmp_path)


@pytest.mark.skipif(not spoken_sentences.installed(), reason="espeak-ng, which speaks, is not installed")
def test_words_that_are_heard_wrong(folder: Path) -> None:
    """Random weights hear nearly all of them wrong."""
    limits = SpeechLimits(**(LIMITS | {"max_seconds": 60}))
    found = speech.word_errors(folder / "repository" / "whisper" / VERSION, limits)
    assert set(found) == {"wer_sentences", "wer_recording"}
    assert min(found.values()) > 0.8


def test_whole_answers_are_compared_as_they_are_served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the folder's rules on both sides; Whisper's leave out tokens that are no speech."""
    monkeypatch.setattr(speech, "word_errors", lambda folder, limits: {})
    source = HuggingFaceFolder(folder / "whisper")
    measured = tasks.evaluate(spec_of(folder), source, folder / "repository", thorough=True)["fp32"]
    assert [measured[name] for name in ("bleu", "chrf", "rouge_l")] == pytest.approx([100, 100, 100])


def test_what_is_a_wrong_word() -> None:
    """One put in, one left out, one exchanged, of seven; case and punctuation are none."""
    found = spoken_sentences.error_rate(["A cat sat.", "It isn't three, is"], ["a big CAT; sat", "it is three"])
    assert found == pytest.approx(3 / 7)


def test_a_folder_is_proposed_for_speech(folder: Path) -> None:
    proposal = add.propose(folder / "whisper", {"path": str(folder / "whisper")})
    assert proposal.table["task"] == "automatic-speech-recognition"
    assert proposal.table["limits"] == {"max_target_tokens": 64}


def test_every_client_gives_the_same(
    folder: Path,
    connected: Client,
    speech_server: LocalServer,
    speech_gateway: Gateway,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "speech.flac"
    file.write_bytes(wav(RECORDINGS[5.3], kind="FLAC", subtype="PCM_16"))
    whole = connected.transcribe(file, model="whisper", language="de", timestamps=True)
    assert whole.language == "de"
    assert whole.duration == pytest.approx(5.3)
    assert len(whole.segments) > 1
    assert "".join(each.text for each in whole.segments).strip() == whole.text
    assert [each.start for each in whole.segments] == sorted(each.start for each in whole.segments)
    assert sum(len(each.tokens) for each in whole.segments) == whole.num_output_tokens
    plain = connected.transcribe(file.read_bytes(), model="whisper", language="German")
    assert (plain.text, plain.segments) == (whole.text, ())

    async def ask() -> Any:
        async with AsyncClient(speech_server.grpc_url) as client:
            return await client.transcribe(str(file), model="whisper", language="de", timestamps=True)

    assert asyncio.run(ask()) == whole
    with Client(speech_server.http_url) as http:
        assert http.transcribe(file, model="whisper", language="de", timestamps=True) == whole

    for url in (speech_server.grpc_url, speech_server.http_url):
        with Client(url) as streaming:
            chunks = list(streaming.stream_transcription(file, model="whisper", language="de", timestamps=True))
            assert sum(bool(chunk.text) for chunk in chunks) > 1
            assert _tasks.transcription(chunks) == whole

    async def stream() -> list[Any]:
        async with AsyncClient(speech_server.grpc_url) as client:
            return [chunk async for chunk in client.stream_transcription(file, model="whisper", language="de")]

    assert "".join(chunk.text for chunk in asyncio.run(stream())) == whole.text

    at = ["--url", speech_server.grpc_url]
    asked = ["transcribe", str(file), "--model", "whisper", "--language", "de"]
    assert cli.main([*asked, *at]) == 0
    assert capsys.readouterr().out == whole.text + "\n"
    assert cli.main([*asked, "--timestamps", "--json", *at]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["text"], len(shown["segments"])) == (whole.text, len(whole.segments))
    assert cli.main([*asked, "--timestamps", *at]) == 0
    first = whole.segments[0]
    assert capsys.readouterr().out.startswith(f"[{first.start:8.2f} - {first.end:8.2f}] ")

    assert cli.main([*asked, "--stream", *at]) == 0
    assert capsys.readouterr().out == whole.text + "\n"
    assert cli.main([*asked, "--stream", "--timestamps", *at]) == 0
    assert capsys.readouterr().out.count("\n") == len(whole.segments)
    assert cli.main([*asked, "--stream", "--jsonl", *at]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ("".join(line["text"] for line in lines), lines[-1]["finish_reason"]) == (whole.text, whole.finish_reason)
    assert cli.main([*asked, "--stream", "--json", *at]) == 2
    assert "--json is one document" in capsys.readouterr().err

    with openai.OpenAI(base_url=f"{speech_gateway.url}/v1", api_key="none", max_retries=0) as client:

        def create(**more: Any) -> Any:
            with file.open("rb") as content:
                return client.audio.transcriptions.create(model="whisper-1", file=content, language="de", **more)

        answer = create()
        assert (answer.text, answer.usage.to_dict()) == (whole.text, {"type": "duration", "seconds": 6})
        *deltas, done = create(stream=True)
        assert {each.type for each in deltas} == {"transcript.text.delta"}
        assert len(deltas) > 1
        assert (done.type, done.text) == ("transcript.text.done", whole.text)
        assert done.usage.to_dict() == {"type": "duration", "seconds": 6}
        assert "".join(each.delta for each in deltas) == whole.text
        assert create(response_format="text").strip() == whole.text
        verbose = create(response_format="verbose_json", timestamp_granularities=["segment"], temperature=0)
        assert (verbose.text, verbose.language, verbose.duration) == (whole.text, "de", pytest.approx(5.3))
        for theirs, ours in zip(verbose.segments, whole.segments, strict=True):
            assert (theirs.start, theirs.end, theirs.text) == (ours.start, ours.end, ours.text)
            assert tuple(theirs.tokens) == ours.tokens
            assert (theirs.avg_logprob, theirs.no_speech_prob) == (ours.log_prob, ours.no_speech)
        srt, vtt = create(response_format="srt"), create(response_format="vtt")
        assert srt.startswith(f"1\n00:00:0{first.start:.3f} --> 00:00:0{first.end:.3f}\n".replace(".", ","))
        assert srt.count(" --> ") == vtt.count(" --> ") == len(whole.segments)
        assert vtt.startswith(f"WEBVTT\n\n00:00:0{first.start:.3f} --> 00:00:0{first.end:.3f}\n")
        with pytest.warns(DeprecationWarning, match="deprecated"):  # OpenAI's, of its client's method
            english = client.audio.translations.create(model="whisper", file=("a.flac", file.read_bytes()))
        assert english.text == connected.transcribe(file, model="whisper", task="translate").text


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        (b"", {}, "audio is empty: send the bytes of a file"),
        (b"this is no sound", {}, "audio is no WAV, FLAC, MP3 or Ogg file"),
        (wav(np.zeros(9), 1), {}, "audio has a sample rate of 1 Hz"),
        (wav(np.zeros(21 * RATE), kind="FLAC", subtype=None), {}, "audio has 21 seconds, the limit is 20"),
        (wav(RECORDINGS[0.3])[:30], {}, "audio can't be decoded"),
        (
            wav(RECORDINGS[0.3]),
            {"language": "klingon"},
            "language 'klingon' is not known to this model; known: de, en, fr, ja",
        ),
        (wav(RECORDINGS[0.3]), {"task": "sing"}, "task must be one of transcribe, translate, found 'sing'"),
        (wav(RECORDINGS[0.3]), {"num_beams": 5}, "num_beams must be between 1 and 4, found 5"),
        (wav(RECORDINGS[0.3]), {"max_tokens": 64}, "max_tokens must be between 1 and "),
        (wav(RECORDINGS[0.3]), {"temperature": 1.0, "num_beams": 2}, "temperature 1 needs num_beams 1, found 2"),
    ],
)
def test_a_bad_request_is_refused_with_a_sentence(
    connected: Client, content: bytes, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        connected.transcribe(content, model="whisper", **options)
    assert said in str(caught.value)


def test_limits_of_a_request_and_of_a_model(connected: Client) -> None:
    short = connected.transcribe(wav(RECORDINGS[2.0]), model="whisper", language="en", max_tokens=2)
    assert (short.num_output_tokens, short.finish_reason) == (2, "length")
    with pytest.raises(InvalidRequestError, match="needs a multilingual model, this one knows English alone"):
        connected.transcribe(wav(RECORDINGS[2.0]), model="whisper-en", task="translate")
    with pytest.raises(InvalidRequestError, match="language 'de' is not known to this model; known: en"):
        connected.transcribe(wav(RECORDINGS[2.0]), model="whisper-en", language="de")
    assert connected.transcribe(wav(RECORDINGS[2.0]), model="whisper-en", language="English").language == "en"
    with pytest.raises(DeadlineExceededError):
        connected.transcribe(wav(RECORDINGS[9.0]), model="whisper", timestamps=True, timeout=0.02)
    for silence in (np.zeros(RATE // 2), np.zeros(3 * RATE)):
        quiet = connected.transcribe(wav(silence), model="whisper", timestamps=True)
        assert quiet.duration == pytest.approx(len(silence) / RATE)
        assert all(each.end <= quiet.duration for each in quiet.segments)
    with pytest.raises(
        NotFoundError, match="the server serves whisper and whisper-en for automatic-speech-recognition"
    ):
        connected.transcribe(wav(RECORDINGS[0.3]))
    assert connected.transcribe(wav(RECORDINGS[2.0]), model="whisper_int8").finish_reason in ("stop", "length")


def test_who_leaves_a_stream_ends_it(connected: Client, speech_server: LocalServer, speech_gateway: Gateway) -> None:
    """Closed at our client, and hung up at the gateway."""

    def cancelled() -> float:
        with urllib.request.urlopen(speech_server.metrics_url, timeout=10) as response:
            text = response.read().decode()
        return float(re.findall(r'^trident_requests_cancelled_total{model="whisper".*} (\S+)$', text, re.MULTILINE)[0])

    def ends_it(leave: Callable[[], None]) -> bool:
        """Whether a cancellation is counted; on a busy machine an answer may be whole before one is heard."""
        for _ in range(5):
            before = cancelled()
            leave()
            deadline = time.monotonic() + 3
            while time.monotonic() < deadline:
                if cancelled() == before + 1:
                    return True
                time.sleep(0.02)
        return False

    long = wav(signals.spoken(19.5, 9))

    def close() -> None:
        stream = connected.stream_transcription(long, model="whisper")
        first = next(stream)
        assert (bool(first.text), first.finish_reason) == (True, "")
        stream.close()

    def hang_up() -> None:
        with openai.OpenAI(base_url=f"{speech_gateway.url}/v1", api_key="none", max_retries=0) as client:
            events = client.audio.transcriptions.create(model="whisper", file=("a.wav", long), stream=True)
            assert next(iter(events)).type == "transcript.text.delta"
            events.close()

    assert ends_it(close)
    assert ends_it(hang_up)


def test_the_gateway_refuses_what_is_no_form(speech_gateway: Gateway) -> None:
    def form(*parts: tuple[str, bytes], name: str = "file", boundary: str = "x") -> tuple[bytes, dict[str, str]]:
        body = b""
        for field, value in parts:
            more = '; filename="a.wav"' if field == name else ""
            head = f'--x\r\nContent-Disposition: form-data; name="{field}"{more}\r\n\r\n'
            body += head.encode() + value + b"\r\n"
        return body + b"--x--\r\n", {"content-type": f"multipart/form-data; boundary={boundary}"}

    path = "/v1/audio/transcriptions"
    file, model = ("file", wav(RECORDINGS[0.3])), ("model", b"whisper")
    cases = [
        (path, form(model), 400, "file is missing: send a recording in the form's field file"),
        (
            path,
            form(("file", b"recording.wav"), model, name=""),
            400,
            "file is a text, no file: send a recording, with curl by -F",
        ),
        (path, form(file), 400, "model is missing"),
        (path, form(file, model, ("prompt", b"hello")), 400, "prompt: "),
        (path, form(file, model, ("stream", b"perhaps")), 400, "stream: "),
        (
            path,
            form(file, model, ("stream", b"true"), ("response_format", b"srt")),
            400,
            "stream has response_format json, found srt",
        ),
        (path, form(("file", b"nothing"), model, ("stream", b"true")), 400, "file is no WAV, FLAC, MP3 or Ogg file"),
        (path, form(file, model, ("colour", b"red")), 400, "colour is not known here"),
        (path, form(file, model, ("temperature", b"hot")), 400, "temperature: "),
        (path, form(file, model, ("timestamp_granularities[]", b"word")), 400, "timestamp_granularities.0: "),
        (path, form(("file", b"nothing"), model), 400, "file is no WAV, FLAC, MP3 or Ogg file"),
        (path, form(file, ("model", b"nobody")), 404, "the model 'nobody' does not exist"),
        (path, form(file, model, boundary="y"), 400, "the body is no form"),
        (path, (b"{}", {}), 415, "the Content-Type must be multipart/form-data, found 'application/json'"),
        ("/v1/embeddings", (b"{}" * 5_000_000, {}), 413, "the body is longer than 8388608 bytes"),
    ]
    for where, (body, headers), status, said in cases:
        found, _, answer = speech_gateway.ask(where, body, headers)
        assert (found, answer["error"]["message"][: len(said)]) == (status, said)
    body, headers = form(
        ("file", wav(np.zeros(9_000_000), subtype="PCM_U8")), model
    )  # beyond the limit of other bodies
    found, _, answer = speech_gateway.ask(path, body, headers)
    assert (found, answer["error"]["message"]) == (400, "file has 562 seconds, the limit is 20: send it in parts")
    assert answer["error"]["param"] == "file"
