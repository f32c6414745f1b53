"""`trident-export add` works out a model's table; `trident-export doctor` finds what is wrong with a repository."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from tests import gguf_writer, tiny_models
from tests.conftest import ROOT, run_export, run_export_cold
from tests.unit.test_gguf import CONFIGS, byte_level, make
from trident_export import add, doctor, install, models_file
from trident_export.errors import ModelsFileError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("add")
    readers: dict[str, tuple[str, type, dict[str, Any]]] = {
        "labels": ("roberta", AutoModelForSequenceClassification, {"num_labels": 3}),
        "tokens": ("bert", AutoModelForTokenClassification, {"num_labels": 5}),
        "answers": ("distilbert", AutoModelForQuestionAnswering, {}),
        "masks": ("bert", AutoModelForMaskedLM, {}),
        "vectors": ("mpnet", AutoModel, {}),
        "reranker": ("bert", AutoModelForSequenceClassification, {"num_labels": 1}),
    }
    for name, (family, head, config) in readers.items():
        tiny_models.make_reader(path / name, family, head, **config)
    config = json.loads((path / "reranker/config.json").read_text())
    activation = {"activation_fn": "torch.nn.modules.linear.Identity"}
    (path / "reranker/config.json").write_text(json.dumps(config | {"sentence_transformers": activation}))
    tiny_models.make_causal(path / "gpt", "gpt2")
    tiny_models.make_seq2seq(path / "marian", "marian")
    tiny_models.make_seq2seq(path / "bart", "bart", 3, max_length=64)
    tiny_models.make_seq2seq(path / "nllb", "nllb", 8)
    return path


@pytest.mark.parametrize(
    ("name", "task", "expected"),
    [
        ("labels", "text-classification", {"labels": 3, "max_tokens": 128}),
        pytest.param("tokens", "token-classification", {"labels": 5, "max_tokens": 130}, marks=pytest.mark.slow),
        pytest.param("answers", "question-answering", {"max_tokens": 130, "stride": 43}, marks=pytest.mark.slow),
        pytest.param("masks", "fill-mask", {"max_tokens": 130}, marks=pytest.mark.slow),
        ("vectors", "feature-extraction", {"dimensions": 32, "max_tokens": 128}),
        ("reranker", "text-ranking", {"labels": 1, "max_tokens": 130}),
        ("gpt", "text-generation", {"context": 128, "slots": 8, "kv_cache_mib": 1024}),
        ("marian", "translation", {"max_source_tokens": 128, "max_target_tokens": 128}),
        pytest.param(
            *("bart", "summarization", {"max_source_tokens": 128, "max_target_tokens": 64}), marks=pytest.mark.slow
        ),
        pytest.param(
            *("nllb", "translation", {"max_source_tokens": 128, "max_target_tokens": 128}), marks=pytest.mark.slow
        ),
    ],
)
def test_what_is_proposed_can_be_exported(
    folder: Path, tmp_path: Path, name: str, task: str, expected: dict[str, Any]
) -> None:
    proposal = add.propose(folder / name, {"path": str(folder / name)})
    assert proposal.name == name
    assert proposal.table["task"] == task
    assert proposal.table["limits"] == expected
    assert any(f"task {task}" in reason for reason in proposal.reasons)
    assert re.match(r"its export takes about [0-9.]+ GB of memory, 0.1 GB of disk and a minute$", proposal.reasons[-1])
    file = tmp_path / "models.toml"
    add.append(file, proposal)
    (spec,) = models_file.load(file)
    install.export([spec_in_float32(spec)], tmp_path / "repository", tmp_path, tmp_path, lambda message: None)


def spec_in_float32(spec: models_file.ModelSpec) -> models_file.ModelSpec:
    import dataclasses

    return dataclasses.replace(spec, variants=("fp32",), default_variant="fp32", recipes={"fp32": spec.recipes["fp32"]})


def test_the_command(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "models.toml"
    shown = run_export("add", str(folder / "labels"), "--models-file", str(file), "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert not file.exists()
    done = run_export_cold("add", str(folder / "labels"), "--models-file", str(file), "--name", "my.labels")
    assert done.returncode == 0, done.stderr
    assert file.read_text() == done.stdout == shown.stdout.replace("[labels]", '["my.labels"]')
    assert "labels 3: LABEL_0, LABEL_1, LABEL_2" in done.stderr
    assert f"written to {file}; make export MODEL=my.labels MODELS_FILE={file} exports it" in done.stderr
    again = run_export("add", str(folder / "labels"), "--models-file", str(file), "--name", "my.labels")
    assert again.returncode == 1
    assert "has a table [my.labels] already: give another --name" in again.stderr
    nothing = run_export("add", str(tmp_path), "--models-file", str(file))
    assert nothing.returncode == 1
    assert "is no Hugging Face folder, it has no config.json" in nothing.stderr
    for named, said in (
        ("/no/such/folder", "/no/such/folder does not exist: name a Hugging Face folder, a GGUF file, or a model on"),
        ("no/such.gguf", "no/such.gguf does not exist: name a"),
        ("../nothing", "../nothing does not exist: name a"),
        (str(file), "models.toml is no GGUF file: name one, a Hugging Face folder, or a model on the hub"),
    ):
        missing = run_export("add", named, "--models-file", str(file))
        assert (missing.returncode, missing.stderr.count("\n")) == (1, 1), missing.stderr
        assert said in missing.stderr


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    """Not even the folder that a GGUF file becomes; and it says the same."""
    gguf_writer.write(tmp_path / "m.gguf", make(CONFIGS["llama"]), vocabulary=byte_level())
    common = ("add", str(tmp_path / "m.gguf"), "--models-file", str(tmp_path / "models.toml"))
    shown = run_export(*common, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]
    done = run_export(*common)
    assert done.stdout == shown.stdout
    assert {file.name for file in tmp_path.iterdir()} == {"m.gguf", "models.toml", ".cache"}


def test_an_architecture_without_a_task(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "labels", tmp_path / "odd")
    config = json.loads((tmp_path / "odd/config.json").read_text()) | {"architectures": ["RobertaForMultipleChoice"]}
    (tmp_path / "odd/config.json").write_text(json.dumps(config))
    with pytest.raises(ModelsFileError, match="'RobertaForMultipleChoice' is of no task here"):
        add.propose(tmp_path / "odd", {"path": str(tmp_path / "odd")})


def test_the_doctor_finds_what_was_broken(folder: Path, tmp_path: Path) -> None:
    file, repository = tmp_path / "models.toml", tmp_path / "repository"
    tables = {
        "labels": {"task": "text-classification", "limits": {"labels": 3, "max_tokens": 96, "threads": 1}},
        "marian": {"task": "translation", "limits": {"max_source_tokens": 64, "max_target_tokens": 32, "threads": 1}},
    }
    text = ""
    for name, table in tables.items():
        entry = add.Proposal(name, {**table, "source": {"path": str(folder / name)}, "variants": ["fp32"]}, ())
        text += entry.as_toml()
    text += '[far]\ntask = "text-generation"\nsource = { hub = "some/where" }\nvariants = ["fp32"]\n'
    file.write_text(text + "limits = { context = 8 }\non_demand = true\n")
    specs = models_file.load(file)
    base = tmp_path
    missing = doctor.examine(specs, repository, base)
    takes = (
        r"\[labels\] is not exported: run make export MODEL=labels, which takes about 0.9 GB of memory, 0.1 GB of disk"
    )
    assert any(re.match(takes, finding.text) for finding in missing)
    assert missing[0].text == f"there is no folder {repository}: an export makes it, or name another --repository"
    assert not [finding for finding in missing if "config.pbtxt" in finding.text]
    install.export(specs[:2], repository, base, tmp_path, lambda message: None)
    for spec in specs:
        from trident_export import configs

        configs.write(spec, repository)
    healthy = doctor.examine(specs, repository, base)
    assert [finding.text for finding in healthy] == ["[far] some/where has no revision: run trident-export pin"]

    shutil.move(repository / "labels_model", tmp_path / "aside")
    found = [finding.text for finding in doctor.examine(specs, repository, base) if "labels" in finding.text]
    assert found == [f"[labels] {repository}/labels_model/1 is missing: export it again"]
    shutil.move(tmp_path / "aside", repository / "labels_model")

    graph = repository / "labels_model/1/model.onnx"
    model = onnx.load(str(graph))
    model.graph.output[0].name = "scores"
    onnx.save(model, str(graph))
    (repository / "marian/1/decoder.onnx").unlink()
    config = repository / "labels/config.pbtxt"
    config.write_text(config.read_text() + "\n")
    file.write_text(file.read_text().replace("threads = 1", "threads = 1000"))
    found = [finding.text for finding in doctor.examine(models_file.load(file), repository, base) if finding.problem]
    for part in ("labels/config.pbtxt differs", "has no output 'logits'; it has scores", "decoder.onnx is missing"):
        assert any(part in text for text in found), (part, found)
    done = run_export("doctor", "--models-file", str(file), "--repository", str(repository))
    assert done.returncode == 1
    assert "warning: [labels] limits.threads is 1000, this machine has" in done.stdout
    assert done.stdout.splitlines()[0].startswith("problem: ")
    assert f"labels/config.pbtxt differs from {file}: run" in done.stdout
    file.write_text(file.read_text().replace(str(folder / "labels"), str(tmp_path / "gone")))
    found = [finding.text for finding in doctor.examine(models_file.load(file), repository, base, file)]
    assert any(text.startswith("[labels] can't be compared with its source, nor exported again: ") for text in found)
    assert any("decoder.onnx is missing" in text for text in found)  # of a model behind it


def test_the_repository_of_this_project_is_healthy(default_repository: Path) -> None:
    done = run_export_cold(
        "doctor", "--models-file", str(ROOT / "models.toml"), "--repository", str(default_repository)
    )
    assert done.returncode == 0, done.stdout
    assert "has no revision" in done.stdout
