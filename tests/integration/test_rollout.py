"""A model changes to another version and back under load: no request is lost, none is answered by parts of two."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

from tests import tiny_models
from tests.integration.test_hot_changes import Load
from trident_client import Client
from trident_export import install, models_file
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


def test_promoted_and_rolled_back_under_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repository = tmp_path / "repository"

    def export(*specs: ModelSpec, beside: bool = False) -> list[str]:
        said: list[str] = []
        install.export(specs, repository, tmp_path, tmp_path / "cache", said.append, beside=beside)
        return said

    export(classifier(tmp_path, 1), generator(tmp_path, 1))
    said = export(classifier(tmp_path, 2), generator(tmp_path, 2), beside=True)
    assert len([line for line in said if "version 2 lies beside version 1: trident-export promote" in line]) == 2
    again = export(classifier(tmp_path, 2))  # as `make serve` does
    assert again == ["mood: version 2 is what models.toml says, and waits: trident-export promote mood"]

    with contextlib.ExitStack() as stack:
        server = stack.enter_context(local.running(repository, tmp_path / "log"))
        client = stack.enter_context(Client(server.grpc_url, timeout=60))

        def command(*words: str) -> str:
            assert commands.main([*words, "--repository", str(repository), "--url", server.grpc_url]) == 0
            return capsys.readouterr().err.splitlines()[-1]

        def mood() -> tuple[str, ...]:
            return tuple(f"{label.label} {label.score:.4f}" for label in client.classify(TEXT, model="mood", top_k=3))

        def text() -> str:
            return client.generate("A", model="gen", max_tokens=20).text

        def long_answer(answers: list[str]) -> threading.Thread:
            """An answer that is begun before a change and ends after it."""
            stream = client.stream("A", model="gen", max_tokens=110, min_tokens=110)
            first = next(stream).text
            thread = threading.Thread(target=lambda: answers.append(first + "".join(part.text for part in stream)))
            thread.start()
            return thread

        old: Any = (mood(), text())
        whole = client.generate("A", model="gen", max_tokens=110, min_tokens=110).text
        loads = [Load(mood, 2), Load(text, 2)]
        for load in loads:
            stack.callback(load.stop)
        answers: list[str] = []
        running = long_answer(answers)
        digest = artefacts.read_versions(repository, "gen")[2].digest[:12]
        said_now = command("promote", "gen")
        assert said_now == f"trident-export: {server.grpc_url} serves version 2 of gen, {digest}; before it was 1"
        running.join()
        assert answers == [whole]
        assert "serves version 2 of mood" in command("promote", "mood")
        new = (mood(), text())
        assert old[0] != new[0]
        assert old[1] != new[1]
        assert "serves version 1 of mood" in command("rollback", "mood")
        assert "serves version 1 of gen" in command("rollback", "gen")
        assert (mood(), text()) == old
        for load in loads:
            load.stop()
        assert [load.errors for load in loads] == [[], []]
        assert [set(load.answers) for load in loads] == [set(pair) for pair in zip(old, new, strict=True)]
        assert all(load.answers.total() > 20 for load in loads)
        ready = sorted((each.name, each.version) for each in client.models() if each.state == "READY")
        assert ready == [(name, "1") for name in ("gen", "mood", "mood_model", "mood_postprocess", "mood_tokenizer")]

        # A version that can't be loaded changes nothing, and the server is ready again.
        kept = repository / "gen/2/config.pbtxt"
        kept.write_text(kept.read_text().replace('string_value: "128"', 'string_value: "100000"'))
        manifest = artefacts.read_manifest(repository, "gen", 2)
        assert manifest is not None
        files = artefacts.checksums(repository, ["gen"], "2")
        dataclasses.replace(manifest, files=files).write(repository / "gen/2")
        assert commands.main(["promote", "gen", "--repository", str(repository), "--url", server.grpc_url]) == 1
        said_now = capsys.readouterr().err
        assert (
            "the server can't load version 2 of gen, and goes on with 1: load failed for model 'gen_trial'" in said_now
        )
        deadline = time.monotonic() + 20
        while not client.health().ready and time.monotonic() < deadline:
            assert (mood(), text()) == old
            time.sleep(0.1)
        assert client.health().ready
        assert (mood(), text()) == old
