"""What a budget asks to be removed, on tiny models and on times that are known."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.test_compression import RUNS, make
from trident_export import models_file
from trident_export.compression import budget, curve, pruning
from trident_export.compression.budget import Budget, Removable
from trident_export.compression.methods import Method
from trident_export.errors import UsageError
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.measure import quality

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("what", "text", "expected"),
    [
        ("parameters", "110M", Budget("parameters", 110e6, relative=False)),
        ("parameters", "0.5b", Budget("parameters", 0.5e9, relative=False)),
        ("parameters", "1200", Budget("parameters", 1200, relative=False)),
        ("parameters", "80%", Budget("parameters", 0.8, relative=True)),
        ("latency", "12.5", Budget("latency", 12.5, relative=False)),
        ("latency", "75%", Budget("latency", 0.75, relative=True)),
    ],
)
def test_budgets_are_read(what: str, text: str, expected: Budget) -> None:
    assert Budget.read(what, text) == expected


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("parameters", "many"),
        ("parameters", "-3M"),
        ("parameters", "0"),
        ("latency", "5M"),
        ("latency", "nan"),
        ("latency", ""),
    ],
)
def test_impossible_budgets(what: str, text: str) -> None:
    with pytest.raises(UsageError, match=f"--{what} must be a number like"):
        Budget.read(what, text)


def test_a_model_within_its_budget_is_left() -> None:
    assert Budget.read("parameters", "80%").of(1000) == 800
    with pytest.raises(UsageError, match="the model has 1,000 parameters, which is within the budget"):
        Budget.read("parameters", "1K").of(1000)
    with pytest.raises(UsageError, match="the model has 5 ms, which is within the budget"):
        Budget.read("latency", "100%").of(5)


@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        ("llama", Method.LAYERS),
        ("llama", Method.COLUMNS),
        ("llama", Method.HEADS),
        ("qwen2", Method.HEADS),
        ("gpt2", Method.COLUMNS),
        ("opt", Method.LAYERS),
        ("bert", Method.COLUMNS),
        ("distilbert", Method.LAYERS),
    ],
)
def test_what_is_counted_is_what_goes(architecture: str, method: Method) -> None:
    model = make(architecture)
    found = budget.removable(model, method)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    units = found.step if method is Method.COLUMNS else 1
    left = found.parameters - units * found.size
    assert found.within(left) == units  # neither fewer nor more
    pruning.prune(model, method, units / found.total, RUNS)
    assert sum(p.numel() for p in model.parameters()) == left


def test_the_fewest_units_that_do() -> None:
    found = Removable(total=10, step=2, size=100, parameters=5000)
    assert [found.within(limit) for limit in (4999, 4800, 4799, 4200)] == [2, 2, 4, 8]
    with pytest.raises(UsageError, match="a budget of 4,199 parameters can't be met: .*, 4,200 are left"):
        found.within(4199)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("75%", 12), ("100.6", 8), ("35%", 28), ("99.9%", 2), ("20%", None)],
)
def test_a_latency_is_searched_on_what_is_measured(
    text: str, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole model takes 125 ms, and each of its 30 units 3 ms of them, a little more the more are left."""

    def milliseconds(units: int) -> float:
        return 125 - 3 * units - (0.5 if 0 < units < 28 else 0)

    removed: list[int] = []

    def prune(units: int, folder: Path) -> HuggingFaceFolder:
        removed.append(units)
        return HuggingFaceFolder(folder)

    def costs(probe: Any, built: list[Path]) -> list[dict[str, float]]:
        return [{quality.ROWS_SPEED: 1000 * quality.BATCH / milliseconds(units)} for units in (0, removed[-1])]

    monkeypatch.setattr(curve, "export", lambda probe, folder, root, progress: root.mkdir())
    monkeypatch.setattr(curve, "costs", costs)
    spec = models_file.parse(
        "m", {"task": "text-generation", "source": {"path": "m"}, "variants": ["fp32"], "limits": {"context": 64}}
    )
    asked = Budget.read("latency", text)
    found = Removable(total=30, step=2, size=1, parameters=1000)
    arguments = (spec, HuggingFaceFolder(tmp_path), found, asked, prune, lambda line: None)
    if expected is None:
        with pytest.raises(UsageError, match=r"a budget of 25 ms can't be met: .*, a step takes 41 ms"):
            budget._within_latency(*arguments)
        return
    units = budget._within_latency(*arguments)
    assert units == expected
    assert milliseconds(units) <= asked.limit_of(125) < milliseconds(units - found.step)
    assert len(removed) <= 5


def test_a_model_of_one_layer_has_none_to_spare() -> None:
    model = make("llama")
    pruning.prune(model, Method.LAYERS, 0.5, RUNS)
    with torch.no_grad():
        found = budget.removable(model, Method.LAYERS)
    assert (found.total, found.most) == (1, 0)
    assert dataclasses.replace(found, total=3).most == 2
