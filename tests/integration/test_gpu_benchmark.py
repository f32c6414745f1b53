"""benchmarks/gpu.py, whole, on the CPU with tiny shapes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--device", "cpu", "--shapes", "tiny", "tiny-norms", "--streams", "1", "4", "--prompts", "64"]


def test_every_part_runs_and_the_graphs_compute_what_torch_does(tmp_path: Path) -> None:
    found = gpu.main([*SMALL, "--out", str(tmp_path / "gpu.json")])
    assert (found["failed"], found["left_out"]) == ({}, [])
    assert len(found["parts"]) == 2 * (3 * 4 + 2)
    for shape in ("tiny", "tiny-norms"):
        exact, *rounded = (found["parts"][f"{shape} {bits} bits: against torch"] for bits in (16, 8, 4))
        assert exact["largest_difference"] < 1e-5 < exact["spread"]
        assert exact["top1"] == 1
        assert [each["kl"] < limit for each, limit in zip(rounded, (1e-5, 1e-2), strict=True)] == [True, True]
        assert rounded[0]["kl"] < rounded[1]["kl"]
        for count in (1, 4):
            step = found["parts"][f"{shape} 16 bits, {count} streams"]
            assert step["tokens_s"] == pytest.approx(1e3 * count / step["step_ms"])
    assert gpu.json.loads((tmp_path / "gpu.json").read_text())["parts"] == found["parts"]


def test_a_wrong_graph_is_seen(tmp_path: Path) -> None:
    shape, device = gpu.SHAPES["tiny"], gpu.describe("cpu")
    torch.manual_seed(0)
    model = gpu.transformers.AutoModelForCausalLM.from_config(shape.config(128)).eval()
    path, _ = gpu.build(model, dataclasses.replace(shape, theta=10.0), tmp_path, 16, 128)
    found = gpu.compare(gpu.Session(path, device, captured=False), shape, device, model, 128)
    assert found["largest_difference"] > 1e-3


def test_without_time_everything_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    found = gpu.main([*SMALL, "--seconds", "-1"])
    assert found["parts"] == {}
    assert "tiny 16 bits: against torch" in found["left_out"]
