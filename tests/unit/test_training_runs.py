"""Runs of training: whose checkpoints are taken up, and what a configuration of DeepSpeed must say."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT
from trident_export.errors import UsageError
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.training import heads, run

EXAMPLES = ROOT / "examples" / "deepspeed"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the package is; nothing here imports it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def test_a_broken_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for number in (20, 100, 120):
        (tmp_path / f"checkpoint-{number}").mkdir()
    assert run.last_checkpoint(tmp_path) is None
    for number in (20, 100):
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text("{}")
    assert run.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
    run.begin(tmp_path, {"steps": 5})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-20", "settings.json"]


def test_another_runs_checkpoints_are_not_taken(tmp_path: Path) -> None:
    run.check_same_run(tmp_path, {"steps": 6})
    run.begin(tmp_path / "work", {"steps": 4})
    run.begin(tmp_path / "work", {"steps": 5, "minutes": 1.0})
    (tmp_path / "work" / "checkpoint-20").mkdir()
    (tmp_path / "work" / "checkpoint-20" / "trainer_state.json").write_text("{}")
    run.begin(tmp_path / "work", {"steps": 5, "minutes": 9.0})
    with pytest.raises(UsageError, match=r"holds the checkpoints of another run \(steps was 5\)"):
        run.begin(tmp_path / "work", {"steps": 6, "minutes": 1.0})


def test_the_first_process_writes_and_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    assert (run.first(), run.processes()) == (True, 1)
    run.said_by_first(said.append)("one")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (run.first(), run.processes()) == (False, 2)
    run.said_by_first(said.append)("two")
    run.begin(tmp_path / "work", {"steps": 5})
    assert said == ["one"]
    assert not (tmp_path / "work").exists()


def test_deepspeed_is_imported_only_when_it_is_asked_for() -> None:
    assert run.deepspeed_configuration("") is None
    found = {}
    for file in (ROOT / "export").rglob("*.py"):
        if "import deepspeed" not in (text := file.read_text(encoding="utf-8")) and "from deepspeed" not in text:
            continue
        tree = ast.parse(text)
        if imported := list(imports(tree)):
            found[file.name] = imported
            assert not list(imports(ast.Module([node for node in tree.body if not hasattr(node, "body")], [])))
    assert found == {"run.py": ["deepspeed.ops", "deepspeed.runtime.zero.config"]}


def imports(tree: ast.Module) -> Iterator[str]:
    """What of DeepSpeed a module imports."""
    for node in ast.walk(tree):
        named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        named += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        yield from (name for name in named if name.partition(".")[0] == "deepspeed")


@pytest.mark.parametrize(("name", "stage"), [("cpus.json", 1), ("one-gpu.json", 2), ("many-gpus.json", 3)])
@pytest.mark.usefixtures("installed")
def test_the_examples_are_configurations(name: str, stage: int) -> None:
    found = run.deepspeed_configuration(str(EXAMPLES / name))
    assert found is not None
    assert found["zero_optimization"]["stage"] == stage


@pytest.mark.usefixtures("installed")
def test_what_a_configuration_does_not_say_is_the_trainers(tmp_path: Path) -> None:
    file = tmp_path / "zero3.json"
    file.write_text('{"zero_optimization": {"stage": 3}, "gradient_clipping": 0.5}')
    assert run.deepspeed_configuration(str(file)) == {
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0.5,
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("{", "Expecting property name"),
        ("[" * 100_000, "is no DeepSpeed configuration: "),
        ("[]", "zero_optimization.stage must be 0, 1, 2 or 3"),
        ('{"zero_optimization": 3}', "zero_optimization.stage must be 0, 1, 2 or 3"),
        (json.dumps({"zero_optimization": {"stage": 4}}), "zero_optimization.stage must be 0, 1, 2 or 3"),
    ],
)
@pytest.mark.usefixtures("installed")
def test_impossible_configurations(tmp_path: Path, text: str | None, said: str) -> None:
    file = tmp_path / "file.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=said):
        run.deepspeed_configuration(str(file))


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_without_the_package(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--deepspeed needs the package deepspeed: docs/how-to/train-on-several"):
        run.deepspeed_configuration(str(EXAMPLES / "cpus.json"))
    assert "RANK" not in os.environ


def test_other_data_is_another_run(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Settings:
        steps: int = 5

    source = HuggingFaceFolder(tmp_path)
    one, other = (run.described(source, Settings(), texts, student="2") for texts in (["a", "b"], ["a", "c"]))
    assert (one["steps"], one["student"], one["processes"]) == (5, "2", 1)
    assert one["examples"] != other["examples"]
    assert one == run.described(source, Settings(), ["a", "b"], student="2")


@pytest.mark.parametrize("name", ["plain-1", "qwen2.5-small", 'my "head" v1.2', "Köpfe"])
def test_the_table_of_any_name_is_toml(tmp_path: Path, name: str) -> None:
    text = heads.table("text-classification", name, tmp_path / name, 96, 3)
    table = tomllib.loads(text)[name]
    assert table["source"] == {"path": str((tmp_path / name).resolve())}
    assert table["limits"] == {"labels": 3, "max_tokens": 96}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_impossible_settings(value: float) -> None:
    for name in ("epochs", "learning_rate"):
        with pytest.raises(UsageError, match="must be above 0, found"):
            heads.Settings(**{name: value})
