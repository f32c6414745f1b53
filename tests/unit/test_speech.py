"""Speech without a model: files to samples, samples to features, the rule of timestamps, segments."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import GenerationConfig, WhisperFeatureExtractor
from transformers.generation.logits_process import WhisperTimeStampLogitsProcessor
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

from trident_export.measure import signals
from trident_serving.errors import Cancelled, InvalidRequest
from trident_serving.runtime.sampling.candidates import Candidates
from trident_serving.speech import audio, request, transcript
from trident_serving.speech.features import FeatureSettings, LogMel
from trident_serving.speech.rules import Timestamps
from trident_serving.speech.transcript import Clock

RATE = 16000
FIRST, EOS = 40, 30  # tokens of a small vocabulary: text up to EOS, then special ones, timestamps from FIRST on


def encoded(samples: NDArray[Any], rate: int = RATE, kind: str = "WAV", **more: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, **more)
    return file.getvalue()


def sounds() -> dict[str, NDArray[np.float32]]:
    random, time = np.random.default_rng(0), np.arange(5 * RATE) / RATE
    found = {
        "speech": signals.spoken(12.3, 1),
        "longer than a window": signals.spoken(47.31, 3),
        "quiet": 1e-4 * signals.spoken(5, 2),
        "noise": 0.1 * random.standard_normal(5 * RATE),
        "tone": 0.5 * np.sin(2 * np.pi * 440 * time) + 1e-3 * random.standard_normal(5 * RATE),
        "silence": np.zeros(RATE),
        "click": np.eye(1, RATE, 8000)[0],
        "ten samples": np.full(10, 0.1),
    }
    return {name: samples.astype(np.float32) for name, samples in found.items()}


@pytest.mark.parametrize("mels", [80, 128])
def test_features_are_those_of_transformers(mels: int) -> None:
    """Within a millionth of its own numpy code. Its torch code computes in float32, whose noise is up to 1e-4 where a
    tone stands alone, and below 1e-5 elsewhere: what we differ by from that is its distance from its numpy code."""
    extract = WhisperFeatureExtractor(feature_size=mels)
    log_mel = LogMel(FeatureSettings(RATE, 400, 160, 3000), extract.mel_filters.astype(np.float32))
    for name, samples in sounds().items():
        found = log_mel(samples)
        padded = np.pad(samples, (0, max(480000 - len(samples), 0)))
        exact = extract._np_extract_fbank_features(padded[None], "cpu")[0]
        assert found.dtype == np.float32
        assert found.shape == exact.shape
        assert np.abs(found - exact).max() < 1e-6, name
        more = {"truncation": False, "padding": "longest"} if len(samples) > 480000 else {}
        called = extract(samples, sampling_rate=RATE, return_tensors="np", **more).input_features[0]
        noise = np.abs(exact - called).max()
        assert noise < (1e-5 if name in ("quiet", "noise", "silence", "click", "ten samples") else 1e-4), name
        assert np.abs(found - called).max() <= noise + 1e-6, name


@pytest.mark.parametrize(("kind", "error"), [("WAV", 1e-4), ("FLAC", 1e-4), ("MP3", 0.02), ("OGG", 0.1)])
def test_files_of_every_format_become_samples(kind: str, error: float) -> None:
    samples = signals.spoken(1.7, 4)
    found = audio.decode(encoded(samples, kind=kind), RATE, 60)
    assert found.dtype == np.float32
    assert abs(len(found) - len(samples)) <= (0 if error < 1e-3 else 3000)
    assert np.abs(found[: len(samples)] - samples[: len(found)]).max() < error


def test_channels_are_averaged_and_other_rates_resampled() -> None:
    left, right = signals.spoken(5.0, 1, 44100), signals.spoken(5.0, 2, 44100)
    found = audio.decode(encoded(np.stack([left, right], axis=1), 44100, subtype="FLOAT"), RATE, 60)
    expected = soxr.resample((left + right) / 2, 44100, RATE)
    assert len(found) == len(expected) == 5 * RATE
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"hello, this is text", "audio is no WAV, FLAC, MP3 or Ogg file: it begins with b'hello, this "),
        (b"RIFF\x10\0\0\0WAVEfmt ", "audio can't be decoded: "),
        (b"fLaC" + bytes(64), "audio can't be decoded: "),
        (b"\xff\xfb\x90\x00", "audio can't be decoded: "),
        (encoded(np.zeros(100), 1), "audio has a sample rate of 1 Hz, it must be between 4000 and 192000"),
        (encoded(np.zeros(100), 2**31 - 1), "audio has a sample rate of 2147483647 Hz, it must be between 4000 and"),
        (encoded(np.zeros((9, 17))), "audio has 17 channels, the limit is 16"),
        (encoded(np.zeros(0)), "audio is empty: the file holds no samples"),
        (encoded(np.full(9, np.nan), subtype="FLOAT"), "audio holds samples that are no numbers"),
        (encoded(np.full(9, 1e30), subtype="FLOAT"), "audio holds samples that are no numbers, or beyond 1000 times"),
        (encoded(np.zeros(61 * RATE), kind="FLAC"), "audio has 61 seconds, the limit is 60: send it in parts"),
        (encoded(np.zeros(90 * RATE), kind="MP3"), "audio has at least 6"),
    ],
)
def test_files_that_are_no_recordings_are_refused_with_a_sentence(content: bytes, said: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{said}".replace("(", "\\(")) as caught:
        audio.decode(content, RATE, 60)
    assert "\n" not in str(caught.value)


def test_ten_hours_are_refused_by_their_header_and_a_cut_file_is_read_to_its_end() -> None:
    hours = io.BytesIO()
    with soundfile.SoundFile(hours, "w", 4000, 1, "PCM_S8", format="FLAC") as file:
        for _ in range(36):
            file.write(np.zeros(4_000_000, np.int16))
    with pytest.raises(InvalidRequest, match="audio has 36000 seconds, the limit is 1800: send it in parts"):
        audio.decode(hours.getvalue(), RATE, 1800)
    whole = encoded(signals.spoken(2.0, 1))
    assert len(audio.decode(whole[: len(whole) // 2], RATE, 60)) == pytest.approx(RATE, abs=50)


def test_between_two_blocks_decoding_can_be_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio, "_BLOCK", 1000)
    content, asked = encoded(signals.spoken(1.0, 1)), 0

    def check() -> None:
        nonlocal asked
        asked += 1
        if asked == most:
            raise Cancelled

    most = 100
    assert np.array_equal(audio.decode(content, RATE, 60, check), audio.decode(content, RATE, 60))
    assert asked == 17  # 16 blocks are full, and one is empty
    asked, most = 0, 3
    with pytest.raises(Cancelled):
        audio.decode(content, RATE, 60, check)
    assert asked == 3


@given(
    answer=st.lists(st.one_of(st.integers(0, EOS - 1), st.integers(FIRST, FIRST + 19)), max_size=6),
    seed=st.integers(0, 2**16),
    most=st.one_of(st.none(), st.integers(0, 25)),
)
@settings(max_examples=300, deadline=None)
def test_the_rule_of_timestamps_is_that_of_transformers(answer: list[int], seed: int, most: int | None) -> None:
    prompt = [31, 32, 33]
    config = GenerationConfig(no_timestamps_token_id=FIRST - 1, eos_token_id=EOS, max_initial_timestamp_index=most)
    scores = (3 * np.random.default_rng(seed).standard_normal(FIRST + 20)).astype(np.float32)
    tokens = [*prompt, *answer]
    expected = WhisperTimeStampLogitsProcessor(config, begin_index=3)(
        torch.tensor([tokens]), torch.tensor(scores[None])
    )
    candidates = Candidates(scores.copy())
    Timestamps(FIRST, EOS, 3, most)(np.array(tokens), candidates)
    assert np.array_equal(candidates.scores, expected[0].numpy())


@given(
    tokens=st.lists(st.one_of(st.integers(0, EOS - 1), st.integers(FIRST, FIRST + 50)), min_size=1, max_size=12),
    seek=st.integers(0, 500),
    frames=st.integers(1, 100),
)
@settings(max_examples=300, deadline=None)
@example(tokens=[0], seek=0, frames=54)
def test_windows_are_cut_into_segments_as_transformers_does(tokens: list[int], seek: int, frames: int) -> None:
    offset = torch.tensor([seek], dtype=torch.float64) * 0.02 / 2
    expected, further = WhisperGenerationMixin._retrieve_segment(
        torch.tensor(tokens), [None], offset, FIRST, torch.tensor([frames]), 0.02, 0.01, 2, 0, 0, False,
        torch.zeros(1, 3),
    )  # fmt: skip
    found, offset_frames = transcript.cut(tokens, [-1.0] * len(tokens), Clock(FIRST, 0.02, 2), seek, frames, 0.25)
    assert [list(each.tokens) for each in found] == [each["tokens"].tolist() for each in expected]
    for mine, theirs in zip(found, expected, strict=True):
        end = float(theirs["end"])
        if max(tokens) <= FIRST and [FIRST, FIRST] not in map(list, pairwise(tokens)):
            # To the end of the recording, where transformers' float32 has 26 steps in 54 frames.
            assert mine.end - end == pytest.approx(0.0, abs=0.0201)
            end = seek * 0.01 + frames // 2 * 0.02
        assert (mine.start, mine.end) == pytest.approx((float(theirs["start"]), end))
        assert (mine.log_prob, mine.no_speech) == (-1.0 if mine.tokens else 0.0, 0.25)
    assert offset_frames == max(int(further), 1)


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(25, 55), max_size=20))
def test_what_is_settled_stays(tokens: list[int]) -> None:
    """Whatever comes behind a beginning of a window's answer, its settled tokens are in the transcript."""
    segments, _ = transcript.cut(tokens, [0.0] * len(tokens), Clock(FIRST, 0.02, 2), 0, 1000)
    kept = [token for segment in segments for token in segment.tokens]
    before = 0
    for length in range(len(tokens) + 1):
        settled = transcript.settled(tokens[:length], FIRST)
        assert before <= settled <= length
        assert tokens[:settled] == kept[:settled]
        before = settled


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.text(alphabet=" \n\u3000ab", max_size=4), max_size=8))
def test_white_space_around_a_text_in_parts(parts: list[str]) -> None:
    stripped = transcript.Stripped()
    found = [stripped.push(part) for part in parts]
    assert "".join(found) == "".join(parts).strip()


def test_a_file_in_base64_is_the_file() -> None:
    """JSON holds no bytes; what is neither a file nor one in Base64 is left to be refused."""
    for kind in ("WAV", "FLAC", "MP3", "OGG"):
        content = encoded(signals.spoken(0.3, 1), kind=kind)
        assert request._decoded(content) == request._decoded(base64.b64encode(content)) == content
    for content in (b"no sound", base64.b64encode(b"no sound"), b"UklGR!", b"=="):
        assert request._decoded(content) == content


def test_what_libraries_print_of_broken_files_comes_out_nowhere() -> None:
    """In a process of its own, whose standard error else works as before."""
    program = """if True:
        import os, sys
        from trident_serving.speech import audio
        if sys.argv[1] == "silence":
            audio.silence()
        print(len(audio.decode(bytes.fromhex("ffe318c4") * 5000, 16000, 60)))
        print("python", file=sys.stderr, flush=True)
        os.write(2, b"descriptor")
    """
    found = [
        subprocess.run([sys.executable, "-c", program, word], capture_output=True, text=True, check=True)
        for word in ("loud", "silence")
    ]
    assert found[0].stdout == found[1].stdout
    assert "libmpg123" in found[0].stderr
    assert found[1].stderr == "python\ndescriptor"
