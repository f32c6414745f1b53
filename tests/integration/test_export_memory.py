"""What memory an export takes beside the weights that it traces: a fraction of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

from tests import tiny_models
from trident_export import install, models_file, recipes, tasks
from trident_export.graphs import decoder_passes, editing
from trident_export.graphs.causal import export_causal_graph
from trident_export.huggingface.folder import HuggingFaceFolder


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key)))


def _grown(work: Callable[[], None]) -> int:
    """Bytes that the process held at most while it worked, beyond what it held before."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    except OSError:
        pytest.skip("the kernel does not let a process measure its peak")
    before = _status("VmRSS")
    work()
    return (_status("VmHWM") - before) * 1024


def test_weights_are_held_once(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "max_position_embeddings": 64}
    torch.manual_seed(0)

    def export(layers: int, folder: Path) -> tuple[int, dict[str, int]]:
        config = LlamaConfig(vocab_size=1024, num_hidden_layers=layers, **sizes)
        model = AutoModelForCausalLM.from_config(config).eval()
        graph = folder / "graph.onnx"
        grown = {"trace": _grown(lambda: editing.save(decoder_passes.optimize(export_causal_graph(model, 64)), graph))}
        for name in ("fp32", "int4"):
            recipe, target = recipes.load()[name], folder / name / "model.onnx"
            grown[name] = _grown(
                lambda recipe=recipe, target=target: recipes.apply(recipe, recipes.Kind.DECODER, graph, target)
            )
        return 4 * model.num_parameters(), grown

    export(1, tmp_path / "first")  # libraries take memory when they first work
    weights, grown = export(8, tmp_path / "second")
    _, again = export(8, tmp_path / "third")  # what the allocator keeps for later adds to one now and then
    grown = {name: min(size, again[name]) for name, size in grown.items()}
    assert weights > 120e6
    # A joined matrix at a time, and the operators' own memory; with every weight held once more these were 1 and above.
    assert grown["trace"] < 0.5 * weights
    assert grown["fp32"] < 0.1 * weights
    assert grown["int4"] < 0.5 * weights
    assert (tmp_path / "second/fp32/model.onnx.data").samefile(tmp_path / "second/graph.onnx.data")


def test_a_gate_lets_hugging_faces_model_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first session is opened: both would hold the weights."""
    held: list[weakref.ref[Any]] = []
    reference = HuggingFaceFolder.reference

    def remembered(self: HuggingFaceFolder, kind: Any) -> Any:
        held.append(weakref.ref(model := reference(self, kind)))
        return model

    folders = {
        "causal": tiny_models.causal_entry(tiny_models.make_causal(tmp_path / "causal", "gpt2")),
        "reader": 'task = "feature-extraction"\n'
        f'source = {{ path = "{tiny_models.make_reader(tmp_path / "reader", "bert", AutoModel)}" }}\n'
        'variants = ["fp32"]\nlimits = { max_tokens = 32, threads = 1, dimensions = 32 }\n',
    }
    (tmp_path / "models.toml").write_text(tiny_models.models_toml(folders))
    monkeypatch.setattr(HuggingFaceFolder, "reference", remembered)
    for spec in models_file.load(tmp_path / "models.toml"):
        install.export([spec], tmp_path / "repository", tmp_path, tmp_path / "cache", lambda line: None)
        held.clear()
        evaluate = tasks.evaluator(spec, HuggingFaceFolder(tmp_path / spec.name), tmp_path / "repository")
        assert held
        assert [model() for model in held] == [None] * len(held)
        assert evaluate("fp32")
