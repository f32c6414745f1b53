"""A model changes to another version and back under load: no request is lost, none is answered by parts of two."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from tests import tiny_models
from tests.integration.test_hot_changes import Load
from trident_client import Client
from trident_export import install, models_file
from trident_export.measure import pictures
from trident_export.models_file import ModelSpec
from trident_export.store import commands
from trident_serving import artefacts
from trident_serving.launcher import local

TEXT = "The quick brown fox jumps over the lazy dog"
pytestmark = pytest.mark.usefixtures("one_thread")


def classifier(folder: Path, seed: int) -> ModelSpec:
    """A classifier whose versions have different labels, so that the parts of two would show."""
    path = folder / f"mood-{seed}"
    names = {number: f"{'abc'[number]}{seed}" for number in range(3)}
    labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    tiny_models.make_reader(path, "bert", AutoModelForSequenceClassification, seed=seed, num_labels=3, **labels)
    limits = {"labels": 3, "max_tokens": 96, "threads": 1}
    table = {"task": "text-classification", "source": {"path": str(path)}, "variants": ["fp32"], "limits": limits}
    return models_file.parse("mood", table)


def generator(folder: Path, seed: int) -> ModelSpec:
    path = tiny_models.make_causal(folder / f"llama-{seed}", "llama", seed=seed)
    limits = {"context": 128, "slots": 8, "threads": 1}
    table = {"task": "text-generation", "source": {"path": str(path)}, "variants": ["fp32"], "limits": limits}
    return models_file.parse("gen", table)


def pair_of_towers(folder: Path, seed: int) -> ModelSpec:
    path = tiny_models.make_vision(folder / f"clip-{seed}", "clip", seed=seed)
    limits = {"height": 32, "width": 32, "dimensions": 24, "max_tokens": 77, "threads": 1}
    table = {"task": "zero-shot-image-classification", "source": {"path": str(path)}, "variants": ["fp32", "int8"]}
    return models_file.parse(
        "pair", table | {"limits": limits, "gates": {"int8": {"agreement": 0.5, "score_error": 1}}}
    )


@contextlib.contextmanager
def served(tmp_path: Path, spec: Callable[[Path, int], ModelSpec]) -> Iterator[tuple[Path, Client, Callable[..., int]]]:
    """A repository with two versions, a client of the server that has the first one, and a command about them."""
    repository = tmp_path / "repository"
    said: list[str] = []
    for version in (1, 2):
        beside = version == 2
        install.export([spec(tmp_path, version)], repository, tmp_path, tmp_path / "cache", said.append, beside=beside)
    name = spec(tmp_path, 1).name
    assert any(f"version 2 lies beside version 1: trident-export promote {name}" in line for line in said)
    install.export([spec(tmp_path, 2)], repository, tmp_path, tmp_path / "cache", said.append)  # as `make serve` does
    assert said[-1] == f"{name}: version 2 is what models.toml says, and waits: trident-export promote {name}"
    with local.running(repository, tmp_path / "log") as server, Client(server.grpc_url, timeout=60) as client:

        def command(word: str) -> int:
            return commands.main([word, name, "--repository", str(repository), "--url", server.grpc_url])

        yield repository, client, command


def under_load(ask: Callable[[], object], command: Callable[..., int], between: Callable[[], None]) -> None:
    """Promote and roll back while somebody asks."""
    old = ask()
    asked: list[object] = []

    def slowly() -> object:
        time.sleep(0.02)
        return ask()

    load = Load(slowly, 2)
    try:
        assert command("promote") == 0
        new = ask()
        assert new != old
        between()
        assert command("rollback") == 0
        asked += [ask(), ask()]
    finally:
        load.stop()
    assert load.errors == []
    assert set(load.answers) == {old, new}
    assert load.answers.total() > 20
    assert asked == [old, old]


def test_a_generator_is_promoted_and_rolled_back_under_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(tmp_path, generator) as (repository, client, command):

        def text(tokens: int = 20) -> str:
            return client.generate("A", model="gen", max_tokens=tokens, min_tokens=tokens).text

        answers: list[str] = []
        whole = text(110)
        stream = client.stream("A", model="gen", max_tokens=110, min_tokens=110)
        first = next(stream).text  # begun before the change, and ended after it
        under_load(text, command, lambda: answers.append(first + "".join(part.text for part in stream)))
        assert answers == [whole]
        digest = artefacts.read_versions(repository, "gen")[2].digest[:12]
        assert f"serves version 2 of gen, {digest}; before it was 1" in capsys.readouterr().err
        assert [(each.name, each.version) for each in client.models() if each.state == "READY"] == [("gen", "1")]

        # A version that can't be loaded changes nothing, and the server is ready again.
        kept = repository / "gen/2/config.pbtxt"
        kept.write_text(kept.read_text().replace('string_value: "128"', 'string_value: "100000"'))
        manifest = artefacts.read_manifest(repository, "gen", 2)
        assert manifest is not None
        files = artefacts.checksums(repository, ["gen"], "2")
        dataclasses.replace(manifest, files=files).write(repository / "gen/2")
        expected = text()
        assert command("promote") == 1
        said = "the server can't load version 2 of gen, and goes on with 1: load failed for model 'gen_trial'"
        assert said in capsys.readouterr().err
        deadline = time.monotonic() + 20
        while not client.health().ready and time.monotonic() < deadline:
            assert text() == expected
            time.sleep(0.1)
        assert client.health().ready
        assert text() == expected


@pytest.mark.slow
def test_an_encoder_is_promoted_and_rolled_back_under_load(tmp_path: Path) -> None:
    with served(tmp_path, classifier) as (_, client, command):

        def labels() -> tuple[str, ...]:
            return tuple(f"{label.label} {label.score:.4f}" for label in client.classify(TEXT, model="mood", top_k=3))

        under_load(labels, command, lambda: None)
        ready = sorted((each.name, each.version) for each in client.models() if each.state == "READY")
        assert ready == [(name, "1") for name in ("mood", "mood_model", "mood_postprocess", "mood_tokenizer")]


@pytest.mark.slow
def test_two_towers_are_promoted_and_rolled_back_under_load(tmp_path: Path) -> None:
    """An image of one version beside a text of the other would be a third answer."""
    files = pictures.files(2)
    with served(tmp_path, pair_of_towers) as (_, client, command):

        def scores() -> tuple[str, ...]:
            found = client.classify_images_zero_shot(files, ["a cat", "rain"], model="pair")
            return tuple(f"{label.label} {label.score:.4f}" for each in found for label in each)

        under_load(scores, command, lambda: None)
        ready = {(each.name, each.version) for each in client.models() if each.state == "READY"}
        graphs = ("_model-image", "_model-text")
        stages = ("", "_int8", "_preprocess", "_postprocess", *graphs, *(f"{graph}_int8" for graph in graphs))
        assert ready == {(f"pair{stage}", "1") for stage in stages}
