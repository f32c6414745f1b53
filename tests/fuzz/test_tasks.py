"""Requests of every other kind of model, recordings, and a repository's files: read, or refused with a sentence."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.test_requests import fields, texts
from tests.fuzz.values import JSON, SURROGATES, near
from tests.unit.test_chat_templates import tokenizer
from tests.unit.test_encoder_stages import encoder
from trident_serving import artefacts
from trident_serving.artefacts import Manifest
from trident_serving.errors import InvalidRequest
from trident_serving.schema.fields import LANGUAGES, SEQ2SEQ, SPEECH, TEMPLATE
from trident_serving.schema.limits import Seq2SeqLimits, SpeechLimits
from trident_serving.seq2seq import request as seq2seq
from trident_serving.seq2seq.request import GenerationDefaults
from trident_serving.seq2seq.source import SourceSettings, SourceText
from trident_serving.speech import audio
from trident_serving.speech import request as speech
from trident_serving.speech.settings import SpeechSettings
from trident_serving.templates import TemplateTask
from trident_serving.text import decode_texts

DEFAULTS = GenerationDefaults(prompt=(1,), eos_token_ids=(2,))
SETTINGS = SpeechSettings(1, 9, 8, languages={"en": 3, "de": 4}, names={"german": "de"}, tasks={"transcribe": 5})


def read(parse: Callable[[], object]) -> Any:
    try:
        return parse()
    except InvalidRequest as error:
        assert str(error)
        assert "Traceback" not in str(error)
        return None


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> seq2seq.RequestParser:
    folder = tmp_path_factory.mktemp("translator")
    tokenizer().save_pretrained(folder)
    SourceSettings(suffix=(0,), languages={"de": 3, "en": 4}, target_lang="de").save(folder)
    limits = Seq2SeqLimits(max_source_tokens=32, max_target_tokens=16, max_windows=4)
    return seq2seq.RequestParser(SourceText.load(folder, 32), DEFAULTS, limits)


@given(inputs=fields(SEQ2SEQ), text=SURROGATES | st.text(max_size=200), timeout=st.none() | JSON)
def test_translations(translator: seq2seq.RequestParser, inputs: dict[str, Any], text: str, timeout: Any) -> None:
    found = read(lambda: translator.parse(inputs | {"text_input": texts(text)}, timeout))
    assert found is None or (1 <= len(found.windows) <= 4 and found.timeout_seconds > 0)


@given(inputs=fields(SPEECH), content=st.binary(max_size=20))
def test_transcriptions(inputs: dict[str, Any], content: bytes) -> None:
    parser = speech.RequestParser(SETTINGS, DEFAULTS, SpeechLimits(max_target_tokens=64))
    sent = inputs | {"audio": np.array([[content]], np.object_)}
    found = read(lambda: parser.parse(sent))
    assert found is None or found.audio == content


def recordings() -> list[bytes]:
    files = []
    for form, subtype in (("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", None)):
        file = io.BytesIO()
        soundfile.write(file, np.sin(np.arange(1600) / 9), 16000, format=form, subtype=subtype)
        files.append(file.getvalue())
    return files


FILES = recordings()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A recording with some bytes changed, cut or added."""
    content = bytearray(draw(st.sampled_from(FILES)))
    for _ in range(draw(st.integers(0, 4))):
        content[draw(st.integers(0, min(len(content) - 1, 200)))] = draw(st.integers(0, 255))
    end = draw(st.integers(0, len(content)) | st.just(len(content)))
    return bytes(content[:end]) + draw(st.binary(max_size=8))


@given(content=damaged())
def test_recordings(content: bytes) -> None:
    found = read(lambda: audio.decode(content, 16000, 2))
    assert found is None or (found.ndim == 1 and len(found) <= 2 * 16000 + 1 and np.isfinite(found).all())


@given(inputs=fields((*TEMPLATE, *LANGUAGES)), text=SURROGATES | st.text("{}%# x", max_size=30))
def test_templates_of_tasks(inputs: dict[str, Any], text: str) -> None:
    parameters = {"generator": "gen", "max_tokens": "8", "target_lang": "English"}
    template = "To {{ target_lang }}: {{ text_input }}"
    task = TemplateTask(parameters | {"task": "translation", "template": template})
    sent = inputs | {"text_input": texts(text)}
    prompts = read(lambda: task.prompts(sent))
    if prompts is not None:
        assert text in prompts[0].text  # it is no template, whatever it looks like
        read(lambda: task.generator_inputs(sent, prompts[0]))


@given(
    given_texts=st.lists(SURROGATES | st.text("ab c", max_size=30), min_size=1, max_size=4),
    truncate=st.none() | st.booleans(),
    most=st.integers(1, 6),
)
def test_texts_of_encoders(given_texts: list[str], truncate: bool | None, most: int) -> None:
    stage = encoder()
    sent = texts(*given_texts)[0]
    found = read(lambda: stage.encode(decode_texts(sent, "text_input"), truncate=truncate))
    assert found is None or (found["input_ids"].shape[0] == len(given_texts) and found["input_ids"].shape[1] in (4, 8))
    found = read(lambda: stage.windows(decode_texts(sent, "text_input"), most, truncate=truncate))
    assert found is None or len(found["window_text"]) <= most


MANIFEST = {
    "name": "m",
    "task": "text-generation",
    "triton_models": ["m"],
    "public_models": {"fp32": "m"},
    "fingerprint": "f",
    "files": {"m/model.onnx": "0" * 64},
    "format": artefacts.FORMAT,
}


@given(manifest=near(MANIFEST).map(json.dumps) | st.text(max_size=30), config=st.text(max_size=40))
def test_manifests(tmp_path: Path, manifest: str, config: str) -> None:
    folder = tmp_path / "m" / "1"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trident.json").write_text(manifest, encoding="utf-8", errors="surrogatepass")
    (tmp_path / "m" / "config.pbtxt").write_text(config, encoding="utf-8", errors="surrogatepass")
    found = artefacts.read_manifest(tmp_path, "m")
    assert found is None or isinstance(found, Manifest)
